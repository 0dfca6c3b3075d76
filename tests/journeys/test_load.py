"""Many clients of one process: 120 viewers of one run, and 100 runs at the same time. Every text is exact."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.support.client import Client, frames
from tests.support.servers import Live
from tests.support.sockets import socket

VIEWERS = 120
SOCKETS = 30
RUNS = 100


async def _text(client: Client, thread: str, watching: asyncio.Semaphore) -> str:
    """Watch from a snapshot to the run's end; the text put together from deltas alone."""
    async with client.watching(thread) as events:
        snapshot = await anext(events)
        text = snapshot.data["thread"]["messages"][-1]["content"]
        watching.release()
        async for frame in events:
            if frame.event == "message.delta":
                assert frame.data["offset"] <= len(text)
                text = text[: frame.data["offset"]] + frame.data["text"]
            if frame.event == "run.completed":
                assert frame.data["message"]["content"] == text
                break
    return str(text)


async def _socket_text(live: Live, thread: str, watching: asyncio.Semaphore) -> str:
    async with socket(live.url, thread) as connection:
        text = (await connection.receive())["thread"]["messages"][-1]["content"]
        watching.release()
        for frame in await connection.until("run.completed"):
            if frame["type"] == "message.delta":
                text = text[: frame["offset"]] + frame["text"]
    return str(text)


@pytest.mark.slow
async def test_every_viewer_of_one_run_receives_the_same_text(live: Live) -> None:
    live.http._transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=None))
    thread = await live.scripted_thread()
    asking = asyncio.create_task(live.post(thread, "count 50\nhold it\ncount 200"))
    await live.gates.reached("it")
    watching = asyncio.Semaphore(0)
    viewers = [asyncio.create_task(_text(live, thread, watching)) for _ in range(VIEWERS - SOCKETS)]
    viewers += [asyncio.create_task(_socket_text(live, thread, watching)) for _ in range(SOCKETS)]
    for _ in viewers:
        await watching.acquire()
    live.gates.release("it")
    texts = await asyncio.gather(*viewers)
    answer = (await asking).json()
    assert set(texts) == {answer["content"]}
    assert len(texts) == VIEWERS


@pytest.mark.slow
async def test_a_hundred_concurrent_runs_complete_with_exact_texts(live: Live) -> None:
    live.http._transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=None))
    agent = (await live.agent())["id"]
    threads = [await live.thread(agent) for _ in range(RUNS)]

    async def ask(index: int) -> None:
        async with live.posting(threads[index], f"say run {index}\ncount 100 1") as posting:
            stream = [frame async for frame in frames(posting, seconds=40)]
        text = "".join(frame.data["text"] for frame in stream if frame.event == "message.delta")
        assert text == f"run {index}" + "".join(f"{number} " for number in range(100))
        assert stream[-1].event == "run.completed"
        assert stream[-1].data["message"]["content"] == text

    await asyncio.gather(*map(ask, range(RUNS)))
    for thread in threads:
        assert [message["role"] for message in (await live.get(thread))["messages"]] == ["user", "assistant"]
