"""A worker process: what it may use, what it inherits, and that nothing it sends is unbounded. Real processes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent_chat.server.files.content_html import LIMITS
from agent_chat.server.files.turns import Turns
from agent_chat.server.files.worker import WorkerFailed, Workers

SMALL = replace(LIMITS, reply_bytes=2**16, cpu_seconds=0.3)
ORG = "an organization"
ROOT = Path(__file__).parents[2]


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    workers = Workers("tests.support.odd_worker", SMALL, Turns(1, max_waiting=100))
    yield workers
    async with asyncio.timeout(5):
        await workers.close()
    assert workers.processes == 0


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (b"raise", "error"),
        (b"long", "error"),
        (b"announce", "error"),
        (b"notes", "error"),
        (b"long note", "error"),
        (b"kind", "error"),
        (b"memory", "memory"),
        (b"busy", "time"),
        (b"write", "error"),
        (b"files", "error"),
    ],
)
async def test_a_worker_that_misbehaves_fails_alone(workers: Workers, request_: bytes, reason: str) -> None:
    async with asyncio.timeout(20):
        with pytest.raises(WorkerFailed) as failed:
            await workers.call(ORG, request_)
        assert failed.value.reason == reason
        assert "content" not in str(failed.value)
        assert await workers.call(ORG, b"fine") == b"fine"
    assert workers.processes == 1


async def test_what_a_library_prints_is_not_taken_for_a_reply(workers: Workers) -> None:
    assert await workers.call(ORG, b"print") == b"print"
    assert await workers.call(ORG, b"fine") == b"fine"


async def test_a_worker_has_limits_and_no_environment(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANTHROPIC_API_KEY", "CHAT_API_KEY", "PATH", "HOME"):
        monkeypatch.setenv(name, "a secret")
    found = json.loads(await workers.call(ORG, b"limits"))
    inherited = set(found["environment"]) - {"LC_CTYPE"}  # Python's own
    assert inherited <= {"LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR", "MALLOC_ARENA_MAX", "PYTHONUTF8"}
    assert found["limits"] == {"AS": SMALL.memory_bytes, "FSIZE": 0, "NOFILE": 64, "NPROC": 0, "CORE": 0}


def powerless() -> list[str]:
    """Runs a command without root's right to look into every process."""
    if os.getuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is missing")
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


async def environ_of(pid: int) -> bytes:
    """What another process of the same user reads of its environment."""
    reader = await asyncio.create_subprocess_exec(*powerless(), "cat", f"/proc/{pid}/environ", stdout=PIPE, stderr=PIPE)
    return (await reader.communicate())[0]


@pytest.mark.slow
async def test_other_processes_of_its_user_cannot_read_the_environment_of_a_server(tmp_path: Path) -> None:
    env = {
        "PATH": os.environ["PATH"],
        "CHAT_DATA_DIR": str(tmp_path),
        "PORT": "0",
        "CHAT_API_KEY": "a-key-not-for-children",
    }
    server = await asyncio.create_subprocess_exec(
        *(*powerless(), sys.executable, "-m", "server"), stdout=PIPE, stderr=PIPE, cwd=ROOT, env=env
    )
    other = await asyncio.create_subprocess_exec(*powerless(), "sleep", "60", stdout=PIPE, env={"OTHER": "1"})
    assert server.stdout is not None
    try:
        async with asyncio.timeout(30):
            assert (await server.stdout.readline()).startswith(b"Listening")
            assert b"OTHER=1" in await environ_of(other.pid)  # it is the server that forbids it
            assert await environ_of(server.pid) == b""
    finally:
        server.kill()
        other.kill()
        await asyncio.gather(server.communicate(), other.communicate())
