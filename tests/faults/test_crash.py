"""`kill -9` of real server processes: nothing acknowledged is lost, nothing is stuck."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_chat.stores.events import TERMINAL_TYPES
from tests.support.client import Frame, frames
from tests.support.servers import Process, server_process
from tests.support.thread_view import status

SCRIPT = "say The answer\nopen oven\nhold for ever"


async def until_kept(server: Process, message: str) -> dict[str, Any]:
    """The message once a checkpoint has stored its text and its tool call, read from the database."""
    async with asyncio.timeout(10):
        while not (kept := await server.get(message))["tool_calls"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return dict(kept)


async def resumed(server: Process, thread: str, position: str) -> list[Frame]:
    """What a watcher with an old position gets, up to the first terminal event or snapshot."""
    seen: list[Frame] = []
    async with server.watching(thread, position) as stream:
        async for frame in stream:
            seen.append(frame)
            if frame.event == "thread.snapshot" or frame.event in TERMINAL_TYPES:
                return seen
    return seen


async def begun(server: Process, thread: str, script: str, key: str) -> tuple[str, list[Frame]]:
    """Start a run, read its stream up to the open tool call, and wait for its checkpoint; the run's id."""
    seen: list[Frame] = []
    async with server.posting(thread, script, **{"Idempotency-Key": key}) as posting:
        async for frame in frames(posting):
            seen.append(frame)
            if frame.event == "tool_call.started":
                break
        run = str(seen[-1].data["message_id"])
        await until_kept(server, f"{thread}/messages/{run}")
    return run, seen


async def test_after_a_kill_the_partial_answer_is_interrupted_and_the_thread_usable(
    tmp_path: Path,
) -> None:
    async with server_process(tmp_path) as server:
        thread = await server.scripted_thread()
        run, seen = await begun(server, thread, SCRIPT, "k")
        await server.stop()
        await server.start()

        asked, answer = (await server.get(thread))["messages"]
        assert (asked["content"], answer["id"], answer["content"]) == (SCRIPT, run, "The answer")
        error = answer["metadata"]["run"]["error"]
        assert (status(answer), error["code"], error["retryable"]) == ("failed", "interrupted", False)
        (call,) = answer["tool_calls"]
        assert call["error"]
        assert call["end_time"]
        assert call["result"] is None
        assert await server.get(f"{thread}/messages/{run}") == answer
        assert (await server.http.post(f"{thread}/messages/{run}/cancel")).json() == answer

        for index, frame in enumerate(seen):
            missed = seen[index + 1 :]
            rest_of_it = await resumed(server, thread, frame.id)
            assert [one.raw for one in rest_of_it[: len(missed)]] == [one.raw for one in missed]
            assert (rest_of_it[-1].event, rest_of_it[-1].data["message"]) == ("run.failed", answer)
            async with server.http.stream("POST", f"{thread}/messages", headers={"Last-Event-ID": frame.id}) as rest:
                assert [one.raw async for one in frames(rest)] == [one.raw for one in rest_of_it]
        for position in ("0-1", "nonsense"):
            (snapshot,) = await resumed(server, thread, position)
            assert snapshot.data["thread"]["messages"] == [asked, answer]
            async with server.http.stream("POST", f"{thread}/messages", headers={"Last-Event-ID": position}) as rest:
                assert rest.status_code == 200
                assert [frame.data["thread"]["messages"] async for frame in frames(rest)] == [[asked, answer]]

        following = await server.post(thread, "say next")
        assert (following.status_code, following.json()["content"]) == (201, "next")


async def test_after_a_kill_the_same_key_runs_again_on_the_same_user_message(tmp_path: Path) -> None:
    script, key = "say The answer\nlookup oven\ncount 100 10", {"Idempotency-Key": "k"}
    async with server_process(tmp_path) as server:
        agent = (await server.agent())["id"]
        threads = [await server.thread(agent), await server.thread(agent)]
        runs = [(await begun(server, thread, script, "k"))[0] for thread in threads]
        await server.stop()
        await server.start()
        streamed = asyncio.create_task(server.streamed(threads[0], script, **key))
        answer = await server.post(threads[1], script, **key)
        assert answer.status_code == 201
        assert "idempotency-replayed" not in answer.headers
        ending = (await streamed)[-1]
        assert ending.event == "run.completed"
        for thread, run, again in zip(threads, runs, (ending.data["message"], answer.json()), strict=True):
            asked, interrupted, completed = (await server.get(thread))["messages"]
            assert (interrupted["id"], completed) == (run, again)
            assert (status(interrupted), status(completed)) == ("failed", "completed")
            assert completed["metadata"]["run"]["in_reply_to"] == asked["id"]
            assert completed["content"].startswith("The answer\n\n0 1 2 ")
            replayed = await server.post(thread, script, **key)
            assert (replayed.json(), replayed.headers["idempotency-replayed"]) == (completed, "true")


