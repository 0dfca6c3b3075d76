"""The native dialect: an entry's event as it is in the log, with its position, over SSE or a WebSocket.

These functions are given to `Entry.encoded`, which caches what they return.
"""

from __future__ import annotations

from agent_chat.stores.buffer import Entry


def sse_frame(entry: Entry) -> bytes:
    """Encode a server-sent event with LF line ends, `id` last: a reader cut off inside the frame must not skip it."""
    # `id:` is last: some clients store it when they parse that line, before they dispatch the event
    return b"event: %b\ndata: %b\nid: %b\n\n" % (entry.type.encode(), entry.data, entry.position.encode())


def websocket_frame(entry: Entry) -> str:
    """Encode the same object with `position` inside."""
    return f'{entry.data[:-1].decode()},"position":"{entry.position}"}}'
