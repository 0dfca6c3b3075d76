"""A request's body in pieces; a client that sends nothing for 60 s loses its request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

from starlette.requests import Request

from agent_chat.server.errors import BodyStalled
from agent_chat.server.timing import Timing


async def receive_body(request: Request) -> AsyncIterator[bytes]:
    """Yield the body's pieces as they arrive. Raises: BodyStalled."""
    seconds = cast(Timing, request.state.timing).body_silence
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(seconds):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise BodyStalled(seconds) from error
        yield piece
