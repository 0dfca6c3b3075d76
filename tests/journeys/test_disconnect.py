"""Clients that disconnect, reconnect or stop reading: the run continues, and every reader receives all of it."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal, cast

import httpx
import pytest

from agent_chat.stores.embedded import thread_log
from agent_chat.stores.events import TERMINAL_TYPES
from tests.support.client import KEY, Client, Frame, frames, parse
from tests.support.gates import Race, all_left, critical, eventually, no_runs
from tests.support.thread_view import View, status
from tests.support.viewers import watcher

Door = Literal["post", "watch"]

_END = re.compile(rb"^event: run\.(completed|failed|cancelled)\n.*\n.*\n\n", re.MULTILINE)


@pytest.fixture
async def race(tmp_path: Path) -> AsyncIterator[Race]:
    async with critical(tmp_path) as race:
        yield race


def cut(sock: socket.socket) -> None:
    """Make the next close send an RST, as when a machine fails."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def socket_of(response: httpx.Response) -> socket.socket:
    return cast(socket.socket, response.extensions["network_stream"].get_extra_info("socket"))


def complete(data: bytes) -> list[Frame]:
    """The frames that have come whole."""
    return [parse(raw + b"\n\n") for raw in data.split(b"\n\n")[:-1]]


async def piece(client: Client, method: str, path: str, limit: int, after: str | None, body: Any = None) -> list[Frame]:
    """Read that many bytes of an event stream, or to a run's end, then cut it hard; the frames among them."""
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
    data = b""
    async with client.http.stream(method, path, headers=headers, json=body) as response, asyncio.timeout(10):
        assert response.status_code == 200
        async for part in response.aiter_raw():
            data += part
            if len(data) >= limit or _END.search(data):
                cut(socket_of(response))
                break
    return complete(data[:limit])


def door(thread: str, by: Door) -> tuple[str, str]:
    """The request with which a client resumes: its post, or watching the thread."""
    return ("POST", f"{thread}/messages") if by == "post" else ("GET", f"{thread}/events")


def text_of(stream: list[Frame]) -> str:
    """The text that the deltas make, each character exactly once."""
    text = ""
    for frame in stream:
        if frame.event == "message.delta":
            assert frame.data["offset"] == len(text)
            text += frame.data["text"]
    return text


def of_run(seen: list[Frame]) -> list[bytes]:
    """The bytes of one post's stream among everything that a watcher saw."""
    events = [frame.event for frame in seen]
    end = next(index for index, event in enumerate(events) if event in TERMINAL_TYPES)
    return [frame.raw for frame in seen[events.index("message.created") : end + 1]]


@pytest.mark.parametrize("back", ["during", "after"])
@pytest.mark.parametrize("by", ["post", "watch"])
async def test_a_client_whose_post_was_cut_off_resumes_and_has_every_character_once(
    race: Race, by: Door, back: str
) -> None:
    thread = await race.live.scripted_thread()
    script = {"content": "say # 🎈\ncount 100\nhold here\ncount 100\nsay é"}
    async with watcher(race.live, thread) as watching:
        first = await piece(race.live, "POST", f"{thread}/messages", 6000, None, script)
        assert first[0].event == "message.created"
        await race.live.gates.reached("here")
        await eventually(lambda: len(race.streams) == 1)
        assert race.runner.count == 1
        if back == "after":
            race.live.gates.release("here")
            await no_runs()
        method, path = door(thread, by)
        headers = {"Accept": "text/event-stream", "Last-Event-ID": first[-1].id}
        rest: list[Frame] = []
        async with race.live.http.stream(method, path, headers=headers) as response:
            race.live.gates.release("here")
            async for frame in frames(response):
                rest.append(frame)
                if frame.event in TERMINAL_TYPES:
                    break
        await race.settled(thread, watching)
    stored = (await race.live.get(thread))["messages"][-1]
    assert rest[-1].data["message"] == stored
    assert text_of(first + rest) == stored["content"]
    assert [frame.raw for frame in first + rest] == of_run(watching.frames)
    await all_left(race, thread)


