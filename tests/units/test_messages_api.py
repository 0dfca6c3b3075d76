"""Decoding a model's stream, whatever a gateway does to it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from agent_chat.agents import Reasoning, Text
from agent_chat.agents.claude.messages_api import RESPONSE_BYTES, StreamedResponse

JSON = dict[str, Any]


def line(event: JSON) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def started(block: JSON, index: int = 0) -> bytes:
    return line({"type": "content_block_start", "index": index, "content_block": block})


def delta(index: int = 0, /, **fields: object) -> bytes:
    return line({"type": "content_block_delta", "index": index, "delta": fields})


def stopped(index: int = 0) -> bytes:
    return line({"type": "content_block_stop", "index": index})


def text(*pieces: str) -> list[bytes]:
    deltas = [delta(type="text_delta", text=piece) for piece in pieces]
    return [started({"type": "text", "text": ""}), *deltas, stopped()]


def taken(response: StreamedResponse, *lines: bytes) -> list[Text | Reasoning]:
    return [part for each in lines for part in response.feed(each)]


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (("a\ud83e", "\udd8ab"), ["a", "🦊b"]),
        (("a\ud83e", "", "\udd8a", "b"), ["a", "🦊", "b"]),
        (("a\ud83e", "b"), ["a", "\ufffdb"]),
        (("a\ud83e",), ["a", "\ufffd"]),
        (("\udd8a", "b"), ["\ufffd", "b"]),
        (("\ud83e", "\ud83e", "\udd8a"), ["\ufffd", "🦊"]),
        (("a\ud83e\udd8ab", "c"), ["a🦊b", "c"]),
    ],
)
def test_an_emoji_that_is_split_between_two_deltas_is_joined(pieces: tuple[str, ...], shown: list[str]) -> None:
    response = StreamedResponse()
    parts = taken(response, *text(*pieces), line({"type": "message_stop"}))
    assert response.failure is None
    assert response.complete
    assert [part.text for part in parts] == shown


def test_half_an_emoji_at_the_end_of_one_block_is_not_joined_with_the_next_block() -> None:
    response = StreamedResponse()
    lines = [
        started({"type": "thinking", "thinking": ""}),
        delta(type="thinking_delta", thinking="Hm\ud83e"),
        delta(type="signature_delta", signature="s"),
        stopped(),
        started({"type": "text", "text": ""}, 1),
        delta(1, type="text_delta", text="\udd8a!"),
        stopped(1),
    ]
    assert taken(response, *lines) == [Reasoning("Hm"), Reasoning("\ufffd"), Text("\ufffd!")]
    assert response.thinking == [{"type": "thinking", "thinking": "Hm\ufffd", "signature": "s"}]


def test_split_emoji_in_arguments_are_joined_and_lone_surrogates_replaced_everywhere() -> None:
    response = StreamedResponse()
    lines = [
        started({"type": "tool_use", "name": "f\ud83e", "input": {}}),
        delta(type="input_json_delta", partial_json='{"a": "\ud83e'),
        delta(type="input_json_delta", partial_json='\udd8a", "b": "\ud83e"}'),
        stopped(),
    ]
    assert taken(response, *lines) == []
    (use,) = response.calls
    assert (use.name, use.arguments, use.unreadable) == ("f\ufffd", {"a": "🦊", "b": "\ufffd"}, False)


@pytest.mark.parametrize("field", ["text", "data", "name", "thinking", "signature"])
@pytest.mark.parametrize("value", [{"a": 1}, [1], 7, True])
def test_a_block_of_an_unknown_type_may_have_fields_of_any_type(field: str, value: object) -> None:
    response = StreamedResponse()
    strange = [started({"type": "of the future", field: value}), delta(type="future_delta", **{field: value})]
    parts = taken(response, *strange, stopped(), *text("Hello."))
    assert response.failure is None
    assert parts == [Text("Hello.")]


@pytest.mark.parametrize(
    "data",
    [
        delta(type="text_delta", text=7),
        b"data: {\n\n",
        b"data: []\n\n",
        b"data: " + b"[" * 100_000 + b"\n\n",
        b'data: {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "\xff"}}\n\n',
    ],
)
def test_a_stream_that_cannot_be_decoded_is_a_failure(data: bytes) -> None:
    response = StreamedResponse()
    assert response.feed(data) == []
    assert response.failure is not None


def test_a_line_may_be_cut_anywhere() -> None:
    data = b"".join(text("Grüße ", "\ud83e", "\udd8a")) + line({"type": "message_stop"})
    for size in (1, 2, 7, 1000):
        response = StreamedResponse()
        parts = taken(response, *(data[start : start + size] for start in range(0, len(data), size)))
        assert "".join(part.text for part in parts) == "Grüße 🦊"
        assert response.complete


def test_a_line_without_an_end_is_rejected_in_linear_time() -> None:
    response, piece, taken_bytes = StreamedResponse(), b"x" * 4096, 0
    before = time.process_time()
    while response.failure is None:
        assert response.feed(piece) == []
        taken_bytes += len(piece)
    assert time.process_time() - before < 0.5
    assert RESPONSE_BYTES < taken_bytes <= RESPONSE_BYTES + len(piece)


def test_complete_lines_before_a_line_without_an_end_are_decoded() -> None:
    response = StreamedResponse()
    assert response.feed(b"".join(text("Hello.")) + b"x" * (RESPONSE_BYTES + 1)) == [Text("Hello.")]
    assert response.failure is not None


@pytest.mark.parametrize("fields", [("input_json_delta", "partial_json"), ("thinking_delta", "thinking")])
def test_arguments_and_thinking_without_an_end_are_rejected(fields: tuple[str, str]) -> None:
    kind, field = fields
    response, count = StreamedResponse(), 0
    piece = delta(type=kind, **{field: "x" * 2**20})
    while response.failure is None:
        response.feed(piece)
        count += 1
    assert count == RESPONSE_BYTES // 2**20 + 1
