"""Redis under faults: every reader ends with what the writer wrote, whatever breaks between them.

With the stream intact nothing is missed, doubled or out of order, and no reader sees a Gap. With the stream lost a
reader gets a Gap, takes a snapshot as a viewer does, and ends with the same message.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from agent_chat.server.reading.queries import find_turn, is_in_run, read_run_events
from agent_chat.stores.buffer import Entry
from agent_chat.stores.errors import Gap, LogDeleted, LogUnavailable
from agent_chat.stores.events import (
    Event,
    MessageCreated,
    MessageDelta,
    MessageSnapshot,
    ReasoningDelta,
    RunCompleted,
    RunStarted,
    ThreadDeleted,
    ThreadUpdated,
    ToolCallProgress,
    decode,
)
from agent_chat.stores.fold import Fold, fold
from agent_chat.stores.models import Message, new_id
from agent_chat.stores.redis.log import RedisLog, open_redis_log
from agent_chat.stores.redis.timing import RedisTiming
from tests.support.flaky_log import FlakyLog
from tests.support.proxy import LossyProxy
from tests.support.samples import new_principal, new_thread, publish, rest, turn
from tests.support.services import RedisServer, redis_process

SEEDS = range(int(os.environ.get("CHAT_TEST_FAULT_SEEDS", "1")))
"""One seed on uvloop takes about 15 seconds; more of them run on both loops."""

SETTLE_SECONDS = 15


@pytest.fixture(scope="module", params=["uvloop", "asyncio"] if len(SEEDS) > 1 else ["uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_process() as running:
        yield running


OpenLog = Callable[..., Awaitable[RedisLog]]
"""Open a log, with a RedisTiming if others than the default times are needed."""


@pytest.fixture
async def open_log(server: RedisServer) -> AsyncIterator[OpenLog]:
    """Opens logs, which are closed after the test, whether it passes or fails."""
    async with contextlib.AsyncExitStack() as stack:

        async def opened(timing: RedisTiming = RedisTiming()) -> RedisLog:
            log = await open_redis_log(server.url, timing=timing)
            stack.push_async_callback(log.close)
            return log

        yield opened


@pytest.fixture
async def no_task_left() -> AsyncIterator[None]:
    yield
    names = [task.get_name() for task in asyncio.all_tasks() if not task.done()]
    assert [name for name in names if name.startswith(("log ", "fill "))] == []


pytestmark = pytest.mark.usefixtures("no_task_left")  # before `open_log`: it looks after the logs are closed


class Speaker:
    """A run that writes text, reasoning and progress; `stored` is its last checkpoint."""

    def __init__(self, log: RedisLog, thread_id: str, chance: random.Random) -> None:
        self.question, answer = turn(thread_id)
        self.id = answer.id
        self.stored = answer
        self._chance = chance
        self._fold = Fold(answer)
        self._progress = 0
        self._reasoned = 0
        self._writer = log.writer(thread_id, lambda: MessageSnapshot(self._fold.message()))
        self._say(MessageCreated(self.question))
        self._say(RunStarted(answer))

    def _say(self, event: Event) -> None:
        self._fold.apply(event)
        self._writer.write(event)

    def speak(self) -> None:
        kind = self._chance.random()
        if kind < 0.7:
            self._say(MessageDelta(self.id, self._fold.length, self._chance.choice(["wörd ", "😀", "a\r\n", "x" * 50])))
        elif kind < 0.85:
            self._say(ReasoningDelta(self.id, 0, 0, self._reasoned, "hm"))
            self._reasoned += 2
        else:
            self._say(ToolCallProgress(self.id, "call_0", 0, self._progress, None, None))
            self._progress += 1
        if self._chance.random() < 0.05:
            self.stored = self._fold.message()

    async def end(self) -> Message:
        self.stored = self._fold.message().with_run(status="completed")
        self._say(RunCompleted(self.stored))
        await self._writer.flush()
        return self.stored


class Listener:
    """A viewer of one run, as strict as can be: it notes every repetition and every hole, behind a Gap too.

    What is not kept, reasoning and progress, may begin anywhere behind a Gap, and goes on without a hole from there;
    only there may one message.snapshot stand. It reads as `web_demo/client.js` does: a Gap is met with position, store,
    the run's events up to the position.
    """

    def __init__(self, log: RedisLog, thread_id: str, speaker: Speaker, start: str, chance: random.Random) -> None:
        self.log = log
        self.gaps = 0
        self.wrong: list[str] = []
        self.text = ""
        self.told: Message | None = None
        self._thread_id = thread_id
        self._speaker = speaker
        self._chance = chance
        self._cursor = log.cursor(thread_id, start)
        self._fold = Fold(speaker.stored)
        self._positions: set[str] = set()
        self._reasoned: int | None = 0
        self._progress: int | None = 0
        self._snapshots_due = 0

    async def listen(self) -> None:
        while self.told is None:
            try:
                for entry in await self._cursor.next():
                    self._take(entry)
                if self._chance.random() < 0.1:
                    position = self._cursor.position
                    self._cursor.close()
                    self._cursor = self.log.cursor(self._thread_id, position)
            except LogUnavailable:
                await asyncio.sleep(0.01)
            except Gap:
                self.gaps += 1
                self._snapshots_due = 1
                self._reasoned = self._progress = None
                await self._snapshot()
        self._cursor.close()
        self.text = self._fold.message().content

    async def _snapshot(self) -> None:
        while True:
            self._cursor.close()
            try:
                position = await self.log.tail(self._thread_id)
                self._cursor = self.log.cursor(self._thread_id, position)
                stored = self._speaker.stored
                if not stored.in_progress:
                    self._fold = Fold(stored)
                    self.told = stored
                    return
                self._fold = Fold(fold(await read_run_events(self.log, self._thread_id, stored.id, position), stored))
                return
            except (Gap, LogUnavailable):
                await asyncio.sleep(0.01)

    def _take(self, entry: Entry) -> None:
        if entry.position in self._positions:
            self.wrong.append(f"{entry.position} came twice")
        self._positions.add(entry.position)
        event = decode(entry.data)
        match event:
            case MessageDelta(message_id=self._speaker.id, offset=offset):
                self._check("delta", offset, self._fold.length)
                self._fold.apply(event)
            case ReasoningDelta(message_id=self._speaker.id, offset=offset, text=text):
                self._check("reasoning", offset, self._reasoned)
                self._reasoned = offset + len(text)
            case ToolCallProgress(message_id=self._speaker.id, progress=progress):
                self._check("progress", int(progress), self._progress)
                self._progress = int(progress) + 1
            case MessageSnapshot(message=message) if message.id == self._speaker.id:
                self._check("message.snapshot", 1, self._snapshots_due)
                self._snapshots_due = 0
                self._reasoned = self._progress = None
                self._fold.apply(event)
            case RunCompleted(message=message) if message.id == self._speaker.id:
                self.told = message

    def _check(self, what: str, is_at: int, belongs_at: int | None) -> None:
        if belongs_at is not None and is_at != belongs_at:
            self.wrong.append(f"{what} at {is_at} in place of {belongs_at}")


async def until(server: RedisServer, fits: Callable[[bytes], bool], *command: str) -> None:
    """Ask Redis again and again until it answers that."""
    while not fits(await asyncio.to_thread(server.command, *command)):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


Fault = Callable[[], Awaitable[None]]


async def ordeal(
    logs: list[RedisLog],
    chance: random.Random,
    fault: Fault,
    calm: Callable[[], None] | None = None,
    *,
    runs: int = 4,
    seconds: float = 1.0,
) -> list[Listener]:
    """Runs on these processes, two to a thread, read on all of them, while `fault` is called again and again.

    `calm` is called behind the last fault; then everybody has SETTLE_SECONDS to catch up.
    """
    threads = [new_id() for _ in range(runs // 2)]
    starts = {thread_id: await logs[0].tail(thread_id) for thread_id in threads}
    speakers: list[tuple[str, Speaker]] = []
    listeners: list[Listener] = []
    finals: dict[str, Message] = {}
    for n in range(runs):
        thread_id = threads[n % len(threads)]
        speaker = Speaker(logs[n % len(logs)], thread_id, chance)
        speakers.append((thread_id, speaker))
        listeners += [Listener(log, thread_id, speaker, starts[thread_id], chance) for log in logs]

    async def speak(speaker: Speaker) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(chance.randrange(1, 20)):
                speaker.speak()
            await asyncio.sleep(chance.random() * 0.02)
        finals[speaker.id] = await speaker.end()

    async def break_things() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await asyncio.sleep(chance.random() * 0.2)
            await fault()
        if calm:
            calm()

    async with asyncio.timeout(SETTLE_SECONDS), asyncio.TaskGroup() as group:
        group.create_task(break_things())
        for _, speaker in speakers:
            group.create_task(speak(speaker))
        for listener in listeners:
            group.create_task(listener.listen())
    for listener in listeners:
        assert listener.wrong == []
        assert listener.told is not None
        assert listener.told == finals[listener.told.id]
        assert listener.text == listener.told.content, "put together without the terminal event"
    return listeners


def exact(listeners: list[Listener]) -> bool:
    """Whether no reader got a Gap; then each had every event once and in order."""
    return all(listener.gaps == 0 for listener in listeners)


# the stream stays


@pytest.mark.parametrize("seed", SEEDS)
async def test_connections_cut_before_and_behind_every_append_lose_and_double_nothing(
    server: RedisServer, seed: int
) -> None:
    chance = random.Random(seed)
    async with LossyProxy(server.port, chance) as proxy:
        logs = [await open_redis_log(proxy.url) for _ in range(2)]

        async def fault() -> None:
            proxy.chance = chance.choice([0.0, 0.02, 0.2])
            if chance.random() < 0.3:
                proxy.cut_all()

        def calm() -> None:
            proxy.chance = 0.0

        try:
            listeners = await ordeal(logs, chance, fault, calm)
        finally:
            proxy.chance = 0.0
            for log in logs:
                await log.close()
    assert exact(listeners)
    assert proxy.cuts > 3


@pytest.mark.parametrize("kind", ["normal", "pubsub"])
async def test_killed_clients_lose_and_double_nothing(server: RedisServer, kind: str) -> None:
    logs = [await open_redis_log(server.url) for _ in range(2)]
    kills: list[int] = []

    def killed(answer: bytes) -> bool:
        kills.append(int(answer.removeprefix(b":")))
        return kills[-1] > 0

    async def fault() -> None:
        """Kill a client as soon as there is one: after the last event there may be no connection."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await until(server, killed, "CLIENT", "KILL", "TYPE", kind)

    try:
        assert exact(await ordeal(logs, random.Random(kind), fault))
    finally:
        for log in logs:
            await log.close()
    assert sum(kills) > 2


