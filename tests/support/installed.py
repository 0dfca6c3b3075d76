"""A server started the way an operator starts it, and an agent that reports what the process has imported."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

START_SECONDS = 60.0

_PROBE = '''
import json
import os
import sys

from agent_chat.agents import Ended, Text


async def reply(run):
    """Report which package `agents` is, and the files that are loaded as several modules."""
    import agents

    names = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name != "__main__":
            names.setdefault(os.path.realpath(file), {})[id(module)] = name
    loaded_twice = [sorted(found.values()) for found in names.values() if len(found) > 1]
    yield Text(json.dumps({"agents": agents.__file__, "loaded_twice": loaded_twice, "path": sys.path}))
    yield Ended(stop_reason="end_turn")
'''


class Report(msgspec.Struct, frozen=True):
    """What the probe reports of the server's process.

    Attributes:
        agents: the file of the top-level package `agents`.
        loaded_twice: for each file that is loaded as several modules, their names.
        path: the process's module path.
    """

    agents: str
    loaded_twice: list[list[str]]
    path: list[str]


def write_probe(folder: Path) -> None:
    """Write the agent kind `probe` into a folder, as pip would install it."""
    folder.mkdir(exist_ok=True)
    (folder / "probe.py").write_text(_PROBE)
    info = folder / "probe-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: probe\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[chat.agents]\nprobe = probe:reply\n")


@asynccontextmanager
async def started(
    command: Sequence[str | Path], folder: Path, data: Path, **environment: str
) -> AsyncIterator[httpx.AsyncClient]:
    """Run the command in this folder until the end of the block; a client with the server's URL and first key."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PORT": "0", "CHAT_DATA_DIR": str(data), **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        url, key = await _address(process)
        headers = {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30, verify=False) as client:
            yield client
        process.terminate()
        async with asyncio.timeout(30):
            await process.communicate()
        assert process.returncode == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def _address(process: asyncio.subprocess.Process) -> tuple[str, str]:
    """The URL and the key that a server prints when it listens."""
    assert process.stdout is not None
    output = ""
    async with asyncio.timeout(START_SECONDS):
        while line := (await process.stdout.readline()).decode():
            output += line
            if found := re.search(r"Open (http://127\.0\.0\.1:\d+)/\?key=(\S+)", line):
                return found[1], found[2]
    raise AssertionError(f"the server ended before it listened:\n{output}")


async def post(client: httpx.AsyncClient, content: str, kind: str | None = None) -> dict[str, Any]:
    """Post a message on a new thread, with the default agent or a new one of this kind; the answer."""
    agent = "default"
    if kind is not None:
        agent = (await client.post("/api/v1/agents", json={"name": kind, "kind": kind})).raise_for_status().json()["id"]
    threads = f"/api/v1/chat/{agent}/threads"
    thread = (await client.post(threads, json={})).raise_for_status().json()["id"]
    answer = (await client.post(f"{threads}/{thread}/messages", json={"content": content})).raise_for_status()
    message: dict[str, Any] = answer.json()
    return message


async def report(client: httpx.AsyncClient) -> Report:
    """Ask the probe."""
    return msgspec.json.decode((await post(client, "Report.", "probe"))["content"], type=Report)


async def post_question_with_tool(client: httpx.AsyncClient) -> dict[str, Any]:
    """Ask the demo agent for the time until it has called its tool: the tool server may start slowly; the answer."""
    async with asyncio.timeout(START_SECONDS):
        while not (answer := await post(client, "What time is it in Tokyo?"))["tool_calls"]:
            pass
    return answer
