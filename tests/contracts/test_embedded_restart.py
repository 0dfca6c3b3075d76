"""The embedded log after a restart: what its files contain is read whole, wherever a line was torn (I12, I13)."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent_chat.stores.embedded.files import Files
from agent_chat.stores.embedded.log import EmbeddedLog, open_embedded_log
from agent_chat.stores.embedded.segments import HEAD_BYTES
from agent_chat.stores.errors import Gap, LogDeleted
from agent_chat.stores.events import MessageCreated, MessageDelta, ThreadDeleted
from agent_chat.stores.models import new_id
from tests.support.backends import Seconds
from tests.support.log_reading import decoded, frames_of, publish_all, raises_gap
from tests.support.samples import new_message, publish, rest


@asynccontextmanager
async def opened(folder: Path, **options: Any) -> AsyncIterator[EmbeddedLog]:
    log = await open_embedded_log(folder, **options)
    try:
        yield log
    finally:
        await log.close()


def deltas(count: int, start: int = 0) -> list[MessageDelta]:
    return [MessageDelta("m", n, f"{n} ") for n in range(start, start + count)]


def segments(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def newest(folder: Path) -> Path:
    return segments(folder)[-1]


async def oldest_position(log: EmbeddedLog, thread_id: str) -> str:
    return [entry.position async for entry in log.backwards(thread_id)][-1]


async def test_every_position_of_before_resumes_exactly(tmp_path: Path) -> None:
    thread_id = new_id()
    async with opened(tmp_path) as log:
        start, entries = await publish_all(log, thread_id, *deltas(200))
    async with opened(tmp_path) as log:
        assert await log.tail(thread_id) == entries[-1].position
        for n, position in enumerate([start] + [entry.position for entry in entries]):
            assert frames_of(await rest(log, thread_id, position)) == frames_of(entries[n:])
        await publish(log, thread_id, *deltas(1, 200))
        assert frames_of(await rest(log, thread_id, entries[-2].position))[:1] == frames_of(entries[-1:])


async def test_a_last_line_that_is_torn_at_any_byte_is_removed(tmp_path: Path) -> None:
    async with opened(tmp_path / "whole") as log:
        start, entries = await publish_all(log, "t", *deltas(3))
    whole = newest(tmp_path / "whole").read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    for size in range(last, len(whole)):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "0000000001.log").write_bytes(whole[:size])
        async with opened(folder) as log:
            assert frames_of(await rest(log, "t", start)) == frames_of(entries[:2])
            assert await raises_gap(log.cursor("t", entries[2].position))
            await publish(log, "t", *deltas(1, 9))
        async with opened(folder) as log:
            assert decoded(await rest(log, "t", start)) == [*deltas(2), *deltas(1, 9)]


async def test_zeroes_at_the_end_are_removed(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        start, entries = await publish_all(log, "t", *deltas(3))
    size = newest(tmp_path).stat().st_size
    os.truncate(newest(tmp_path), size + 4096)
    async with opened(tmp_path) as log:
        assert newest(tmp_path).stat().st_size == size
        assert frames_of(await rest(log, "t", start)) == frames_of(entries)


@pytest.mark.parametrize("seconds", [-3600, -60, 0])
async def test_no_position_is_used_again_though_the_clock_is_behind(tmp_path: Path, seconds: int) -> None:
    clock, positions = Seconds(), list[str]()
    clock.now = 1_700_000_000.0
    for _ in range(3):
        async with opened(tmp_path, clock=clock) as log:
            _, entries = await publish_all(log, "t", *deltas(20))
            positions += [entry.position for entry in entries]
        clock.now += seconds
    assert len(set(positions)) == 60


async def test_segments_are_read_in_order_and_one_that_is_missing_is_a_gap(tmp_path: Path) -> None:
    clock = Seconds()
    clock.now = 1_700_000_000.0
    async with opened(tmp_path, clock=clock) as log:
        start = await log.tail("t")
        for n in range(3):
            await publish(log, "t", *deltas(5, 5 * n))
            clock.now += 601
            log._tick()
        entries = await rest(log, "t", start)
    assert len(segments(tmp_path)) == 4
    async with opened(tmp_path, clock=clock) as log:
        assert frames_of(await rest(log, "t", start)) == frames_of(entries)
    segments(tmp_path)[1].unlink()
    async with opened(tmp_path, clock=clock) as log:
        assert await raises_gap(log.cursor("t", start))
        assert frames_of(await rest(log, "t", entries[10].position)) == frames_of(entries[11:])


async def test_old_segments_are_deleted_whether_the_log_is_used_or_not(tmp_path: Path) -> None:
    clock = Seconds()
    clock.now = 1_700_000_000.0
    async with opened(tmp_path, clock=clock) as log:
        start, _ = await publish_all(log, "t", *deltas(3))
        for _ in range(2):
            clock.now += 3601
            log._tick()
        assert b"delta" not in b"".join(path.read_bytes() for path in segments(tmp_path))
        assert await raises_gap(log.cursor("t", start))


async def test_the_files_stay_within_their_limit(tmp_path: Path) -> None:
    limit = 2**20
    async with opened(tmp_path, disk_bytes=limit) as log:
        start = await log.tail("t")
        for n in range(300):
            log.writer("t").write(MessageDelta("m", n, "x" * 10_000))
            log.flush()
            assert log.disk_bytes <= limit
            assert sum(path.stat().st_size for path in segments(tmp_path)) == log.disk_bytes
        assert await raises_gap(log.cursor("t", start))
        last = await log.tail("t")
    async with opened(tmp_path, disk_bytes=limit) as log:
        assert await log.tail("t") == last


async def test_the_text_of_a_deleted_thread_is_erased_and_the_log_still_refuses_appends(tmp_path: Path) -> None:
    clock = Seconds()
    clock.now = 1_700_000_000.0
    async with opened(tmp_path, clock=clock) as log:
        await publish(log, "t", MessageCreated(new_message("t", "secret")), MessageDelta("m", 0, "secret"))
        await log.reset("t")
        await publish(log, "t", MessageDelta("m", 0, "secret"), ThreadDeleted("t"))
        await publish(log, "other", *deltas(3))
    async with opened(tmp_path, clock=clock) as log:  # it was not erased yet
        clock.now += 6
        log._tick()
        assert b"secret" not in newest(tmp_path).read_bytes()
    async with opened(tmp_path, clock=clock) as log:
        with pytest.raises(LogDeleted):
            await publish(log, "t", *deltas(1))
        assert decoded(await rest(log, "other", await oldest_position(log, "other"))) == deltas(3)


async def test_a_reset_is_still_a_gap_after_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        start, _ = await publish_all(log, "t", *deltas(3))
        await log.reset("t")
    async with opened(tmp_path) as log:
        assert await raises_gap(log.cursor("t", start))


class FullDisk(Files):
    """A disk whose calls fail at random: writes entirely or in part, and the creation of files."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.full = 0.0

    def fails(self) -> bool:
        return self.chance.random() < self.full

    def write(self, file: int, data: bytes, offset: int) -> int:
        if self.fails():
            if self.chance.random() < 0.5:
                raise OSError(errno.ENOSPC, "full")
            return super().write(file, data[: self.chance.randrange(len(data))], offset)
        return super().write(file, data, offset)

    def create(self, path: Path) -> int:
        if self.fails():
            raise OSError(errno.ENOSPC, "full")
        return super().create(path)


