"""`python -m tests.bench.first_token`: how much later than the model itself the server sends the first token.

The stand-in, the server and the client are processes of their own.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.types import ASGIApp

from agent_chat.server.serving import listening_socket
from tests.support.anthropic_api import StandIn, says, text
from tests.support.client import Client
from tests.support.servers import Process, server_process

POSTS = 55
WARM_UP = 5


def model() -> StandIn:
    """Answers at once with a few words."""
    service = StandIn()
    service.otherwise = lambda request: says(text("Here ", "I ", "am."))
    return service


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


def show(line: str) -> None:
    print(line, flush=True)  # noqa: T201


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with serving(Path(folder)) as (server, model_url):
            through, direct = await first_tokens(server, model_url)
            added = statistics.median(through) - statistics.median(direct)
            show(f"first token, median of {len(through)}: {statistics.median(through):.1f} ms through the server, ")
            show(f"  {statistics.median(direct):.1f} ms from the model itself: {added:.1f} ms added")


if __name__ == "__main__":
    if sys.argv[1:] == ["model"]:
        serve(model())
    else:
        asyncio.run(main())