@pytest.mark.parametrize("seed", SEEDS)
async def test_messages_dropped_doubled_and_late_lose_and_double_nothing(server: RedisServer, seed: int) -> None:
    chance = random.Random(seed)
    logs = [FlakyLog(server.url, prefix="chat", random=chance, timing=RedisTiming(refill=1.0)) for _ in range(2)]

    async def fault() -> None:
        for log in logs:
            log.chance = chance.choice([0.05, 0.5, 1.0])

    try:
        assert exact(await ordeal(list[RedisLog](logs), chance, fault))
    finally:
        for log in logs:
            await log.close()
    assert all(log.dropped and log.doubled and log.held for log in logs)


async def test_a_redis_that_hangs_for_a_while_loses_and_doubles_nothing(server: RedisServer) -> None:
    logs = [await open_redis_log(server.url) for _ in range(2)]

    async def fault() -> None:
        server.pause()
        await asyncio.sleep(0.6)
        server.resume()

    try:
        assert exact(await ordeal(logs, random.Random(1), fault))
    finally:
        for log in logs:
            await log.close()


async def test_an_append_whose_answer_was_lost_appears_once(server: RedisServer) -> None:
    async with LossyProxy(server.port, random.Random(0)) as proxy:
        log = await open_redis_log(proxy.url)
        thread_id = new_id()
        start = await log.tail(thread_id)
        events: list[Event] = [ToolCallProgress("m", "call_0", 0, n, None, None) for n in range(5)]
        writer = log.writer(thread_id)
        for event in events:
            proxy.swallow_responses = 1
            writer.write(event)
            await writer.flush()
        assert [decode(entry.data) for entry in await rest(log, thread_id, start)] == events
        proxy.swallow_responses = 1
        await publish(log, thread_id, ThreadDeleted(thread_id))
        with pytest.raises(LogDeleted):
            await publish(log, thread_id, events[0])
        assert proxy.cuts >= 6
        await log.close()