@pytest.mark.parametrize("seed", range(30))
async def test_a_full_disk_leaves_no_hole(tmp_path: Path, seed: int) -> None:
    """Whatever position a reader had, after a restart it gets everything that was published later, or a Gap."""
    chance = random.Random(seed)
    files, clock = FullDisk(chance), Seconds()
    clock.now = 1_700_000_000.0
    published: dict[str, list[tuple[str, bytes]]] = {"a": [], "b": []}
    log = await open_embedded_log(tmp_path, files=files, clock=clock, disk_bytes=20_000)
    cursors = {name: log.cursor(name, await log.tail(name)) for name in published}
    for _ in range(200):
        files.full = chance.choice([0.0, 0.0, 0.0, 0.5, 0.95])
        clock.now += chance.choice([0.0, 0.3, 2.0])
        name = chance.choice("ab")
        for n in range(chance.randrange(1, 4)):
            log.writer(name).write(MessageDelta("m", n, "x" * chance.randrange(400)))
        published[name] += [(entry.position, entry.data) for entry in await cursors[name].next()]
    volatile = log.volatile
    await log.close()
    files.full = 0.0
    assert log.failures
    resumed = 0
    async with opened(tmp_path, clock=clock) as log:
        for name, entries in published.items():
            for n, (position, _) in enumerate(entries):
                try:
                    async with asyncio.timeout(5):
                        found = await rest(log, name, position)
                except Gap:
                    continue
                resumed += 1
                assert [(entry.position, entry.data) for entry in found] == entries[n + 1 :]
    assert resumed or volatile or newest(tmp_path).stat().st_size == HEAD_BYTES
