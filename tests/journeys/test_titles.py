"""generate_title with agents of every kind, whatever they generate, and at every moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from agent_chat.agents import Run
from agent_chat.agents.registry import Kind
from agent_chat.server.limits import Limits
from agent_chat.server.timing import Timing
from tests.support.scripted import Scripted
from tests.support.servers import Live, live_server
from tests.support.shapes import is_problem, is_thread

Make = Callable[[Run], Awaitable[Any]]


def titled(
    folder: Path, make: Make, limits: Limits | None = None, timing: Timing = Timing()
) -> AbstractAsyncContextManager[Live]:
    return live_server(folder, limits=limits, timing=timing, kinds={"titled": Kind(Scripted(), make)})


async def question(live: Live) -> str:
    """A thread with one message; its path."""
    thread = await live.scripted_thread(kind="titled")
    await live.http.post(f"{thread}/messages", json={"role": "assistant", "content": "Welcome *aboard*"})
    return thread


def returns(value: object) -> Make:
    async def make(run: Run) -> object:
        return value

    return make


async def crashes(run: Run) -> str:
    raise RuntimeError("secret words")


@pytest.mark.parametrize(
    ("make", "title"),
    [
        (returns("The \ud83e fox"), "The \ufffd fox"),
        (returns("NUL\0 and\nline"), "NUL and line"),
        (returns("x" * 1_000_000), "x" * 99 + "…"),
        (returns(""), "Welcome aboard"),
        (returns(None), "Welcome aboard"),
        (crashes, "Welcome aboard"),
    ],
    ids=["surrogate", "NUL", "long", "empty", "None", "crash"],
)
async def test_any_title_is_stored_as_one_that_the_api_accepts(tmp_path: Path, make: Make, title: str) -> None:
    async with titled(tmp_path, make) as live:
        thread = await question(live)
        answer = await live.http.post(f"{thread}/generate_title")
        assert answer.status_code == 200, answer.text
        assert is_thread(answer.json())["title"] == title
        assert (await live.http.patch(thread, json={"title": title})).status_code == 200


async def test_a_title_that_takes_too_long_is_the_first_words_instead(tmp_path: Path) -> None:
    cancelled = asyncio.Event()

    async def hangs(run: Run) -> str:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return "never"

    async with titled(tmp_path, hangs, timing=Timing(title=0.1)) as live, asyncio.timeout(5):
        answer = await live.http.post(f"{await question(live)}/generate_title")
        assert answer.json()["title"] == "Welcome aboard"
        await cancelled.wait()


async def test_titles_count_as_runs_and_none_is_generated_while_the_server_stops(tmp_path: Path) -> None:
    started, go, calls = asyncio.Event(), asyncio.Event(), 0

    async def waits(run: Run) -> str:
        nonlocal calls
        calls += 1
        started.set()
        await go.wait()
        return "A title"

    async with titled(tmp_path, waits, Limits(runs=2)) as live:
        thread = await question(live)

        async def post() -> int:
            return (await live.http.post(f"{thread}/generate_title")).status_code

        posts = [asyncio.create_task(post()) for _ in range(20)]
        async with asyncio.timeout(5):
            await started.wait()
            while sum(each.done() for each in posts) < 18:
                await asyncio.wait([each for each in posts if not each.done()], return_when=asyncio.FIRST_COMPLETED)
        is_problem(await live.post(thread, "say hello"), 429, "rate_limited")
        go.set()
        assert sorted(await asyncio.gather(*posts)) == [200] * 2 + [429] * 18
        assert calls == 2
        assert await post() == 200
        await live.app.state.drain()
        is_problem(await live.http.post(f"{thread}/generate_title"), 503, "draining")
