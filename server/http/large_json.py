"""Responses of megabytes of JSON, encoded (`server.encoding`) and sent in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agent_chat.server.encoding import PIECE_BYTES, encode_list, encode_thread
from agent_chat.server.loop_share import pause
from agent_chat.stores.models import Agent, Message, Thread


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


async def list_response(
    values: Sequence[Message] | Sequence[Thread] | Sequence[Agent], headers: dict[str, str] | None = None
) -> Response:
    return LargeResponse(await encode_list(values), 200, headers, media_type="application/json")


async def thread_response(thread: Thread, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return LargeResponse(await encode_thread(thread), status, headers, media_type="application/json")
