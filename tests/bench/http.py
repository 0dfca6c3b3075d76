"""The least of HTTP/1.1 that the processes of a bench need: they must cost little beside the server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import cast

from agent_chat.server.serving import listening_socket

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


class Connection(asyncio.Protocol):
    """A connection of a server: calls `request_received` for each request with a content-length."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.write = self.transport.write

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            found = _LENGTH.search(self._received, 0, end)
            size = end + 4 + (int(found[1]) if found else 0)
            if len(self._received) < size:
                return
            head, body = bytes(self._received[:end]), bytes(self._received[end + 4 : size])
            del self._received[:size]
            self.request_received(head, body)

    def request_received(self, head: bytes, body: bytes) -> None:
        raise NotImplementedError


async def serve(protocol: Callable[[], asyncio.Protocol]) -> None:
    """Serve on a free port and print it."""
    sock = listening_socket("127.0.0.1", 0)
    server = await asyncio.get_running_loop().create_server(protocol, sock=sock, backlog=2048)
    print(sock.getsockname()[1], flush=True)  # noqa: T201
    await server.serve_forever()


def post(host: str, path: str, body: bytes, **headers: str) -> bytes:
    """The bytes of a POST of JSON."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n{lines}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
