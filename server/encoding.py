"""Encodes megabytes of JSON in pieces, so that other requests get their turn in between.

A worker thread was refused: msgspec holds the interpreter's lock while it encodes, so the event loop would stand still
all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from agent_chat.server.loop_share import pause
from agent_chat.stores.models import Agent, Message, Thread

PIECE_BYTES = 256 * 2**10


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
