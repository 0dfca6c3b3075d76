"""Started in a clone, the server leaves the name `agents` to other packages and loads each of its modules once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.installed import report, started, write_probe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", ["server", "agent_chat.server"])
@pytest.mark.slow
async def test_agents_is_another_packages_name_in_a_clone(module: str, tmp_path: Path) -> None:
    others = tmp_path / "others"
    write_probe(others)
    (others / "agents").mkdir()
    (others / "agents" / "__init__.py").write_text('"""Another package of this name, such as OpenAI\'s."""\n')
    command = [sys.executable, "-m", module]
    async with started(command, ROOT, tmp_path / "data", PYTHONPATH=str(others)) as client:
        found = await report(client)
    assert found.agents == str(others / "agents" / "__init__.py")
    assert found.loaded_twice == []
    assert str(ROOT) not in found.path
