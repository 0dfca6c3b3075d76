"""The sweeper: whatever goes wrong in one sweep, it comes again."""

from __future__ import annotations

from pathlib import Path

import pytest

from server import runner
from tests.journeys.gates import critical
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
