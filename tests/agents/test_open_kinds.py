"""Kinds with resources: opened when the server starts, closed after its last run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent_chat.agents import Kind, OpenKind, Part, Run, Text
from agent_chat.agents.registry import open_registry
from agent_chat.agents.testing import run_kind
from tests.support.servers import live_server


class Resource:
    """Records what happens to it, in order."""

    def __init__(self) -> None:
        self.record: list[str] = []

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Kind]:
        self.record.append("opened")
        try:
            yield Kind(self.reply)
        finally:
            self.record.append("closed")

    async def reply(self, run: Run) -> AsyncIterator[Part]:
        self.record.append("begun")
        yield Text("Hello.")
        self.record.append("ended")


async def test_a_kind_is_opened_once_and_closed_after_the_last_run(tmp_path: Path) -> None:
    resource = Resource()
    async with live_server(tmp_path, kinds={"resource": OpenKind(resource.open)}) as live:
        assert resource.record == ["opened"]
        agent = await live.agent(kind="resource")
        for _ in range(2):
            await live.post(await live.thread(agent["id"]), "Hi")
    assert resource.record == ["opened", "begun", "ended", "begun", "ended", "closed"]


async def test_run_kind_opens_and_closes_a_kind() -> None:
    resource = Resource()
    answer = await run_kind(OpenKind(resource.open), "Hi")
    assert (answer.content, resource.record) == ("Hello.", ["opened", "begun", "ended", "closed"])


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A package with a kind `faulty`, whose context manager has this body."""
    opening = f"@asynccontextmanager\nasync def open_faulty():\n    {body}\n"
    imports = "from contextlib import asynccontextmanager\nfrom agent_chat.agents import Kind, OpenKind\n"
    module = f"faulty_{folder.name}"
    (folder / f"{module}.py").write_text(f"{imports}\n{opening}\nfaulty = OpenKind(open_faulty)\n")
    info = folder / "faulty-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[chat.agents]\nfaulty = {module}:faulty\n")
    monkeypatch.syspath_prepend(str(folder))


async def test_an_installed_kind_that_cannot_be_opened_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(tmp_path, monkeypatch, "raise OSError('no such host')\n    yield")
    async with open_registry({}) as registry:
        assert "faulty" not in registry
    assert "agent kind 'faulty' skipped" in caplog.text


async def test_an_installed_kind_that_cannot_be_closed_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(tmp_path, monkeypatch, "yield Kind(None)\n    raise OSError('broken pipe')")
    async with open_registry({}) as registry:
        assert "faulty" in registry
    assert "agent kind 'faulty': closing failed" in caplog.text


async def test_a_given_kind_that_cannot_be_opened_stops_the_start() -> None:
    @asynccontextmanager
    async def open_nothing() -> AsyncIterator[Kind]:
        raise OSError("no such host")
        yield

    with pytest.raises(OSError, match="no such host"):
        async with open_registry({"own": OpenKind(open_nothing)}):
            pass