async def test_a_first_append_whose_answer_was_lost_appears_once(server: RedisServer) -> None:
    async with LossyProxy(server.port, random.Random(0)) as proxy:
        log = await open_redis_log(proxy.url)
        for thread_id in [new_id() for _ in range(5)]:
            proxy.swallow_responses = 1
            await publish(log, thread_id, ToolCallProgress("m", "call_0", 0, 0, None, None))
            assert await asyncio.to_thread(server.command, "XLEN", f"chat:{thread_id}") == b":2\r\n"
        await log.close()


# the stream is lost


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("how", ["flushall", "restart"])
async def test_readers_of_a_lost_stream_end_with_the_same_message(server: RedisServer, how: str, seed: int) -> None:
    chance = random.Random(seed)
    logs = [await open_redis_log(server.url) for _ in range(2)]
    faults = 0

    async def fault() -> None:
        """The first fault always happens, while all readers are active."""
        nonlocal faults
        if faults == 0 or chance.random() < 0.5:
            faults += 1
            if how == "flushall":
                await asyncio.to_thread(server.command, "FLUSHALL")
            else:
                server.stop()
                await asyncio.sleep(chance.random() * 0.4)
                await asyncio.to_thread(server.start)

    try:
        listeners = await ordeal(logs, chance, fault)
    finally:
        for log in logs:
            await log.close()
    assert all(listener.gaps for listener in listeners)


