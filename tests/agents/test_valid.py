"""The stand-in itself: it rejects what the API rejects."""

from typing import Any

import pytest

from tests.support.anthropic_rules import faults

HELLO = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "echo", "input": {}}]}
RESULT = {
    "role": "user",
    "content": [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "x"}]}],
}
TOOL = {"name": "echo", "description": "", "input_schema": {"type": "object"}}


def request(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 1, "messages": list(turns), "tools": [TOOL], **more}


def turn(role: str, *blocks: Any) -> dict[str, Any]:
    return {"role": role, "content": list(blocks)}


def picture(data: str, kind: str = "image/png") -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}


@pytest.mark.parametrize("good", [request(HELLO), request(HELLO, USE, RESULT)])
def test_valid_requests_are_accepted(good: Any) -> None:
    assert faults(good) == []


@pytest.mark.parametrize(
    "wrong",
    [
        request(),
        request(USE, RESULT),
        request(HELLO, HELLO),
        request(HELLO, USE),
        request(HELLO, USE, HELLO),
        request(HELLO, RESULT),
        request(HELLO, USE, RESULT, USE, RESULT),
        request(HELLO, USE, turn("user", *HELLO["content"], *RESULT["content"])),
        request(HELLO, USE, RESULT, tools=[]),
        request(turn("user", {"type": "text", "text": " \n"})),
        request(turn("user")),
        request(HELLO, turn("assistant", {"type": "text", "text": "Hi"})),
        request(HELLO, turn("assistant", {**USE["content"][0], "name": "a b"}), RESULT),  # type: ignore[dict-item]
        request(HELLO, USE, turn("user", {**RESULT["content"][0], "content": []})),  # type: ignore[dict-item]
        request(turn("user", picture("AAAA"))),
        request(turn("user", picture("?"))),
        request(turn("user", picture("AAAA", "image/svg+xml"))),
        request(HELLO, tools=[TOOL, TOOL]),
        request(HELLO, tools=[{**TOOL, "input_schema": {}}]),
        request(HELLO, tools=[{**TOOL, "input_schema": {"type": "object", "anyOf": []}}]),
        request(HELLO, tools=[], tool_choice={"type": "none"}),
        request(HELLO, system=[{"type": "text", "text": ""}]),
        request(HELLO, USE, RESULT, thinking={"type": "enabled", "budget_tokens": 1}),
        request(HELLO, max_tokens=0),
    ],
)
def test_invalid_requests_are_rejected(wrong: Any) -> None:
    assert faults(wrong)
