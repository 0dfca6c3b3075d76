"""Responses of megabytes of JSON, encoded (`server.encoding`) and sent in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agent_chat.server.encoding import PIECE_BYTES, Values, encode_list, encode_thread
from agent_chat.server.loop_share import pause
from agent_chat.stores.models import Thread


class LargeResponse(Response):
    """A JSON response that hands its body to the connection piece by piece, each once the one before has left.

    Args:
        pieces: the body; pieces of more than 256 KB are divided.
    """

    media_type = "application/json"

    def __init__(self, pieces: Sequence[bytes], status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._pieces = pieces
        length = str(sum(map(len, pieces)))
        super().__init__(None, status, {"content-length": length, **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the body in pieces."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        left = sum(map(len, self._pieces))
        for piece in self._pieces:
            for start in range(0, len(piece), PIECE_BYTES):
                body = piece[start : start + PIECE_BYTES]
                left -= len(body)
                await send({"type": "http.response.body", "body": body, "more_body": left > 0})
                if left:
                    await pause()


async def list_response(values: Values, headers: dict[str, str] | None = None) -> Response:
    """Build the JSON response for a list, without holding up the event loop."""
    return LargeResponse(await encode_list(values), 200, headers)


async def thread_response(thread: Thread, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Build the JSON response for a thread, without holding up the event loop."""
    return LargeResponse(await encode_thread(thread), status, headers)