async def test_a_snapshot_stands_behind_the_beginning_that_was_never_sent(
    server: RedisServer, open_log: OpenLog
) -> None:
    log = await open_log()
    thread_id = new_id()
    question, answer = turn(thread_id)
    so_far = Fold(answer)
    writer = log.writer(thread_id, lambda: MessageSnapshot(so_far.message()))
    writer.write(MessageCreated(question))
    await writer.flush()
    server.command("FLUSHALL")
    start = await log.tail(thread_id)
    delta = MessageDelta(answer.id, 0, "Hello")
    so_far.apply(delta)
    writer.write(RunStarted(answer))
    writer.write(delta)
    await writer.flush()
    said = [decode(entry.data) for entry in await rest(log, thread_id, start)]
    assert said == [RunStarted(answer), MessageSnapshot(so_far.message())]


# Redis away


async def test_writes_during_an_outage_of_redis_take_little_memory_and_every_fact_arrives(
    server: RedisServer, open_log: OpenLog
) -> None:
    log = await open_log()
    thread_id = new_id()
    question, answer = turn(thread_id)
    so_far = Fold(answer)
    writer = log.writer(thread_id, lambda: MessageSnapshot(so_far.message()))
    writer.write(MessageCreated(question))
    writer.write(RunStarted(answer))
    await writer.flush()
    server.stop()
    updated = ThreadUpdated(new_thread(new_principal()))
    writer.write(MessageDelta(answer.id, 0, ""))
    async with asyncio.timeout(5):
        while not log.unreachable:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    for n in range(20_000):
        delta = MessageDelta(answer.id, n, "x")
        so_far.apply(delta)
        writer.write(delta)
        writer.write(ToolCallProgress(answer.id, "call_0", 0, n, None, None))
        if n == 10_000:
            writer.write(updated)
    assert len(writer._pending) < 1000
    end = RunCompleted(so_far.message().with_run(status="completed"))
    writer.write(end)
    server.start()
    await writer.flush()
    [opened] = re.findall(rb"\d+-\d+", server.command("XRANGE", f"chat:{thread_id}", "-", "+", "COUNT", "1"))
    said = [decode(entry.data) for entry in await rest(log, thread_id, opened.decode())]
    assert said == [MessageSnapshot(so_far.message()), updated, end]
    assert log.failures > 0


