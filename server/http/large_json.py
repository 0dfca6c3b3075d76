"""JSON bodies of megabytes, encoded and sent in pieces, so that every other request gets its turn in between.

A worker thread was refused: msgspec holds the interpreter's lock while it encodes, so the event loop would stand
still all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec.structs import replace
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agent_chat.server.loop_share import pause
from agent_chat.stores.models import Agent, Message, Thread

PIECE_BYTES = 256 * 2**10


class LargeResponse(Response):
    """A response that hands its body to the connection piece by piece, each once the one before has left."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(self.body) <= PIECE_BYTES:
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), PIECE_BYTES):
            piece = bytes(self.body[start : start + PIECE_BYTES])
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await pause()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def encode_list(values: Sequence[Message] | Sequence[Thread] | Sequence[Agent]) -> bytes:
    """The JSON of the list; others get their turn after every 256 KB."""
    pieces: list[bytes] = []
    since_turn = 0
    for value in values:
        pieces.append(await encode_thread(value) if isinstance(value, Thread) else msgspec.json.encode(value))
        since_turn += len(pieces[-1])
        if since_turn > PIECE_BYTES:
            since_turn = 0
            await pause()
    return b"[" + b",".join(pieces) + b"]"


async def encode_thread(thread: Thread) -> bytes:
    """The JSON of the thread with its messages, encoded as `encode_list` does."""
    head = msgspec.json.encode(replace(thread, messages=[]))
    return head.removesuffix(b"[]}") + await encode_list(thread.messages) + b"}"


async def list_response(
    values: Sequence[Message] | Sequence[Thread] | Sequence[Agent], headers: dict[str, str] | None = None
) -> Response:
    return LargeResponse(await encode_list(values), 200, headers, media_type="application/json")


async def thread_response(thread: Thread, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return LargeResponse(await encode_thread(thread), status, headers, media_type="application/json")
