"""Encodes megabytes of JSON in pieces, so that other requests get their turn in between.

The pieces of a response are not joined either: joining 8 MB touches so much new memory that it takes 10 ms and more. A
worker thread was refused: msgspec holds the interpreter's lock while it encodes, so the event loop would stand still
all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from agent_chat.server.loop_share import pause
from agent_chat.stores.models import Agent, Message, Thread

PIECE_BYTES = 256 * 2**10

Values = Sequence[Message] | Sequence[Thread] | Sequence[Agent]


class _Pieces:
    """Collects JSON: small parts are joined, and others get their turn after every 256 KB."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._parts: list[bytes] = []
        self._size = 0

    async def add(self, part: bytes) -> None:
        self._parts.append(part)
        self._size += len(part)
        if self._size > PIECE_BYTES:
            self.finish()
            await pause()

    def finish(self) -> list[bytes]:
        if self._parts:
            self._pieces.append(b"".join(self._parts) if len(self._parts) > 1 else self._parts[0])
            self._parts.clear()
            self._size = 0
        return self._pieces


async def encode_list(values: Values) -> list[bytes]:
    """Encode a list as JSON, in pieces; a large value is a piece of its own."""
    pieces = _Pieces()
    await _add_list(pieces, values)
    return pieces.finish()


async def encode_thread(thread: Thread) -> list[bytes]:
    """Encode a thread with its messages as JSON, in pieces."""
    pieces = _Pieces()
    await _add_thread(pieces, thread)
    return pieces.finish()


async def _add_list(pieces: _Pieces, values: Values) -> None:
    separator = b"["
    for value in values:
        await pieces.add(separator)
        if isinstance(value, Thread):
            await _add_thread(pieces, value)
        else:
            await pieces.add(msgspec.json.encode(value))
        separator = b","
    await pieces.add(b"]" if values else b"[]")


async def _add_thread(pieces: _Pieces, thread: Thread) -> None:
    head = msgspec.json.encode(replace(thread, messages=[]))
    await pieces.add(head.removesuffix(b"[]}"))
    await _add_list(pieces, thread.messages)
    await pieces.add(b"}")