def as_bytes(thread: str, body: object, headers: dict[str, str], claimed: int = 0) -> bytes:
    """A POST as it goes over the wire; `claimed` more bytes are announced than come."""
    content = json.dumps(body).encode()
    fields = {
        "Host": "test",
        "Authorization": f"Bearer {KEY}",
        "Content-Type": "application/json",
        "Content-Length": str(len(content) + claimed),
        **headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {thread}/messages HTTP/1.1\r\n{head}\r\n".encode() + content


async def connected(race: Race) -> asyncio.StreamWriter:
    url = httpx.URL(race.live.url)
    _, writer = await asyncio.open_connection(url.host, url.port)
    return writer


def abort(writer: asyncio.StreamWriter) -> None:
    cut(writer.get_extra_info("socket"))
    writer.transport.abort()


async def test_a_client_that_was_cut_off_while_it_waited_for_json_finds_the_answer_stored(race: Race) -> None:
    thread = await race.live.scripted_thread()
    script = "say all\nhold here\nsay of it"
    writer = await connected(race)
    writer.write(as_bytes(thread, {"content": script}, {"Idempotency-Key": "k"}))
    await race.live.gates.reached("here")
    abort(writer)
    retrying = asyncio.create_task(race.live.post(thread, script, **{"Idempotency-Key": "k"}))
    race.live.gates.release("here")
    answer = await retrying
    assert (answer.status_code, answer.headers["idempotency-replayed"]) == (201, "true")
    asked, stored = (await race.live.get(thread))["messages"]
    assert (asked["content"], stored) == (script, answer.json())
    assert (status(stored), stored["content"]) == ("completed", "allof it")
    await all_left(race, thread)


async def test_a_client_that_is_cut_off_inside_its_own_post_has_posted_nothing(
    race: Race, caplog: pytest.LogCaptureFixture
) -> None:
    thread = await race.live.scripted_thread()
    before = {task for task in asyncio.all_tasks() if "RequestResponseCycle" in repr(task)}
    writer = await connected(race)
    writer.write(as_bytes(thread, {"content": "say never"}, {}, claimed=100))

    def requests() -> set[asyncio.Task[Any]]:
        return {task for task in asyncio.all_tasks() if "RequestResponseCycle" in repr(task)} - before

    await eventually(lambda: bool(requests()))
    abort(writer)
    await eventually(lambda: not requests())
    assert (await race.live.get(thread))["messages"] == []
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    await all_left(race, thread)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
async def test_a_stream_cut_at_random_bytes_again_and_again_still_comes_whole(race: Race, seed: int) -> None:
    rng = random.Random(seed)
    thread = await race.live.scripted_thread(mcp_servers=["demo"])
    script = 'say 🎈\ncount 100 1\ntool calculate {"expression": "6*7"}\ncount 60 1'
    async with watcher(race.live, thread) as watching:
        seen: list[Frame] = []
        method, path, body = "POST", f"{thread}/messages", {"content": script}
        while not seen or seen[-1].event not in TERMINAL_TYPES:
            after = seen[-1].id if seen else None
            limit = rng.randrange(300, 6000) if seen else rng.randrange(3000, 6000)
            seen += await piece(race.live, method, path, limit, after, None if seen else body)
            method, path = door(thread, rng.choice(["post", "watch"]))
        await race.settled(thread, watching)
    stored = (await race.live.get(thread))["messages"][-1]
    assert seen[-1].data["message"] == stored
    assert text_of(seen) == stored["content"]
    assert [frame.raw for frame in seen] == of_run(watching.frames)
    await all_left(race, thread)


class SlowClient(Client):
    """A client with little room in its socket: once it stops reading, the server's writes soon stop too."""

    def __init__(self, url: str) -> None:
        super().__init__(url, KEY)
        headers, small = self.http.headers, [(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)]
        transport = httpx.AsyncHTTPTransport(socket_options=small)
        self.http = httpx.AsyncClient(base_url=url, headers=headers, timeout=30, transport=transport)


@pytest.mark.parametrize("kept", [10_000, 500], ids=["from the log", "by a snapshot once the log is trimmed"])
@pytest.mark.slow
async def test_a_reader_that_stops_delays_no_one_and_catches_up_exactly(
    race: Race, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_log, "RETAINED_EVENTS", kept)
    thread = await race.live.scripted_thread()
    slow = SlowClient(race.live.url)
    async with watcher(race.live, thread) as watching, slow.posting(thread, "hold here\ncount 3000") as posting:
        stream = frames(posting)
        seen = [await anext(stream), await anext(stream)]
        race.live.gates.release("here")
        await no_runs()
        end = await watching.sees("run.completed")
        stored = (await race.live.get(thread))["messages"][-1]
        assert end.data["message"] == stored
        assert (await race.live.post(thread, "say meanwhile")).json()["content"] == "meanwhile"
        buffer = race.buffer(thread)
        assert [cursor for cursor in buffer.cursors if cursor.position != buffer.entries[-1].position]
        socket_of(posting).setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        seen += [frame async for frame in stream]
    await slow.http.aclose()
    if kept == 10_000:
        assert [frame.raw for frame in seen] == of_run(watching.frames)
        assert text_of(seen) == stored["content"]
    else:
        assert [frame.event for frame in seen[-2:]] == ["thread.snapshot", "run.completed"]
    view = View()
    for frame in seen:
        view.apply(frame)
    assert view.messages[stored["id"]] == stored
    await all_left(race, thread)


async def visit(race: Race, thread: str, run: str, rng: random.Random) -> View:
    """Connect, disconnect at random, and reconnect with or without the last position, until the run has ended."""
    view = View()
    position: str | None = None

    def over() -> bool:
        return run in view.messages and status(view.messages[run]) != "in_progress"

    while not over():
        headers = {"Last-Event-ID": position} if position else {}
        async with race.live.http.stream("GET", f"{thread}/events", headers=headers) as response:
            count = rng.randrange(1, 120)
            async for frame in frames(response):
                view.apply(frame)
                position, count = frame.id, count - 1
                if over() or not count:
                    break
            if rng.random() < 0.5:
                cut(socket_of(response))
        if rng.random() < 0.2:
            position = None
    return view


@pytest.mark.slow
async def test_viewers_that_reconnect_at_random_all_end_with_the_stored_thread(race: Race) -> None:
    thread = await race.live.scripted_thread(mcp_servers=["demo"])
    rng = random.Random(50)
    run = await race.live.start_run(thread, 'count 120 2\ntool calculate {"expression": "6*7"}\ncount 120 2\nsay 🎈')
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        visits = [group.create_task(visit(race, thread, run, random.Random(rng.random()))) for _ in range(25)]
    stored = await race.live.get(thread)
    for each in visits:
        assert each.result().shows(stored)
        assert each.result().ends[run] <= 1
    await all_left(race, thread)
