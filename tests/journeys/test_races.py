"""Races, each forced by holding the parties at the critical point, in every order that matters.

However a race goes, all parties must agree: one terminal event, and the store, the watchers, the one who posted and
the one who waits for JSON hold the same message.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

from agent_chat.agents import Part, Run, Text
from agent_chat.agents.registry import Kind
from agent_chat.server import app
from agent_chat.server.timing import Timing
from tests.support.client import Frame, frames
from tests.support.gates import Race, When, critical, id_of, no_runs
from tests.support.servers import live_server
from tests.support.thread_view import status
from tests.support.viewers import Watcher, watcher

SCRIPT = "say some\nhold end\nsay more"
Form = Literal["json", "sse"]


@pytest.fixture
async def race(tmp_path: Path) -> AsyncIterator[Race]:
    async with critical(tmp_path) as race:
        yield race


class Parties:
    """A run and its readers: the post (SSE), a waiting retry (JSON, the same key), and a watcher."""

    def __init__(self, race: Race, thread: str, watching: Watcher) -> None:
        self.race = race
        self.thread = thread
        self.watching = watching
        self.run = ""
        self.poster: asyncio.Task[list[Frame]]
        self.waiter: asyncio.Task[httpx.Response]

    async def begin(self, script: str) -> None:
        self.poster = asyncio.create_task(self.race.live.streamed(self.thread, script, **{"Idempotency-Key": "party"}))
        started = await self.watching.sees("run.started")
        self.run = started.data["message"]["id"]
        joined = self.race.store.hold("replay", "after")
        self.waiter = asyncio.create_task(self.race.live.post(self.thread, script, **{"Idempotency-Key": "party"}))
        await joined.passed()

    def cancel(self) -> asyncio.Task[httpx.Response]:
        return asyncio.create_task(self.race.live.cancel(self.thread, self.run))

    async def agree(self, wanted: str, content: str) -> dict[str, Any]:
        """Everybody holds this message: its status, its text, and exactly one terminal event."""
        async with asyncio.timeout(10):
            posted, waited = await self.poster, await self.waiter
        await self.race.settled(self.thread, self.watching)
        thread = await self.race.live.get(self.thread)
        stored = next(message for message in thread["messages"] if message["id"] == self.run)
        assert (status(stored), stored["content"]) == (wanted, content)
        (end,) = self.watching.terminals()
        assert end.event == f"run.{wanted}"
        assert end.data["message"] == stored
        assert posted[-1].raw == end.raw
        assert self.watching.view.shows(thread)
        if waited.status_code == 201:
            assert waited.json() == stored
        else:
            assert waited.json()["message_id"] == self.run
        assert await self.race.record(self.run) is None
        return dict(stored)


@asynccontextmanager
async def parties(race: Race, script: str = SCRIPT) -> AsyncIterator[Parties]:
    thread = await race.live.scripted_thread()
    async with watcher(race.live, thread) as watching:
        all_of_them = Parties(race, thread, watching)
        await all_of_them.begin(script)
        yield all_of_them


async def busy_with(answer: httpx.Response) -> str:
    """The run that refused this post."""
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (409, "thread_busy"), problem
    return str(problem["message_id"])


# Cancel against completion


async def test_a_cancel_between_the_last_word_and_the_storing_finds_the_run_completed(race: Race) -> None:
    finishing, flagged = race.store.hold("finish", "before"), race.store.hold("cancel", "after")
    async with parties(race) as run:
        race.live.gates.release("end")
        await finishing.reached()
        cancelling = run.cancel()
        await flagged.passed()
        finishing.release()
        stored = await run.agree("completed", "somemore")
        assert (await cancelling).json() == stored


async def test_a_cancel_between_storing_and_publishing_finds_the_run_completed(race: Race) -> None:
    finishing = race.store.hold("finish", "after")
    async with parties(race) as run:
        race.live.gates.release("end")
        await finishing.reached()
        answer = await run.cancel()
        assert not run.watching.terminals()
        finishing.release()
        assert answer.json() == await run.agree("completed", "somemore")


async def test_a_cancel_between_publishing_and_deleting_the_record_finds_the_run_completed(race: Race) -> None:
    forgetting = race.store.hold("delete_record", "before")
    async with parties(race) as run:
        race.live.gates.release("end")
        await forgetting.reached()
        answer = await run.cancel()
        forgetting.release()
        assert answer.json() == await run.agree("completed", "somemore")


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_run_that_completes_around_the_cancel_flag_stays_completed(race: Race, when: When) -> None:
    flag, forgotten = race.store.hold("cancel", when), race.store.hold("delete_record", "after")
    async with parties(race) as run:
        cancelling = run.cancel()
        await flag.reached()
        race.live.gates.release("end")
        await forgotten.passed()
        flag.release()
        stored = await run.agree("completed", "somemore")
        assert (await cancelling).json() == stored


@pytest.mark.parametrize("first", ["cancel", "agent"])
async def test_of_a_learnt_cancel_and_the_agents_last_word_the_first_counts(race: Race, first: str) -> None:
    learning = race.store.hold("checkpoint", "after")
    async with parties(race) as run:
        cancelling = run.cancel()
        await learning.reached()
        if first == "agent":
            finishing = race.store.hold("finish", "before")
            race.live.gates.release("end")
            await finishing.reached()
            learning.release()
            finishing.release()
            stored = await run.agree("completed", "somemore")
        else:
            learning.release()
            stored = await run.agree("cancelled", "some")
            race.live.gates.release("end")
        assert (await cancelling).json() == stored


async def test_two_concurrent_cancels_both_return_the_stored_message(race: Race) -> None:
    gates = [race.store.hold("cancel", "before"), race.store.hold("cancel", "before")]
    async with parties(race) as run:
        cancelling = [run.cancel(), run.cancel()]
        for gate in gates:
            await gate.reached()
        for gate in gates:
            gate.release()
        stored = await run.agree("cancelled", "some")
        for cancel in cancelling:
            answer = await cancel
            assert (answer.status_code, answer.json()) == (200, stored)


async def test_cancelling_a_finished_run_returns_it_and_publishes_nothing(race: Race) -> None:
    async with parties(race, "say all") as run:
        stored = await run.agree("completed", "all")
        answer = await run.cancel()
        assert (answer.status_code, answer.json()) == (200, stored)
        await run.agree("completed", "all")


# An agent that ignores cancellation


class Stubborn:
    """Whatever cancels it, it talks on until it has had enough."""

    def __init__(self) -> None:
        self.talking = asyncio.Event()
        self.enough = asyncio.Event()

    async def __call__(self, run: Run) -> AsyncIterator[Part]:
        while not self.enough.is_set():
            yield Text("I won't. ")
            self.talking.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch) -> Stubborn:
    """The agent of kind `stubborn`."""
    agent = Stubborn()
    monkeypatch.setitem(app.KINDS, "stubborn", Kind(agent))
    return agent


@pytest.mark.parametrize("finisher", ["owner", "canceller"])
async def test_an_agent_that_ignores_cancellation_is_ended_and_publishes_nothing_more(
    finisher: str, tmp_path: Path, stubborn: Stubborn
) -> None:
    timing = Timing(agent_stop=0.2) if finisher == "owner" else Timing(agent_stop=1.0, cancel=0.2)
    async with critical(tmp_path, timing=timing) as race:
        thread = await race.live.scripted_thread(kind="stubborn")
        async with watcher(race.live, thread) as watching:
            run = await race.live.start_run(thread, "stop it")
            await stubborn.talking.wait()
            answer = await race.live.cancel(thread, run)
            assert (answer.status_code, status(answer.json())) == (200, "cancelled")
            assert (await race.live.post(thread, "again", Prefer="respond-async")).status_code == 202
            stubborn.enough.set()
            await race.settled(thread, watching)
        messages = (await race.live.get(thread))["messages"]
        assert [status(message) for message in messages] == [None, "cancelled", None, "completed"]
        about = [frame for frame in watching.frames if run in (frame.data.get("message_id"), _message_id(frame))]
        assert about[-1].data["message"] == messages[1] == answer.json()
        assert [frame.event for frame in watching.terminals()] == ["run.cancelled", "run.completed"]


def _message_id(frame: Frame) -> object:
    message = frame.data.get("message")
    return message["id"] if isinstance(message, dict) else None


async def test_a_run_that_takes_too_long_fails_with_a_timeout_and_stores_its_text(tmp_path: Path) -> None:
    async with live_server(tmp_path, run_seconds=0.3) as live:
        thread = await live.scripted_thread()
        answer = await live.post(thread, "say slow\nlookup tool\nhold for ever")
        problem = answer.json()
        assert (answer.status_code, problem["code"], problem["retryable"]) == (504, "agent_timeout", True)
        message = await live.get(f"{thread}/messages/{problem['message_id']}")
        assert (status(message), message["content"]) == ("failed", "slow")
        assert message["tool_calls"][0]["error"]
        assert (await live.streamed(thread, "hold for ever"))[-1].data["error"]["code"] == "agent_timeout"
        await no_runs()


# A busy thread


async def test_a_post_to_a_busy_thread_is_refused_with_the_running_message_and_leaves_no_trace(race: Race) -> None:
    async with parties(race) as run:
        assert await busy_with(await race.live.post(run.thread, "say no")) == run.run
        headers = {"Accept": "text/event-stream"}
        assert await busy_with(await race.live.post(run.thread, "say no", **headers)) == run.run
        race.live.gates.release("end")
        await run.agree("completed", "somemore")
        assert len((await race.live.get(run.thread))["messages"]) == 2


async def test_an_interrupting_post_cancels_the_run_and_is_answered(race: Race) -> None:
    async with parties(race) as run:
        answer = await race.live.post(run.thread, "say mine", query="?if_busy=interrupt")
        assert (answer.status_code, answer.json()["content"]) == (201, "mine")
        posted, waited = await run.poster, await run.waiter
        assert posted[-1].event == "run.cancelled"
        assert (waited.status_code, waited.json()) == (201, posted[-1].data["message"])
        await race.settled(run.thread, run.watching)
        assert [frame.event for frame in run.watching.terminals()] == ["run.cancelled", "run.completed"]
        assert run.watching.view.shows(await race.live.get(run.thread))


@pytest.mark.parametrize("winner", ["interrupter", "third"])
async def test_of_an_interrupting_and_a_third_post_one_wins_and_the_other_gets_its_run(race: Race, winner: str) -> None:
    async with parties(race) as run:
        second = race.store.hold("claim", "before", skip=1)
        interrupting = asyncio.create_task(race.live.post(run.thread, "say A\nhold won", query="?if_busy=interrupt"))
        await second.reached()  # the thread is free, and the interrupter about to take it
        third = race.store.hold("claim", "before")
        posting = asyncio.create_task(race.live.post(run.thread, "say B\nhold won"))
        await third.reached()
        first, gate, loser, other = interrupting, second, posting, third
        if winner == "third":
            first, gate, loser, other = posting, third, interrupting, second
        gate.release()
        await race.live.gates.reached("won")
        other.release()
        refused = await loser
        race.live.gates.release("won")
        answer = await first
        assert (answer.status_code, status(answer.json())) == (201, "completed")
        assert await busy_with(refused) == answer.json()["id"]
        assert answer.json()["content"] == ("A" if winner == "interrupter" else "B")
        await race.settled(run.thread, run.watching)
        thread = await race.live.get(run.thread)
        assert len(thread["messages"]) == 4
        assert run.watching.view.shows(thread)


async def test_of_two_interrupting_posts_one_wins_and_the_other_gets_its_run(race: Race) -> None:
    async with parties(race) as run:
        gates = [race.store.hold("claim", "before", skip=2), race.store.hold("claim", "before")]
        interrupting = [
            asyncio.create_task(race.live.post(run.thread, f"say {name}\nhold won", query="?if_busy=interrupt"))
            for name in ("A", "B")
        ]
        for gate in gates:
            await gate.reached()
        for gate in gates:
            gate.release()
        await race.live.gates.reached("won")
        async with asyncio.timeout(10):
            done, _ = await asyncio.wait(interrupting, return_when=asyncio.FIRST_COMPLETED)
        race.live.gates.release("won")
        answers = [await task for task in interrupting]
        refused = done.pop().result()
        (won,) = [answer for answer in answers if answer.status_code == 201]
        assert await busy_with(refused) == won.json()["id"]
        await race.settled(run.thread, run.watching)
        assert run.watching.view.shows(await race.live.get(run.thread))


# A retry with the same key


async def in_form(race: Race, thread: str, script: str, form: Form, key: str) -> tuple[dict[str, Any], bool]:
    """Post with a key, in that form: the assistant's message, and whether it was a replay."""
    headers = {"Idempotency-Key": key}
    if form == "json":
        answer = await race.live.post(thread, script, **headers)
        assert answer.status_code == 201, answer.text
        return answer.json(), "idempotency-replayed" in answer.headers
    headers["Accept"] = "text/event-stream"
    watching = Watcher()
    async with race.live.posting(thread, script, **headers) as response:
        await watching.read(frames(response))
        replayed = "idempotency-replayed" in response.headers
    assert watching.terminals() == watching.frames[-1:]
    message = watching.frames[-1].data["message"]
    assert watching.view.messages[message["id"]] == message
    return message, replayed


