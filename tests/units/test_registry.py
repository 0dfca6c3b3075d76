"""Kinds of agents from other packages: the example in the README."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from agent_chat.agents import AgentError, Ended, Text, ToolCompleted
from agent_chat.agents.mcp import toolbox as mcp_toolbox
from agent_chat.agents.mcp.config import read_servers
from agent_chat.agents.mcp.pool import Pool
from agent_chat.agents.registry import Kind, Registry, open_registry
from tests.support.demo_runs import AGENT, run

pytestmark = pytest.mark.usefixtures("patient")

README = Path(__file__).parent.parent.parent / "README.md"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's example package, as pip would have installed it."""
    readme = README.read_text()
    (project,) = re.findall(r"```toml\n(.*?)```", readme, re.DOTALL)
    (module,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    described = tomllib.loads(project)
    (name,) = described["tool"]["setuptools"]["py-modules"]
    (tmp_path / f"{name}.py").write_text(module)
    info = tmp_path / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {described['project']['name']}\nVersion: 1.0\n")
    groups = described["project"]["entry-points"].items()
    lines = [line for group, points in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)


async def test_the_agent_of_the_readme_is_found_and_replies(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_toolbox, "READY_SECONDS", 20.0)  # the tool server may start slowly on a busy machine
    pool = Pool(read_servers(None, {}))
    try:
        async with open_registry({}) as registry:
            parts = [part async for part in registry.kind("echo").reply(run(pool, "hello"))]
    finally:
        await pool.close()
    assert parts[0] == Text("You said: hello. ")
    assert any(isinstance(part, ToolCompleted) and part.result for part in parts)
    assert parts[-1] == Ended(stop_reason="end_turn")


async def test_a_given_kind_comes_before_an_installed_one(installed: None) -> None:
    async with open_registry({}) as registry:
        own = Kind(registry.kind("echo").reply)
    async with open_registry({"echo": own}) as registry:
        assert registry["echo"] is own


def test_a_missing_kind_is_an_error_for_the_client() -> None:
    with pytest.raises(AgentError, match="no agents of kind 'vanished'"):
        Registry({}).kind("vanished")
    assert AGENT.kind == "demo"


async def test_a_broken_entry_point_is_skipped_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package = tmp_path / "broken-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[chat.agents]\nbroken = no_such_module:reply\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    async with open_registry({}) as registry:
        assert "broken" not in registry
    (record,) = [record for record in caplog.records if record.name == "agent_chat.agents.registry"]
    assert record.getMessage() == "agent kind 'broken' skipped: no_such_module:reply cannot be loaded or opened"
