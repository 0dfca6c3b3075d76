"""A disk that is full and later has room again: nothing is lost, and no request waits in vain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_chat.server.timing import Timing
from tests.support.servers import live_server
from tests.support.shapes import is_problem


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path: Path) -> None:
    """Take all the room there is."""
    with (path / "ballast").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    assert os.statvfs(path).f_bavail == 0


async def test_a_full_disk_is_reported_and_heals(small_disk: Path) -> None:
    async with live_server(small_disk / "data", timing=Timing(answer_patience=0.7)) as live:
        thread = await live.scripted_thread()
        waiting = asyncio.create_task(live.post(thread, "hold it\ncount 20000"))
        await live.gates.reached("it")
        assert (await live.http.get("/readyz")).status_code == 200
        fill(small_disk)
        live.gates.release("it")
        async with asyncio.timeout(10):
            problem = is_problem(await waiting, 503, "store_unavailable", "thread_id", "message_id", "retryable")
        ready = await live.http.get("/readyz")
        assert (ready.status_code, ready.json()["database"]) == (503, False)
        upload = await live.http.post(f"{thread}/attachments", files=[("files", ("a.txt", b"a" * 100_000))])
        is_problem(upload, 507, "storage_full")
        assert (await live.get(f"{thread}/messages/{problem['message_id']}"))["role"] == "assistant"
        (small_disk / "ballast").unlink()

        async with live.watching(thread) as events, asyncio.timeout(10):
            snapshot = (await anext(events)).data["thread"]["messages"][-1]
            if snapshot["metadata"]["run"]["status"] == "in_progress":
                while (await anext(events)).event != "run.completed":
                    pass
        stored = await live.get(f"{thread}/messages/{problem['message_id']}")
        assert stored["content"] == "".join(f"{n} " for n in range(20000))
        assert (await live.http.get("/readyz")).status_code == 200
        assert len((await live.get(thread))["messages"]) == 2
        upload = await live.http.post(f"{thread}/attachments", files=[("files", ("a.txt", b"a" * 1000))])
        assert upload.status_code == 201
