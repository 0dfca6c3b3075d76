"""`python -m tests.bench.first_token`: what the server adds to a model's answer, in time and in CPU.

First: from posting to the first delta, less what the stand-in takes when it is asked directly. Then: CPU of the server
process per 1,000 tokens at 50 streams, beside a bare relay (the SDK's typed events written out as SSE, nothing kept),
with the SDK's own HTTP client and with aiohttp. The stand-in and the clients are processes of their own.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from agent_chat.server.serving import listening_socket
from tests.support.anthropic_api import TIME, StandIn, Stream, says, text
from tests.support.client import Client
from tests.support.servers import Process, server_process

STREAMS = 50
TOKENS = 200
PACE = 0.02
POSTS = 55
WARM_UP = 5


def model() -> StandIn:
    """Answers at once with a few words; with many, slowly, where the question is `long`; with times where `timed`."""
    service = StandIn()
    brief = says(text("Here ", "I ", "am."))
    long = says(text(*(f"word{index % 100} " for index in range(TOKENS))))
    long = Stream(long.events, pace=PACE)
    timed = Stream(says(text(*[f"{TIME} "] * TOKENS)).events, pace=4 * PACE, timed=True)

    def reply(request: dict[str, Any]) -> Stream:
        question = request["messages"][-1]["content"][-1]["text"]
        return {"long": long, "timed": timed}.get(question, brief)

    service.otherwise = reply
    return service


def relay(url: str, aiohttp: bool) -> ASGIApp:
    """The least that a server with the SDK can do."""
    import anthropic  # takes a second or two: the model's process does without

    http = anthropic.DefaultAioHttpClient() if aiohttp else None
    client = anthropic.AsyncAnthropic(api_key="a-key", base_url=url, http_client=http)

    async def post(request: Request) -> StreamingResponse:
        words = (await request.json())["content"]

        async def events() -> AsyncIterator[bytes]:
            stream = await client.messages.create(
                model="stand-in-1",
                max_tokens=100,
                stream=True,
                messages=[{"role": "user", "content": [{"type": "text", "text": words}]}],
            )
            async for event in stream:
                if event.type == "content_block_delta" and event.delta.type == "text_delta":
                    yield f"data: {json.dumps({'text': event.delta.text})}\n\n".encode()

        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(routes=[Route("/", post, methods=["POST"])])


def serve(app: ASGIApp) -> None:
    """Serve on a free port, and say which."""
    sock = listening_socket("127.0.0.1", 0)
    sock.listen()
    print(sock.getsockname()[1], flush=True)  # noqa: T201
    uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False)).run([sock])


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[tuple[str, int]]:
    """One of the processes of this file: its URL and its pid."""
    made = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.first_token", *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert made.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(await made.stdout.readline())}", made.pid
    finally:
        made.terminate()
        await made.wait()


async def first(client: httpx.AsyncClient, url: str, body: object, sign: bytes, **headers: str) -> float:
    """Milliseconds from posting to the first delta."""
    began = time.perf_counter()
    took = 0.0
    async with client.stream("POST", url, json=body, headers=headers) as response:
        seen = b""
        async for data in response.aiter_raw():
            seen += data
            if not took and sign in seen:
                took = (time.perf_counter() - began) * 1000
    assert took, seen
    return took


async def first_tokens(client: Client, model_url: str, posts: int = POSTS) -> tuple[list[float], list[float]]:
    """How long each post's first delta took, through the server and from the model itself, once all is warm."""
    thread = await client.thread()
    through, direct = [], []
    question = {
        "model": "m",
        "max_tokens": 9,
        "stream": True,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    }
    for _ in range(WARM_UP + posts):
        posted = await first(
            client.http,
            f"{thread}/messages",
            {"content": "Hello?"},
            b"event: message.delta",
            Accept="text/event-stream",
        )
        through.append(posted)
        sign = b"event: content_block_delta"
        direct.append(await first(client.http, f"{model_url}/v1/messages", question, sign, **{"x-api-key": "a-key"}))
    return through[WARM_UP:], direct[WARM_UP:]


@asynccontextmanager
async def serving(folder: Path, **environment: str) -> AsyncIterator[tuple[Process, str]]:
    """A server whose default agent asks the stand-in, each in a process of its own; the server, and the model's URL."""
    async with (
        process("model") as (model_url, _),
        server_process(folder, ANTHROPIC_BASE_URL=model_url, ANTHROPIC_API_KEY="a-key", **environment) as server,
    ):
        yield server, model_url


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def drain(client: httpx.AsyncClient, url: str, sign: bytes, **headers: str) -> None:
    seen = b""
    async with client.stream("POST", url, json={"content": "long"}, headers=headers) as response:
        async for data in response.aiter_raw():
            seen = seen[-100_000:] + data
    assert sign in seen, seen[-1000:]


async def per_thousand(pid: int, client: httpx.AsyncClient, urls: list[str], sign: bytes, **headers: str) -> float:
    """Milliseconds of that process's CPU per 1,000 tokens relayed."""
    before = cpu_seconds(pid)
    await asyncio.gather(*(drain(client, url, sign, **headers) for url in urls))
    return (cpu_seconds(pid) - before) * 1000 / (len(urls) * TOKENS / 1000)


def show(line: str) -> None:
    print(line, flush=True)  # noqa: T201


async def main() -> None:
    limits = httpx.Limits(max_connections=None)
    with tempfile.TemporaryDirectory() as folder:
        async with (
            serving(Path(folder)) as (server, model_url),
            httpx.AsyncClient(timeout=60, limits=limits) as client,
        ):
            through, direct = await first_tokens(server, model_url)
            added = statistics.median(through) - statistics.median(direct)
            show(f"first token, median of {len(through)}: {statistics.median(through):.1f} ms through the server, ")
            show(f"  {statistics.median(direct):.1f} ms from the model itself: {added:.1f} ms added")

            server.http._transport = httpx.AsyncHTTPTransport(limits=limits)
            threads = [await server.thread() for _ in range(STREAMS)]
            urls = [f"{thread}/messages" for thread in threads]
            ours = []
            for _ in range(3):
                sign = b"event: run.completed"
                ours.append(await per_thousand(server.pid, server.http, urls, sign, Accept="text/event-stream"))
            show(f"CPU per 1,000 tokens at {STREAMS} streams: {min(ours):.0f} ms in the server")
            for name in ("httpx", "aiohttp"):
                async with process("relay", model_url, name) as (url, pid):
                    bare = [await per_thousand(pid, client, [url] * STREAMS, b"data: ") for _ in range(3)]
                    show(f"  {min(bare):.0f} ms in a bare relay of the SDK over {name}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["model"]:
            serve(model())
        case ["relay", url, http]:
            serve(relay(url, http == "aiohttp"))
        case _:
            asyncio.run(main())
