"""Agents that yield invalid or surprising parts do no harm to their threads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from agent_chat.agents import Part, Reply, Run, Text, ToolCompleted, ToolProgress, ToolStarted
from agent_chat.agents.registry import Kind
from tests.support.servers import live_server


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"in": value}
    return value


async def deep(run: Run) -> AsyncIterator[Part]:
    yield ToolStarted("1", "dig", nested(990))
    yield ToolCompleted("1", nested(990))
    yield ToolStarted("2", "dig", nested(64))
    yield ToolCompleted("2", nested(64))
    yield Text("Deep.")


async def chatty(run: Run) -> AsyncIterator[Part]:
    yield ToolStarted("1", "wait", {})
    for step in range(20_000):
        yield ToolProgress("1", step, None, "still at it, and still at it, " * 15)
    yield ToolCompleted("1", {"value": 1})
    yield Text("Done.")


async def answer(folder: Path, reply: Reply) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answer as JSON, and as it is stored after a restart."""
    kinds = {"odd": Kind(reply)}
    async with live_server(folder, kinds=kinds) as live:
        thread = await live.thread((await live.agent(kind="odd"))["id"])
        told = await live.post(thread, "Go.")
        assert told.status_code == 201, told.text
    async with live_server(folder, kinds=kinds) as live:
        return told.json(), (await live.get(thread))["messages"][-1]


async def test_what_is_nested_too_deep_to_be_read_back_becomes_words(tmp_path: Path) -> None:
    told, stored = await answer(tmp_path, deep)
    assert told == stored
    first, second = told["tool_calls"]
    assert first["arguments"] == {"unreadable": "Nested deeper than 64 levels."}
    assert (first["result"], first["error"]) == (None, "The result was nested deeper than 64 levels.")
    assert second["arguments"] == second["result"] == nested(64)


async def test_progress_is_not_stored_and_never_ends_an_answer(tmp_path: Path) -> None:
    told, stored = await answer(tmp_path, chatty)
    assert told == stored
    assert told["content"] == "Done."