@pytest.mark.parametrize("first", ["json", "sse"])
@pytest.mark.parametrize("retry", ["json", "sse"])
@pytest.mark.parametrize("point", ["claimed", "claiming"])
@pytest.mark.slow
async def test_a_retry_between_claim_and_run_start_joins_the_same_run(
    race: Race, first: Form, retry: Form, point: str
) -> None:
    """`claiming`: the first has seen that its key is new, and is overtaken by its retry."""
    thread = await race.live.scripted_thread()
    async with watcher(race.live, thread) as watching:
        claim = race.store.hold("claim", "after" if point == "claimed" else "before")
        posting = asyncio.create_task(in_form(race, thread, "say once\nhold end\nsay only", first, "k"))
        await claim.reached()
        looked = race.store.hold("replay", "after")
        retrying = asyncio.create_task(in_form(race, thread, "say once\nhold end\nsay only", retry, "k"))
        await looked.passed()
        if point == "claiming":
            await race.live.gates.reached("end")
        claim.release()
        await race.live.gates.reached("end")
        race.live.gates.release("end")
        (one, one_replayed), (two, two_replayed) = await posting, await retrying
        assert one == two
        assert (one_replayed, two_replayed) == ((False, True) if point == "claimed" else (True, False))
        await race.settled(thread, watching)
        assert [frame.event for frame in watching.frames].count("run.started") == 1
        assert len(watching.terminals()) == 1
        stored = (await race.live.get(thread))["messages"]
        assert [message["content"] for message in stored] == ["say once\nhold end\nsay only", "onceonly"]
        assert stored[1] == one


