"""The sweeper: whatever goes wrong in one sweep, it comes again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agent_chat.agents.registry import Registry
from agent_chat.server.runs.runner import Runner
from agent_chat.server.timing import Timing
from agent_chat.stores.contracts import Store
from agent_chat.stores.embedded.log import EmbeddedLog
from agent_chat.stores.models import Principal
from agent_chat.stores.sqlite.store import open_sqlite
from tests.support.gates import critical, no_runs
from tests.support.samples import WORKER, new_principal, started_thread, turn
from tests.support.thread_view import status


async def test_a_sweep_that_fails_is_logged_and_the_next_one_repairs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with critical(tmp_path, lease=0.1, timing=Timing(sweep=0.05)) as race:
        death = race.store.hold("finish", "before")
        failing = race.store.hold("take_orphans", "before")
        thread = await race.live.scripted_thread()
        run = await race.live.start_run(thread, "say all")
        await failing.reached()
        failing.kill()
        await death.reached()
        death.kill()
        await race.store.hold("delete_record", "after").passed()
        assert status(await race.live.get(f"{thread}/messages/{run}")) == "failed"
    assert "the sweep for orphaned runs failed" in caplog.text


async def test_a_repaired_run_has_the_ids_of_its_calls_although_the_log_has_more_text(tmp_path: Path) -> None:
    """Only checkpoints have the ids of calls, and only the log has the text since the last checkpoint."""
    async with critical(tmp_path, lease=0.0) as race:
        kept, death = race.store.hold("checkpoint", "after"), race.store.hold("finish", "before")
        thread = await race.live.scripted_thread()
        run = await race.live.start_run(thread, "say some\nhold start\nopen oven\nhold end\nsay more")
        race.live.gates.release("start")
        await kept.passed()  # before a call that must not be repeated
        await race.live.gates.reached("end")
        race.live.gates.release("end")
        await death.reached()
        death.kill()
        await no_runs()
        await race.runner.repairer.sweep()
        answer = await race.live.get(f"{thread}/messages/{run}")
        assert (status(answer), answer["content"]) == ("failed", "some\n\nmore")
        assert answer["metadata"]["run"]["tool_calls"] == [{"id": "call_2", "round": 0, "offset": 4}]


def _no_tools(*of: object) -> Any:
    raise NotImplementedError


async def test_an_organization_whose_answers_wait_to_be_rendered_delays_no_other_ones_repair(
    tmp_path: Path,
) -> None:
    slow, fast, rendered = new_principal(), new_principal(), asyncio.Event()

    async def render(organization_id: str, content: str) -> str:
        if organization_id == slow.organization_id:
            await rendered.wait()
        return content

    async def die(store: Store, principal: Principal) -> tuple[str, str]:
        """A run whose process died: its thread, and its id."""
        thread = await started_thread(store, principal)
        question, answer = turn(thread.id)
        await store.claim(principal, question, answer, worker=WORKER)
        return thread.id, answer.id

    async def failed(store: Store, principal: Principal, *runs: tuple[str, str]) -> list[bool]:
        return [(await store.get_message(principal, *run)).status == "failed" for run in runs]

    store, log = await open_sqlite(tmp_path / "chat.db", lease=0.0), EmbeddedLog()
    sweeper = Runner(store, log, Registry({}), _no_tools, render, timing=Timing(sweep=0.2))
    async with asyncio.timeout(5):
        waiting = [await die(store, slow), await die(store, slow)]
        first = await die(store, fast)
        await sweeper.repairer.sweep()
        assert await failed(store, fast, first) == [True]
        second = await die(store, fast)
        await sweeper.repairer.sweep()
        assert await failed(store, fast, second) == [True]
        assert await failed(store, slow, *waiting) == [False, False]
        rendered.set()
        await sweeper.repairer.sweep()
        assert await failed(store, slow, *waiting) == [True, True]
    await sweeper.drain(0)
    await log.close()
    await store.close()