@pytest.mark.parametrize("how", ["stopped", "hanging"])
@pytest.mark.alone
async def test_no_call_waits_long_for_an_unreachable_redis(server: RedisServer, open_log: OpenLog, how: str) -> None:
    """I19."""
    log = await open_log(RedisTiming(read=0.4, close=0.4, page=0.4))
    thread_id = new_id()
    position = await log.tail(thread_id)
    cursor = log.cursor(thread_id, position)
    other = log.cursor(new_id(), position)
    writer = log.writer(thread_id)
    server.stop() if how == "stopped" else server.pause()
    began = time.monotonic()
    writer.write(ToolCallProgress("m", "call_0", 0, 0, None, None))
    questions = [
        log.tail(thread_id),
        find_turn(log, thread_id, "m", None),
        is_in_run(log, thread_id, position),
        other.next(),
    ]
    answers = await asyncio.gather(*questions, return_exceptions=True)
    assert [type(answer) for answer in answers] == [LogUnavailable] * 4
    await log.signal("run")
    assert time.monotonic() - began < 1.5
    cursor.close()
    other.close()
    await log.close()
    assert time.monotonic() - began < 3
    with pytest.raises(LogUnavailable):
        await writer.flush()


async def test_it_can_be_opened_before_redis_is_there(server: RedisServer, open_log: OpenLog) -> None:
    server.stop()
    log = await open_log(RedisTiming(read=0.4))
    thread_id = new_id()
    writer = log.writer(thread_id)
    writer.write(ToolCallProgress("m", "call_0", 0, 0, None, None))
    with pytest.raises(LogUnavailable):
        await log.tail(thread_id)
    server.start()
    async with asyncio.timeout(5):
        await writer.flush()
        while True:
            with contextlib.suppress(LogUnavailable):
                assert await log.tail(thread_id)
                break
            await asyncio.sleep(0.01)


# two processes


async def test_a_signal_reaches_the_other_process_and_each_once(server: RedisServer, open_log: OpenLog) -> None:
    one, two = await open_log(), await open_log()
    heard: list[str] = []
    came = asyncio.Event()
    one.on_signal(lambda run_id: heard.append(f"one {run_id}"))

    def hear(run_id: str) -> None:
        heard.append(f"two {run_id}")
        came.set()

    two.on_signal(hear)
    async with asyncio.timeout(5):
        await until(server, lambda answer: b":2\r\n" in answer, "PUBSUB", "NUMSUB", "chat:signals")
        await one.signal("run")
        await came.wait()
    assert sorted(heard) == ["one run", "two run"]


async def test_channels_without_readers_are_unsubscribed(server: RedisServer, open_log: OpenLog) -> None:
    log = await open_log(RedisTiming(linger=0.0, tick=0.05))
    thread_id = new_id()
    cursor = log.cursor(thread_id, await log.tail(thread_id))
    channel = f"chat:{thread_id}".encode()
    async with asyncio.timeout(5):
        await until(server, lambda answer: channel in answer, "PUBSUB", "CHANNELS")
        cursor.close()
        await until(server, lambda answer: channel not in answer, "PUBSUB", "CHANNELS")