# Delete in mid-run


def rows_of(data_dir: Path, thread: str) -> int:
    """How many rows of any table the database has of this thread."""
    db = sqlite3.connect(data_dir / "chat.db")
    try:
        tables = {"threads": "id", "messages": "thread_id", "runs": "thread_id", "idempotency": "thread_id"}
        counts = [
            db.execute(f"SELECT count(*) FROM {table} WHERE {column} = ?", (id_of(thread),)).fetchone()[0]
            for table, column in tables.items()
        ]
        return sum(counts)
    finally:
        db.close()


DELETIONS: dict[str, tuple[str, When, str]] = {
    "claimed": ("claim", "after", "say some"),
    "preparing": ("list_messages", "before", "say some"),
    "checkpointing": ("checkpoint", "before", "say some\nopen tool\nhold for ever"),
    "speaking": ("checkpoint", "after", "say some\nopen tool\nhold for ever"),
    "unstored": ("finish", "before", "say some"),
    "unsaid": ("finish", "after", "say some"),
    "unforgotten": ("delete_record", "before", "say some"),
}


@pytest.mark.parametrize("point", DELETIONS)
@pytest.mark.parametrize("form", ["json", "sse"])
async def test_deleting_a_thread_stops_its_run_notifies_watchers_and_leaves_nothing(
    race: Race, tmp_path: Path, point: str, form: Form
) -> None:
    verb, when, script = DELETIONS[point]
    thread = await race.live.scripted_thread()
    gate = race.store.hold(verb, when)
    headers = {"Idempotency-Key": "k"} | ({"Accept": "text/event-stream"} if form == "sse" else {})
    async with watcher(race.live, thread) as watching:
        posting = asyncio.create_task(race.live.post(thread, script, **headers))
        await gate.reached()
        assert (await race.live.http.delete(thread)).status_code == 204
        gate.release()
        async with asyncio.timeout(10):
            answer = await posting
        await watching.ends()
        await no_runs()
    assert watching.frames[-1].event == "thread.deleted"
    assert race.runner.count == 0
    assert rows_of(tmp_path, thread) == 0
    assert (await race.live.http.get(thread)).status_code == 404
    if point == "unforgotten":
        return
    assert not watching.terminals()
    if form == "json":
        assert (answer.status_code, answer.json()["code"]) == (404, "thread_not_found")
    else:
        assert "event: thread.deleted" in answer.text
        assert "event: run.completed" not in answer.text


