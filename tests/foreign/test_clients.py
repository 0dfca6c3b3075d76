"""Clients that nobody here wrote, over loopback: stream, cut, resume, exact text."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import aconnect_sse
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from tests.foreign.proxy import cutting_proxy
from tests.journeys.live import KEY, Live, live_server

SCRIPT = "say Ünï🎈 \ncount 150 2\nsay end"
HERE = Path(__file__).parent


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[Live]:
    async with live_server(tmp_path) as live:
        yield live


@pytest.fixture(scope="module")
async def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the npm packages installed beside our scripts."""
    if shutil.which("npm") is None:
        if os.environ.get("CI"):
            pytest.fail("npm is missing")
        pytest.skip("npm is missing")
    folder = tmp_path_factory.mktemp("foreign")
    for name in ("package.json", "eventsource.mjs", "fetch_event_source.mjs"):
        shutil.copy(HERE / name, folder)
    command = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--silent"]
    install = await asyncio.create_subprocess_exec(*command, cwd=folder)
    async with asyncio.timeout(50):
        assert await install.wait() == 0
    return folder


def cuts(seed: int) -> list[int]:
    """Some connections cut early, some later; the rest live."""
    return [random.Random(seed + index).randrange(1, 9000) for index in range(6)]


async def node(folder: Path, script: str, *arguments: str, opened: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Run a script; `opened` is called when it says that its connection is open. What it printed."""
    process = await asyncio.create_subprocess_exec(
        "node", script, *arguments, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(30):
            said = await process.stderr.readline()
            assert said == b"open\n", said + await process.stderr.read()
            opened()
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, (out, err)
    return dict(json.loads(out))


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_npm_fetch_event_source_posts_is_cut_and_has_every_character_once(
    live: Live, modules: Path, seed: int
) -> None:
    thread = await live.scripted_thread()
    port = int(live.url.rpartition(":")[2])
    async with cutting_proxy(port, iter(cuts(seed))) as proxy:
        found = await node(modules, "fetch_event_source.mjs", f"{proxy}{thread}/messages", KEY, SCRIPT)
    messages = (await live.get(thread))["messages"]
    assert len(messages) == 2
    assert found["text"] == found["final"] == messages[-1]["content"]
    assert found["opened"] > 1


@pytest.mark.parametrize("seed", [1, 2])
async def test_npm_eventsource_watches_is_cut_and_has_every_character_once(
    live: Live, modules: Path, seed: int
) -> None:
    thread = await live.scripted_thread()
    port = int(live.url.rpartition(":")[2])
    asking = asyncio.create_task(live.say(thread, f"hold it\n{SCRIPT}"))
    await live.gates.reached("it")
    sizes = [cuts(seed)[0]]  # the package waits three seconds before it reconnects
    async with cutting_proxy(port, iter(sizes)) as proxy:
        url = f"{proxy}{thread}/events"
        found = await node(modules, "eventsource.mjs", url, KEY, opened=lambda: live.gates.release("it"))
    assert found["text"] == found["final"] == (await asking).json()["content"]
    assert found["opened"] > 1


async def test_httpx_sse_reads_and_resumes_by_the_last_id(live: Live) -> None:
    thread = await live.scripted_thread()
    text, last = "", ""
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=live.url, headers=headers, timeout=20) as client:
        body = {"content": SCRIPT}
        async with aconnect_sse(client, "POST", f"{thread}/messages", params={"stream": "true"}, json=body) as source:
            async for event in source.aiter_sse():
                last = event.id
                if event.event == "message.delta":
                    text += event.json()["text"]
                if len(text) > 100:
                    break
        async with aconnect_sse(client, "GET", f"{thread}/events", headers={"Last-Event-ID": last}) as source:
            async for event in source.aiter_sse():
                if event.event == "message.delta":
                    assert event.json()["offset"] == len(text)
                    text += event.json()["text"]
                if event.event == "run.completed":
                    assert event.json()["message"]["content"] == text
                    break
    assert text.endswith("149 end")


async def test_websockets_is_cut_and_resumes_by_position(live: Live) -> None:
    thread = await live.scripted_thread()
    port = int(live.url.rpartition(":")[2])
    headers = {"Authorization": f"Bearer {KEY}"}
    text, position, connections, final = "", "", 0, None
    async with cutting_proxy(port, iter(cuts(4))) as proxy, asyncio.timeout(20):
        asked = False
        while final is None:
            connections += 1
            url = f"{proxy.replace('http', 'ws', 1)}{thread}/ws" + (f"?after={position}" if position else "")
            try:
                async with connect(url, additional_headers=headers) as connection:
                    async for data in connection:
                        event = json.loads(data)
                        position = event.get("position", position)
                        if event["type"] == "thread.snapshot" and event["thread"]["messages"]:
                            text = event["thread"]["messages"][-1]["content"]
                        if not asked:
                            asked = True
                            await live.http.post(
                                f"{thread}/messages", json={"content": SCRIPT}, headers={"Prefer": "respond-async"}
                            )
                        if event["type"] == "message.delta":
                            assert event["offset"] == len(text)
                            text += event["text"]
                        if event["type"] == "run.completed":
                            final = event["message"]["content"]
                            break
            except (OSError, EOFError, WebSocketException):
                continue
    assert connections > 1
    assert text == final