class Ledger:
    """What the server has acknowledged: it may never be lost again."""

    def __init__(self) -> None:
        self.titles: dict[str, str] = {}
        self.messages: dict[str, dict[str, dict[str, Any]]] = {}
        self.texts: dict[str, str] = {}
        self.kept: dict[str, dict[str, Any]] = {}
        self.interrupted = 0

    def message(self, thread: str, message: dict[str, Any]) -> None:
        self.messages[thread][message["id"]] = message

    def partial(self, now: dict[str, Any]) -> None:
        """The run was interrupted: a prefix of its text is stored, including everything of the checkpoint."""
        said, kept = self.texts.get(now["id"], ""), self.kept.get(now["id"])
        assert said.startswith(now["content"]) or now["content"].startswith(said)
        if kept is not None:
            assert kept["content"].startswith("one ")
            assert now["content"].startswith(kept["content"])
            assert [call["tool_name"] for call in now["tool_calls"]] == ["tool"]
            self.interrupted += 1

    async def holds(self, server: Process) -> None:
        for thread, title in self.titles.items():
            stored = await server.get(thread, message_limit=100)
            assert stored["title"] == title
            kept = {message["id"]: message for message in stored["messages"]}
            for message_id, message in self.messages[thread].items():
                now = kept[message_id]
                if status(message) == "in_progress":
                    assert status(now) in ("completed", "failed")
                    self.partial(now)
                else:
                    assert now == message
            assert not [message for message in kept.values() if status(message) == "in_progress"]


async def talk(server: Process, ledger: Ledger, stop_after: int, dead: asyncio.Event) -> None:
    """Make a thread and talk in it; after that many acknowledgements, have the server killed."""
    acknowledged = 0

    def count() -> None:
        nonlocal acknowledged
        acknowledged += 1
        if acknowledged >= stop_after:
            dead.set()

    thread = await server.thread((await server.agent())["id"], title="new")
    ledger.titles[thread], ledger.messages[thread] = "new", {}
    count()
    for turn in range(3):
        async with server.posting(thread, "say one \nopen tool\nsay two \ncount 20 5") as posting:
            async for frame in frames(posting):
                if message := frame.data.get("message"):
                    ledger.message(thread, message)
                if frame.event == "message.delta":
                    run = frame.data["message_id"]
                    ledger.texts[run] = ledger.texts.get(run, "") + frame.data["text"]
                if frame.event == "tool_call.started":
                    ledger.kept[run] = await until_kept(server, f"{thread}/messages/{run}")
                    count()
                count()
        patched = await server.http.patch(thread, json={"title": f"turn {turn}"})
        ledger.titles[thread] = patched.json()["title"]
        count()
    dead.set()
    await asyncio.Event().wait()


async def test_killed_again_and_again_at_different_points_it_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    ledger = Ledger()
    async with server_process(tmp_path) as server:
        for stop_after in (1, 2, 4, 7, 19, 40):
            dead = asyncio.Event()
            talking = [asyncio.create_task(talk(server, ledger, count, dead)) for count in (stop_after, 2 * stop_after)]
            async with asyncio.timeout(10):
                await dead.wait()
            await server.stop()
            for each in talking:
                each.cancel()
                with pytest.raises((asyncio.CancelledError, httpx.TransportError)):
                    await each
            await server.start()
            await ledger.holds(server)
        assert ledger.interrupted, "a run was cut off behind a checkpoint"
        for thread in ledger.titles:
            assert (await server.post(thread, "say fine")).json()["content"] == "fine"


async def test_a_second_server_on_the_same_data_folder_exits_with_2_and_one_line(tmp_path: Path) -> None:
    async with server_process(tmp_path) as server:
        second = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.support.server_main"),
            env={**os.environ, **server.environment, "PORT": "0"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(20):
            out, err = await second.communicate()
        assert (second.returncode, out) == (2, b"")
        assert err.decode().splitlines() == [f"another server is using the data folder {tmp_path}"]
        await server.thread()
