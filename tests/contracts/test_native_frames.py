"""The native dialect: the frames of SSE and WebSocket, encoded once per process (I20)."""

from __future__ import annotations

import json

from agent_chat.server.reading.dialects.native import sse_frame, websocket_frame
from agent_chat.stores.contracts import EventLog
from agent_chat.stores.events import (
    MessageDelta,
    encode,
)
from agent_chat.stores.models import new_id
from tests.support.log_reading import (
    build_turn,
    publish_all,
)


async def test_an_sse_frame_is_event_data_and_id_with_lf_and_a_blank_line(log: EventLog) -> None:
    event = MessageDelta("m", 0, "a\r\nb\u2028\u0085 😀")
    _, [entry] = await publish_all(log, new_id(), event)
    data = encode(event)
    assert (
        entry.encoded(sse_frame)
        == b"event: message.delta\ndata: " + data + b"\nid: " + entry.position.encode() + b"\n\n"
    )
    assert b"\r" not in entry.encoded(sse_frame)
    assert entry.encoded(sse_frame).count(b"\n") == 4


async def test_a_websocket_frame_is_the_same_object_with_its_position_inside(log: EventLog) -> None:
    _, _, events = build_turn("thread")
    _, entries = await publish_all(log, new_id(), *events)
    for entry, event in zip(entries, events, strict=True):
        assert json.loads(entry.encoded(websocket_frame)) == {**json.loads(encode(event)), "position": entry.position}
        assert entry.encoded(websocket_frame).startswith('{"type":')
