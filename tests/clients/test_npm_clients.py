"""Third-party clients over loopback: stream, cut, resume, exact text.

A snapshot would hide that a server can't resume: each client counts them. Whoever watches gets one, the first, and from
then on exactly what follows; whoever reads the answer to its own post gets none.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import ServerSentEvent, aconnect_sse
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from tests.support.client import KEY
from tests.support.proxy import HTTPProxy
from tests.support.servers import Live, live_server
from tests.support.services import missing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60, func_only=True)]  # installing has a limit of its own

INSTALL_SECONDS = 150
RETRY_MS = 20
SCRIPT = "say Ünï🎈 \ncount 150 2\nsay end"
"""Its answer is some 30,000 bytes as an event stream or over a WebSocket."""
HEADERS = {"Authorization": f"Bearer {KEY}"}
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
async def live(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    async with live_server(tmp_path_factory.mktemp("data")) as live:
        yield live


@pytest.fixture(scope="module")
async def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the npm packages installed beside our scripts."""
    if shutil.which("npm") is None:
        missing("npm is not installed")
    folder = tmp_path_factory.mktemp("foreign")
    for name in ("package.json", "eventsource.mjs", "fetch_event_source.mjs"):
        shutil.copy(HERE / name, folder)
    command = ["npm", "install", "--prefer-offline", "--no-package-lock", "--no-audit", "--no-fund", "--silent"]
    install = await asyncio.create_subprocess_exec(*command, cwd=folder)
    try:
        async with asyncio.timeout(INSTALL_SECONDS):
            assert await install.wait() == 0
    finally:
        if install.returncode is None:
            install.kill()
    return folder


def cuts(seed: int) -> list[int]:
    """After how many bytes the streams are cut: in the first frame, in the answer's head, then anywhere."""
    chance = random.Random(seed)
    return [600, chance.randrange(1, 200), *(chance.randrange(1, 6000) for _ in range(3))]


async def node(folder: Path, script: str, *arguments: str, watching: Callable[[], None] | None = None) -> Any:
    """Run a script; what it printed. `watching` is called when it reports that it watches."""
    process = await asyncio.create_subprocess_exec(
        "node", script, *arguments, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(30):
            if watching is not None:
                said = await process.stderr.readline()
                assert said == b"watching\n", said + await process.stderr.read()
                watching()
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, (out, err)
    return json.loads(out)


def resumed(proxy: HTTPProxy, position: str) -> None:
    """Check that the client was cut as planned and resumed each time, at last with its position in this form."""
    assert proxy.cuts == 5
    assert len(proxy.streams) == 6
    assert position in proxy.streams[-1].lower()


class Reader:
    """What a client makes of the events of one run: any hole, and any character that comes twice, is an error."""

    def __init__(self) -> None:
        self.text = ""
        self.position = ""
        self.snapshots = 0
        self.final: str | None = None

    def take(self, event: dict[str, Any], position: str) -> None:
        self.position = position
        match event["type"]:
            case "thread.snapshot":
                self.snapshots += 1
                self.text = event["thread"]["messages"][-1]["content"]
            case "message.delta":
                assert event["offset"] == len(self.text)
                self.text += event["text"]
            case "run.completed":
                self.final = event["message"]["content"]


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_npm_fetch_event_source_posts_is_cut_and_has_every_character_once(
    live: Live, modules: Path, seed: int
) -> None:
    thread = await live.scripted_thread()
    async with HTTPProxy(live.port, cuts(seed)) as proxy:
        found = await node(modules, "fetch_event_source.mjs", f"{proxy.url}{thread}/messages", KEY, SCRIPT)
        resumed(proxy, "last-event-id: ")
    messages = (await live.get(thread))["messages"]
    assert len(messages) == 2
    assert found["text"] == found["final"] == messages[-1]["content"]
    assert found["snapshots"] == 0


@pytest.mark.parametrize("seed", [1, 2])
async def test_npm_eventsource_watches_is_cut_and_has_every_character_once(
    live: Live, modules: Path, seed: int
) -> None:
    thread = await live.scripted_thread()
    gate = f"for eventsource {seed}"
    asking = asyncio.create_task(live.post(thread, f"hold {gate}\n{SCRIPT}"))
    await live.gates.reached(gate)
    async with HTTPProxy(live.port, cuts(seed), retry_ms=RETRY_MS) as proxy:
        url = f"{proxy.url}{thread}/events"
        found = await node(modules, "eventsource.mjs", url, KEY, watching=lambda: live.gates.release(gate))
        resumed(proxy, "last-event-id: ")
    assert found["text"] == found["final"] == (await asking).json()["content"]
    assert found["snapshots"] == 1


async def test_httpx_sse_is_cut_and_resumes_by_the_last_id(live: Live) -> None:
    thread = await live.scripted_thread()
    reader = Reader()
    post = {"headers": {"Idempotency-Key": "once"}, "json": {"content": SCRIPT}}

    async def read(proxy: HTTPProxy, client: httpx.AsyncClient) -> AsyncIterator[ServerSentEvent]:
        resume = {"headers": {"Last-Event-ID": reader.position}}
        method, path, options = ("GET", "events", resume) if reader.position else ("POST", "messages", post)
        async with aconnect_sse(client, method, f"{proxy.url}{thread}/{path}", **options) as source:
            async for event in source.aiter_sse():
                yield event

    async with HTTPProxy(live.port, cuts(5)) as proxy, httpx.AsyncClient(headers=HEADERS, timeout=20) as client:
        while reader.final is None:
            with suppress(httpx.TransportError):
                async for event in read(proxy, client):
                    reader.take(event.json(), event.id)
                    if reader.final is not None:
                        break
        resumed(proxy, "last-event-id: ")
    assert reader.text == reader.final == (await live.get(thread))["messages"][-1]["content"]
    assert reader.snapshots == 0


async def test_websockets_is_cut_and_resumes_by_position(live: Live) -> None:
    thread = await live.scripted_thread()
    reader = Reader()
    asking = asyncio.create_task(live.post(thread, f"hold for websockets\n{SCRIPT}"))
    await live.gates.reached("for websockets")
    async with HTTPProxy(live.port, cuts(4)) as proxy, asyncio.timeout(20):
        base = f"ws{proxy.url.removeprefix('http')}{thread}/ws"
        while reader.final is None:
            url = base + (f"?after={reader.position}" if reader.position else "")
            with suppress(OSError, EOFError, WebSocketException):
                async with connect(url, additional_headers=HEADERS) as connection:
                    async for data in connection:
                        event = json.loads(data)
                        reader.take(event, event["position"])
                        live.gates.release("for websockets")
                        if reader.final is not None:
                            break
        resumed(proxy, "?after=")
    assert reader.text == reader.final == (await asking).json()["content"]
    assert reader.snapshots == 1
