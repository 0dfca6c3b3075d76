"""A client's reducer, written independently, from the description of the API: the state that follows from the frames.

A snapshot replaces all; message.created and a terminal event replace that message; a delta appends at its offset; a
completed tool call is never reopened; events for a message that is not in progress are ignored; of two
thread.updated the later updated_at wins. Reasoning is part of a message whose `metadata.run` has `reasoning`, and is
ignored otherwise.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.support.client import Frame

_TERMINAL = {"run.completed", "run.failed", "run.cancelled"}


class View:
    """A thread as a viewer has put it together. Fails on a gap, or if a terminal event differs from the deltas."""

    def __init__(self) -> None:
        self.thread: dict[str, Any] = {}
        self.messages: dict[str, dict[str, Any]] = {}
        self.ends: Counter[str] = Counter()
        self.deleted = False
        self._call_ids: dict[tuple[str, int], str] = {}

    def copy(self) -> View:
        """A copy of this view."""
        view = View()
        view.thread, view.messages, view.ends = self.thread, dict(self.messages), self.ends.copy()
        view._call_ids = dict(self._call_ids)
        return view

    def apply(self, frame: Frame) -> None:
        data = frame.data
        match frame.event:
            case "thread.snapshot":
                self.thread = data["thread"]
                self.messages = {message["id"]: message for message in data["thread"]["messages"]}
            case "thread.updated":
                if data["thread"]["updated_at"] > self.thread.get("updated_at", ""):
                    self.thread = data["thread"]
            case "thread.deleted":
                self.deleted = True
            case "message.created":
                self.messages[data["message"]["id"]] = data["message"]
            case "run.started" | "message.snapshot":
                if self._open(data["message"]["id"]) or data["message"]["id"] not in self.messages:
                    self.messages[data["message"]["id"]] = data["message"]
            case event if event in _TERMINAL:
                self._end(data["message"])
            case _:
                if message := self._open(data["message_id"]):
                    if data["type"].startswith("tool_call."):
                        known = self._call_ids.setdefault((message["id"], data["index"]), data["id"])
                        assert known == data["id"], "a call has one id"
                    self.messages[message["id"]] = _grown(message, data)

    def _open(self, message_id: str) -> dict[str, Any] | None:
        message = self.messages.get(message_id)
        return message if message and status(message) == "in_progress" else None

    def _end(self, message: dict[str, Any]) -> None:
        if seen := self._open(message["id"]):
            assert seen["content"] == message["content"]
            assert seen["tool_calls"] == message["tool_calls"]
            assert _reasoning(seen) == _reasoning(message)
            for index, call in enumerate(message["metadata"]["run"]["tool_calls"]):
                assert call["id"] == self._call_ids.get((message["id"], index), call["id"])
        self.ends[message["id"]] += 1
        self.messages[message["id"]] = message

    def listed(self) -> list[dict[str, Any]]:
        """The messages as a thread lists them."""
        return sorted(self.messages.values(), key=lambda message: str(message["created_at"]))

    def shows(self, thread: dict[str, Any]) -> bool:
        """Whether this is that stored thread; changes of `updated_at` alone are not published."""
        facts = ("id", "title", "archived", "metadata")
        return self.listed() == thread["messages"] and all(self.thread[name] == thread[name] for name in facts)


def status(message: dict[str, Any]) -> str | None:
    run = message["metadata"].get("run")
    return str(run["status"]) if run else None


def _reasoning(message: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The blocks of reasoning that are stored with the message; None if none ever are."""
    blocks: list[dict[str, Any]] | None = message["metadata"]["run"].get("reasoning")
    return blocks


def _with_reasoning(message: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """The running message after one more delta of reasoning."""
    if (blocks := _reasoning(message)) is None:
        return message
    index, offset = data["index"], data["offset"]
    if index == len(blocks):
        assert data["after"] == len(message["content"]), "the text before the reasoning"
        blocks = [*blocks, {"index": index, "after": data["after"], "calls": len(message["tool_calls"]), "text": ""}]
    assert index < len(blocks), "a hole in the blocks of reasoning"
    before = blocks[index]["text"]
    assert offset <= len(before), "a hole in the reasoning"
    grown = {**blocks[index], "text": before + data["text"][len(before) - offset :]}
    run = {**message["metadata"]["run"], "reasoning": [*blocks[:index], grown, *blocks[index + 1 :]]}
    return {**message, "metadata": {**message["metadata"], "run": run}}


def _grown(message: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """The running message after one more delta or tool event."""
    calls = list(message["tool_calls"])
    match data["type"]:
        case "reasoning.delta":
            return _with_reasoning(message, data)
        case "message.delta":
            length, offset = len(message["content"]), data["offset"]
            assert offset <= length, "a hole in the text"
            return {**message, "content": message["content"] + data["text"][length - offset :]}
        case "tool_call.started" if data["index"] >= len(calls):
            assert data["index"] == len(calls), "a hole in the tool calls"
            opened = {"result": None, "error": None, "end_time": None}
            calls.append({**{name: data[name] for name in ("tool_name", "arguments", "start_time")}, **opened})
        case "tool_call.completed" if calls[data["index"]]["end_time"] is None:
            calls[data["index"]] = data["tool_call"]
    return {**message, "tool_calls": calls}
