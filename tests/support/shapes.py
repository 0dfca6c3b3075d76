"""The exact keys of all response bodies."""

from __future__ import annotations

import re
from typing import Any

import httpx

AGENT_KEYS = {
    "id", "organization_id", "name", "kind", "model", "instructions", "mcp_servers", "tools", "max_tokens",
    "is_default", "metadata", "created_at", "updated_at",
}  # fmt: skip
THREAD_KEYS = {
    "id", "agent_id", "user_id", "organization_id", "title", "metadata", "created_at", "updated_at", "archived",
    "messages",
}  # fmt: skip
MESSAGE_KEYS = {
    "id", "thread_id", "content", "content_html", "role", "tool_calls", "attachments", "metadata", "created_at",
}  # fmt: skip
TOOL_CALL_KEYS = {"tool_name", "arguments", "result", "error", "start_time", "end_time"}
RUN_KEYS = {"status", "in_reply_to", "model", "usage", "stop_reason", "error", "tool_calls", "reasoning"}
PROBLEM_KEYS = {"type", "title", "status", "code", "detail"}

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def is_agent(body: Any) -> dict[str, Any]:
    assert set(body) == AGENT_KEYS
    _ids_and_times(body, ("id", "organization_id"), ("created_at", "updated_at"))
    assert isinstance(body["is_default"], bool)
    return dict(body)


def is_thread(body: Any) -> dict[str, Any]:
    assert set(body) == THREAD_KEYS
    _ids_and_times(body, ("id", "agent_id", "user_id", "organization_id"), ("created_at", "updated_at"))
    assert isinstance(body["archived"], bool)
    for message in body["messages"]:
        assert is_message(message)["thread_id"] == body["id"]
    times = [message["created_at"] for message in body["messages"]]
    assert times == sorted(set(times)), "messages are in order, and no two are of the same time"
    return dict(body)


def is_message(body: Any) -> dict[str, Any]:
    assert set(body) == MESSAGE_KEYS
    _ids_and_times(body, ("id", "thread_id"), ("created_at",))
    for call in body["tool_calls"]:
        assert set(call) == TOOL_CALL_KEYS
        if call["end_time"] is None:
            assert (body["metadata"]["run"]["status"], call["result"], call["error"]) == ("in_progress", None, None)
        else:
            assert (call["result"] is None) != (call["error"] is None)
        _ids_and_times(call, (), ("start_time", "end_time") if call["end_time"] else ("start_time",))
    if run := body["metadata"].get("run"):
        assert set(run) == RUN_KEYS
        assert len(run["tool_calls"]) == len(body["tool_calls"])
        assert all(set(call) - {"repeatable"} == {"id", "round", "offset"} for call in run["tool_calls"])
        assert len({call["id"] for call in run["tool_calls"]}) == len(run["tool_calls"])
        assert all(set(block) == {"index", "after", "calls", "text"} for block in run["reasoning"])
    return dict(body)


def _ids_and_times(body: Any, ids: tuple[str, ...], times: tuple[str, ...]) -> None:
    assert all(UUID.fullmatch(body[name]) for name in ids), body
    assert all(TIME.fullmatch(body[name]) for name in times), body


def is_problem(answer: httpx.Response, status: int, code: str, *more: str) -> dict[str, Any]:
    """An RFC 9457 problem with these members in addition to the five of all problems."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert set(body) == PROBLEM_KEYS | set(more), body
    assert (body["status"], body["code"]) == (status, code), body
    assert all(isinstance(body[name], str) and body[name] for name in PROBLEM_KEYS - {"status"})
    assert "Traceback" not in answer.text
    return body


def is_invalid(answer: httpx.Response, field: str) -> dict[str, Any]:
    """A 422 that names this field."""
    body = is_problem(answer, 422, "invalid_request", "field")
    assert body["field"] == field, body
    return body