async def test_a_watcher_whose_thread_is_deleted_during_its_snapshot_is_notified(race: Race) -> None:
    thread = await race.live.scripted_thread()
    reading = race.store.hold("read", "before", skip=1)
    watching = Watcher()
    async with race.live.watching(thread) as stream:
        follow = asyncio.create_task(watching.read(stream))
        await reading.reached()
        assert (await race.live.http.delete(thread)).status_code == 204
        reading.release()
        await watching.ends()
        await follow
    assert [frame.event for frame in watching.frames] == ["thread.deleted"]


# A writer that dies


@pytest.mark.parametrize("point", [("finish", "after"), ("delete_record", "before")], ids=["unsaid", "unforgotten"])
async def test_the_sweeper_publishes_once_what_a_dead_writer_stored_and_deletes_the_record(
    tmp_path: Path, point: tuple[str, When]
) -> None:
    """The terminal event is stored before it is published (I21), so another process can publish it."""
    async with critical(tmp_path, lease=0.5, timing=Timing(sweep=0.1)) as race:
        death = race.store.hold(*point)
        forgotten = race.store.hold("delete_record", "after")
        async with parties(race) as run:
            race.live.gates.release("end")
            await death.reached()
            death.kill()
            await forgotten.passed()
            await run.agree("completed", "somemore")
            await race.runner.repairer.sweep()
            await run.agree("completed", "somemore")


