"""The command line of a process: Ctrl-C, and what is reported at start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.client import KEY
from tests.support.services import free_port

Process = asyncio.subprocess.Process


@asynccontextmanager
async def command(*arguments: str, module: str = "server", **environment: str) -> AsyncIterator[Process]:
    """`python -m server …` with both outputs in one pipe; killed at the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"PATH": os.environ["PATH"], "CHAT_API_KEY": KEY, "PORT": "0", **environment},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line(process: Process, word: str) -> str:
    """The next line that holds the word."""
    assert process.stdout is not None
    async with asyncio.timeout(30):
        while text := (await process.stdout.readline()).decode():
            if word in text:
                return text
    raise AssertionError(f"no {word!r}")


async def rest(process: Process) -> str:
    """All that it still writes until it ends."""
    assert process.stdout is not None
    async with asyncio.timeout(30):
        text = (await process.stdout.read()).decode()
        await process.wait()
    return text


async def start_answer(port: int) -> None:
    """Start an answer that takes long."""
    base = f"http://127.0.0.1:{port}"
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=base, headers=headers, verify=False, timeout=30) as http:
        agent = (await http.post("/api/v1/agents", json={"name": "S", "kind": "scripted"})).json()["id"]
        threads = f"/api/v1/chat/{agent}/threads"
        thread = (await http.post(threads, json={})).json()["id"]
        posted = await http.post(
            f"{threads}/{thread}/messages", json={"content": "hold it"}, headers={"Prefer": "respond-async"}
        )
        assert posted.status_code == 202


@pytest.mark.slow
async def test_ctrl_c_prints_what_it_waits_for_and_a_second_one_stops(tmp_path: Path) -> None:
    port = free_port()
    async with command(module="tests.support.server_main", CHAT_DATA_DIR=str(tmp_path), PORT=str(port)) as process:
        await line(process, "Listening")
        await start_answer(port)
        process.send_signal(signal.SIGINT)
        waiting = await line(process, "Waiting for")
        assert waiting == "Waiting for 1 running answer, up to 20 s. Press Ctrl-C again to stop now.\n"
        began = asyncio.get_running_loop().time()
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in await rest(process)
        assert asyncio.get_running_loop().time() - began < 4
        assert process.returncode == 0
    async with command(module="tests.support.server_main", CHAT_DATA_DIR=str(tmp_path), PORT=str(port)) as process:
        await line(process, "Listening")  # the data folder is free, and the run is repaired


def reached(process: Process, when: str, folder: Path) -> bool:
    """True once a start has got there."""
    if when == "opening":
        return (folder / "lock").exists()
    return "msgspec" in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.parametrize("when", ["importing", "opening"])
@pytest.mark.slow
async def test_ctrl_c_before_it_listens_ends_without_a_traceback(tmp_path: Path, when: str) -> None:
    async with command(CHAT_DATA_DIR=str(tmp_path)) as process:
        async with asyncio.timeout(30):
            while not reached(process, when, tmp_path):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        process.send_signal(signal.SIGINT)
        text = await rest(process)
    assert "Traceback" not in text
    assert process.returncode is not None


@pytest.mark.slow
async def test_an_unknown_variable_is_reported_with_the_likely_name(tmp_path: Path) -> None:
    async with command(
        CHAT_DATA_DIR=str(tmp_path), CHAT_DRAIN_SECOND="1", CHAT_XYZZY="2", CHAT_LOG_FORMAT="json"
    ) as process:
        first = json.loads(await line(process, "CHAT_DRAIN_SECOND"))
        assert first["message"] == "CHAT_DRAIN_SECOND is not a setting; did you mean CHAT_DRAIN_SECONDS?"
        assert (first["level"], first["logger"]) == ("warning", "agent_chat.server.command_line")
        assert json.loads(await line(process, "XYZZY"))["message"] == "CHAT_XYZZY is not a setting"
        await line(process, "Listening")
