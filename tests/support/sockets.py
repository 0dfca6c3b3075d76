"""A WebSocket client for journeys, on the `websockets` library."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from tests.support.client import KEY


class Socket:
    """One connection to a thread's WebSocket."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self._requests = 0

    async def send(self, **frame: object) -> None:
        await self.connection.send(json.dumps(frame))

    async def receive(self) -> dict[str, Any]:
        return dict(json.loads(await self.text()))

    async def text(self) -> str:
        """The next frame as it came."""
        async with asyncio.timeout(20):
            return str(await self.connection.recv())

    async def until(self, *types: str) -> list[dict[str, Any]]:
        """Everything up to and including the first frame of one of the types."""
        found = [await self.receive()]
        while found[-1]["type"] not in types:
            found.append(await self.receive())
        return found

    async def close_code(self) -> int | None:
        """Wait until the server closes the connection; the close code."""
        async with asyncio.timeout(20):
            await self.connection.wait_closed()
        return self.connection.close_code

    async def create(self, content: str, **fields: object) -> str:
        """Send a user's message; the request_id."""
        self._requests += 1
        request_id = f"r{self._requests}"
        await self.send(type="message.create", request_id=request_id, message={"content": content}, **fields)
        return request_id


@asynccontextmanager
async def socket(
    base: str, thread: str, *, after: str | None = None, key: str | None = KEY, **options: Any
) -> AsyncIterator[Socket]:
    """Open a thread's WebSocket."""
    query = f"?after={after}" if after else ""
    headers = {**options.pop("headers", {}), **({"Authorization": f"Bearer {key}"} if key else {})}
    url = f"{base.replace('http', 'ws', 1)}{thread}/ws{query}"
    async with connect(url, additional_headers=headers, max_size=None, **options) as connection:
        yield Socket(connection)
