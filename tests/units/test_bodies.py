"""Reading a body costs about what the body weighs, whatever is in it, and form fields stay the fields that they are."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import msgspec
import pytest

from agent_chat.server.errors import InvalidRequest, TooLarge
from agent_chat.server.http.bodies import decode_body, decode_form
from agent_chat.server.http.websocket import CreateMessage
from agent_chat.server.inputs import AgentCreate, AgentUpdate, MessageCreate, ThreadCreate


def packed(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


LONG_KEY = {"k" * 100_000: [1] * 900_000}
BODIES: dict[str, tuple[type[Any], Any]] = {
    "thread metadata": (ThreadCreate, {"metadata": LONG_KEY}),
    "agent metadata": (AgentCreate, {"name": "x", "metadata": LONG_KEY}),
    "message metadata": (MessageCreate, {"content": "x", "metadata": LONG_KEY}),
    "a command's metadata": (
        CreateMessage,
        {"type": "message.create", "request_id": "", "message": {"content": "x", "metadata": LONG_KEY}},
    ),
    "metadata that fits": (ThreadCreate, {"metadata": {"k" * 8_000: [1] * 4_000}}),
    "many servers": (AgentCreate, {"name": "x", "mcp_servers": [""] * 600_000}),
    "many tools": (AgentUpdate, {"tools": ["x"] * 500_000}),
    "many attachments": (MessageCreate, {"content": "x", "attachments": [{"id": "x"}] * 150_000}),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.slow
def test_no_body_takes_much_more_memory_than_it_has_bytes(name: str) -> None:
    type, body = BODIES[name]
    data = packed(body)
    assert len(data) < 2 * 2**20
    tracemalloc.start()
    try:
        decode_body(data, type)
    except (InvalidRequest, TooLarge):
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 32 * 2**20


@pytest.mark.parametrize("depth", range(100, 1100, 7))
def test_nesting_of_any_depth_is_refused(depth: int) -> None:
    with pytest.raises(InvalidRequest):
        decode_body(b'{"metadata":{"a":' + b"[" * depth + b"]" * depth + b"}}", ThreadCreate)


@pytest.mark.parametrize(
    ("type", "body", "field"),
    [
        (AgentCreate, {"name": "x", "mcp_servers": ["x"] * 101}, "mcp_servers"),
        (AgentCreate, {"name": "x", "mcp_servers": ["x" * 201]}, "mcp_servers"),
        (AgentCreate, {"name": "x", "tools": ["x"] * 1001}, "tools"),
        (AgentUpdate, {"tools": ["x" * 201]}, "tools"),
        (MessageCreate, {"content": "", "attachments": [{"id": "x"}] * 101}, "attachments"),
    ],
)
def test_lists_of_names_have_an_end(type: type[msgspec.Struct], body: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode_body(packed(body), type)
    assert refused.value.field.partition("[")[0] == field


def test_a_command_s_message_is_checked_under_its_own_name() -> None:
    command = {"type": "message.create", "request_id": "1", "message": {"content": "x", "metadata": {"a": ["\0"]}}}
    with pytest.raises(InvalidRequest) as refused:
        decode_body(packed(command), CreateMessage)
    assert refused.value.field == "message.metadata.a[0]"


@pytest.mark.parametrize("field", ["metadata", "attachments"])
@pytest.mark.parametrize(
    "text",
    [
        '{"x":1},"content":"other"',
        '[],"role":"system"',
        '{"x":1}}, {',
        '{"x":1} {}',
        "",
        "{",
        "nonsense",
        '{"x":"\\"}',
        "[" * 100_000,
        '{"\\ud800":1},"content":"other"',
    ],
)
def test_a_form_field_can_not_set_another_one(field: str, text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode_form({"content": "mine", field: text}, files=False)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("text", "field"),
    [("[]", "metadata"), ("1e999", "metadata"), ('{"a":["\\u0000"]}', "metadata.a[0]"), ('{"run":1}', "metadata.run")],
)
def test_what_is_wrong_inside_a_form_field_is_named_as_in_a_json_body(text: str, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode_form({"content": "mine", "metadata": text}, files=False)
    assert refused.value.field == field


def test_a_form_s_fields_are_read_as_json_is() -> None:
    text = '{"$a": [1e300, 1000000000000000000000, "\\u00fc"], "content": "other"}'
    attachments = '[{"id": "1"}]'
    message = decode_form({"content": '","role":"system', "metadata": text, "attachments": attachments}, files=False)
    assert (message.content, message.role) == ('","role":"system', "user")
    assert message.metadata == json.loads(text)
    assert [reference.id for reference in message.attachments] == ["1"]
    assert decode_form({}, files=True).content == ""