async def test_a_restarted_server_publishes_once_what_a_dead_writer_stored_and_deletes_the_record(
    tmp_path: Path,
) -> None:
    async with critical(tmp_path) as race:
        death = race.store.hold("finish", "after")
        thread = await race.live.scripted_thread()
        start = await race.embedded_log.tail(id_of(thread))
        run = await race.live.start_run(thread, "say all")
        await death.reached()
        death.kill()
        await no_runs()
        assert await race.record(run)
    async with critical(tmp_path) as race:
        stored = await race.live.get(f"{thread}/messages/{run}")
        assert status(stored) == "completed"
        async with watcher(race.live, thread, after=start) as watching:
            await race.settled(thread, watching)
            assert [frame.data["message"] for frame in watching.terminals()] == [stored]
            await race.runner.repairer.sweep()
            await race.settled(thread, watching)
            assert len(watching.terminals()) == 1
        assert await race.record(run) is None


@pytest.mark.parametrize("key", ["k", "another"], ids=["its own retry", "another post"])
async def test_the_next_post_ends_the_run_of_a_dead_writer_and_continues(tmp_path: Path, key: str) -> None:
    async with critical(tmp_path, lease=0.0) as race:
        thread = await race.live.scripted_thread()
        death = race.store.hold("finish", "before")
        run = await race.live.start_run(thread, "say all", **{"Idempotency-Key": "k"})
        await death.reached()
        death.kill()
        await no_runs()
        answer = await race.live.post(thread, "say all", **{"Idempotency-Key": key})
        assert (answer.status_code, answer.json()["content"]) == (201, "all")
        messages = (await race.live.get(thread))["messages"]
        kept = next(message for message in messages if message["id"] == run)
        assert (status(kept), kept["content"]) == ("failed", "all")
        assert len(messages) == (3 if key == "k" else 4)


