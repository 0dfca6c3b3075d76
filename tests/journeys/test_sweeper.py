"""The sweeper: whatever goes wrong in one sweep, it comes again."""

from __future__ import annotations

from pathlib import Path

import pytest

from server import runner
from tests.journeys.gates import critical, no_runs
from tests.journeys.viewing import status


async def test_a_sweep_that_fails_is_told_and_the_next_one_repairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner, "SWEEP_SECONDS", 0.05)
    async with critical(tmp_path, lease=0.1) as race:
        death = race.store.hold("finish", "before")
        failing = race.store.hold("orphans", "before")
        thread = await race.live.scripted_thread()
        run = await race.start(thread, "say all")
        await failing.reached()
        failing.kill()
        await death.reached()
        death.kill()
        await race.store.hold("forget", "after").passed()
        assert status(await race.live.get(f"{thread}/messages/{run}")) == "failed"
    assert "could not sweep" in caplog.text


async def test_a_repaired_run_keeps_the_ids_of_its_calls_though_the_log_has_more_text(tmp_path: Path) -> None:
    """Only checkpoints tell a call's id, only the log what was said since the last one."""
    async with critical(tmp_path, lease=0.0) as race:
        kept, death = race.store.hold("checkpoint", "after"), race.store.hold("finish", "before")
        thread = await race.live.scripted_thread()
        run = await race.start(thread, "say some\nhold start\nopen oven\nhold end\nsay more")
        race.live.gates.release("start")
        await kept.passed()  # before a call that must not be repeated
        await race.live.gates.reached("end")
        race.live.gates.release("end")
        await death.reached()
        death.kill()
        await no_runs()
        await race.runner.sweep()
        answer = await race.live.get(f"{thread}/messages/{run}")
        assert (status(answer), answer["content"]) == ("failed", "some\n\nmore")
        assert answer["metadata"]["run"]["tool_calls"] == [{"id": "call_2", "round": 0, "offset": 4}]
