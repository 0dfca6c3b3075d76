"""A TCP proxy that cuts: the first connections are reset after so many bytes of the answer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def cutting_proxy(port: int, cuts: Iterator[int]) -> AsyncIterator[str]:
    """Forward to `port`; each connection ends with a reset after the next of `cuts` bytes, then none does."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = next(cuts, None)
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
        up = asyncio.create_task(_copy(reader, upstream_writer, None))
        try:
            await _copy(upstream_reader, writer, left)
        finally:
            up.cancel()
            for end in (writer, upstream_writer):
                sock = end.get_extra_info("socket")
                if left is not None:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.close()

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: int | None) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1024):
            if left is not None:
                data = data[:left]
                left -= len(data)
            writer.write(data)
            await writer.drain()
            if left == 0:
                return