# Two finishers: the owner, and another process that repairs


async def test_a_repair_that_is_first_ends_the_run_and_its_owner_publishes_nothing(race: Race) -> None:
    owner = race.store.hold("finish", "before")
    async with parties(race) as run:
        race.live.gates.release("end")
        await owner.reached()
        record = await race.record(run.run)
        assert record
        await race.other_process().repairer.repair(record)
        owner.release()
        stored = await run.agree("failed", "somemore")
        assert stored["metadata"]["run"]["error"]["code"] == "interrupted"


async def test_a_repair_that_is_overtaken_by_the_owner_publishes_nothing(race: Race) -> None:
    repairer = race.store.hold("finish", "before")
    async with parties(race) as run:
        record = await race.record(run.run)
        assert record
        repairing = asyncio.create_task(race.other_process().repairer.repair(record))
        await repairer.reached()
        forgotten = race.store.hold("delete_record", "after")
        race.live.gates.release("end")
        await forgotten.passed()
        repairer.release()
        await repairing
        await run.agree("completed", "somemore")


async def test_a_repair_between_the_owners_storing_and_publishing_publishes_nothing(race: Race) -> None:
    owner = race.store.hold("finish", "after")
    async with parties(race) as run:
        record = await race.record(run.run)
        assert record
        race.live.gates.release("end")
        await owner.reached()
        await race.other_process().repairer.repair(record)
        owner.release()
        await run.agree("completed", "somemore")


async def test_of_two_repairs_one_publishes_the_terminal_event(race: Race) -> None:
    async with parties(race) as run:
        record = await race.record(run.run)
        assert record
        gates = [race.store.hold("finish", "before"), race.store.hold("finish", "before")]
        repairing = [asyncio.create_task(race.other_process().repairer.repair(record)) for _ in gates]
        for gate in gates:
            await gate.reached()
        for gate in gates:
            gate.release()
        for repair in repairing:
            await repair
        await race.log.signal(run.run)
        stored = await run.agree("failed", "some")
        assert stored["metadata"]["run"]["error"]["code"] == "interrupted"


# A server that stops


async def test_a_claim_in_progress_when_the_server_stops_is_stored_as_interrupted(race: Race) -> None:
    thread = await race.live.scripted_thread()
    claim = race.store.hold("claim", "after")
    posting = asyncio.create_task(race.live.post(thread, "hold for ever"))
    await claim.reached()
    await race.live.app.state.drain()
    claim.release()
    async with asyncio.timeout(4):
        answer = await posting
    assert (answer.status_code, answer.json()["code"]) == (503, "interrupted")
    await no_runs()


async def test_a_stream_that_opens_while_the_server_stops_is_closed_immediately(race: Race) -> None:
    thread = await race.live.scripted_thread()
    position = await race.embedded_log.tail(id_of(thread))
    await race.live.app.state.drain()
    async with asyncio.timeout(4):
        answer = await race.live.http.get(f"{thread}/events", headers={"Last-Event-ID": position})
    assert answer.text == "retry: 1000\n\n"
    assert len(race.streams) == 0
