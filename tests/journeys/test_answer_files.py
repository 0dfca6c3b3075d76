"""Files that an agent yields: stored first, then shown in the answer, in every form of it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from agent_chat.agents import File, Kind, Part, Reply, Run, Text, ToolCompleted, ToolStarted
from agent_chat.server.limits import Limits
from agent_chat.server.runs.repair import _longer
from agent_chat.stores.events import RunStarted, decode
from agent_chat.stores.fold import fold
from agent_chat.stores.models import Attachment, ToolCall, new_answer
from tests.support.client import frames
from tests.support.servers import Live, live_server, server_process

REPORT = "name,count\nä,1\n".encode()


async def report(run: Run) -> AsyncIterator[Part]:
    yield Text("Here is ")
    yield File("../reports/july.csv", "text/csv", REPORT)
    yield Text("your report.")
    yield ToolStarted("1", "count", {})
    yield ToolCompleted("1", {"rows": 1})


async def thread_of(live: Live, **fields: object) -> str:
    return await live.thread((await live.agent(kind="reporter", **fields))["id"])


def kinds(reply: Reply) -> dict[str, Kind]:
    return {"reporter": Kind(reply)}


async def test_a_file_is_an_attachment_of_the_answer_and_can_be_downloaded(tmp_path: Path) -> None:
    async with live_server(tmp_path, kinds=kinds(report)) as live:
        thread = await thread_of(live)
        events = await live.streamed(thread, "Report!")
        answer = events[-1].data["message"]
    (attachment,) = answer["attachments"]
    assert attachment["filename"] == "july.csv"
    assert (attachment["status"], attachment["text_chars"]) == ("ready", len(REPORT.decode()))
    assert attachment["sha256"] == hashlib.sha256(REPORT).hexdigest()
    (snapshot,) = [frame.data["message"] for frame in events if frame.event == "message.snapshot"]
    assert (snapshot["content"], snapshot["attachments"]) == ("Here is ", [attachment])
    async with live_server(tmp_path, kinds=kinds(report)) as live:
        assert (await live.get(thread))["messages"][-1] == answer
        downloaded = await live.http.get(f"{thread}/attachments/{attachment['id']}")
    assert downloaded.content == REPORT


async def test_the_folded_events_have_the_file(tmp_path: Path) -> None:
    async with live_server(tmp_path, kinds=kinds(report)) as live:
        events = await live.streamed(await thread_of(live), "Report!")
    started, *happened = [decode(frame.raw.split(b"\n")[1].removeprefix(b"data: ")) for frame in events[1:-1]]
    assert isinstance(started, RunStarted)
    folded = msgspec.to_builtins(fold(happened, onto=started.message))
    for field in ("content", "tool_calls", "attachments"):
        assert folded[field] == events[-1].data["message"][field], field


async def test_a_run_whose_file_finds_no_room_fails_and_its_text_is_stored(tmp_path: Path) -> None:
    async def big(run: Run) -> AsyncIterator[Part]:
        yield Text("It is big.")
        yield File("big.txt", "text/plain", b"x" * 200_000)
        yield Text("Never.")

    async with live_server(tmp_path, kinds=kinds(big), limits=Limits(stored_bytes=100_000)) as live:
        thread = await thread_of(live)
        failed = await live.post(thread, "Go.")
        (answer,) = (await live.get(thread, message_limit=1))["messages"]
    assert (failed.status_code, failed.json()["code"]) == (507, "storage_full")
    assert (answer["content"], answer["attachments"]) == ("It is big.", [])


async def test_an_answer_has_at_most_ten_files(tmp_path: Path) -> None:
    async def many(run: Run) -> AsyncIterator[Part]:
        for number in range(11):
            yield File(f"{number}.txt", "text/plain", b"text")

    async with live_server(tmp_path, kinds=kinds(many)) as live:
        thread = await thread_of(live)
        failed = await live.post(thread, "Go.")
        (answer,) = (await live.get(thread, message_limit=1))["messages"]
    assert failed.json()["detail"] == "An answer may have at most 10 files."
    assert [attachment["filename"] for attachment in answer["attachments"]] == [f"{n}.txt" for n in range(10)]


def test_a_repaired_answer_has_the_files_of_its_checkpoint_and_of_its_log() -> None:
    empty = new_answer("thread", "question", None, "2026-01-31T12:00:00.000Z")
    file = Attachment("file", "a.txt", "text/plain", 1, "", "ready", 1, False, None, "")
    with_file = msgspec.structs.replace(empty, attachments=[file])
    longer = msgspec.structs.replace(empty, content="text", tool_calls=[ToolCall("look", {})])
    for checkpoint, logged in ((with_file, longer), (longer, with_file)):
        repaired = _longer(checkpoint, logged)
        assert (repaired.content, repaired.attachments) == ("text", [file])


async def test_after_a_kill_the_interrupted_answer_has_its_file(tmp_path: Path) -> None:
    async with server_process(tmp_path) as server:
        thread = await server.scripted_thread()
        async with server.posting(thread, "say Here is\nfile a.txt herons\nhold for ever") as posting:
            stream = frames(posting)
            while (frame := await anext(stream)).event != "message.snapshot":
                pass
            message = f"{thread}/messages/{frame.data['message']['id']}"
            async with asyncio.timeout(10):
                while not (await server.get(message))["attachments"]:  # noqa: ASYNC110 (only the store can tell)
                    await asyncio.sleep(0.01)
        await server.stop()
        await server.start()
        answer = (await server.get(thread))["messages"][-1]
        (attachment,) = answer["attachments"]
        downloaded = await server.http.get(f"{thread}/attachments/{attachment['id']}")
    assert (answer["content"], answer["metadata"]["run"]["status"]) == ("Here is", "failed")
    assert downloaded.content == b"herons"
