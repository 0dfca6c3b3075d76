"""A request's body in pieces, with an end to waiting: a client that falls silent holds its request for 60 s only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request

from agent_chat.server.errors import BodyStalled

SILENCE_SECONDS = 60.0


async def pieces_of(request: Request) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises: BodyStalled."""
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise BodyStalled(SILENCE_SECONDS) from error
        yield piece
