"""What an agent is given of a thread's messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_chat.agents import AgentError, Part, Run, Text
from agent_chat.agents.registry import Kind
from agent_chat.server.runs.runner import HISTORY
from tests.support.servers import live_server


class Recorder:
    """An agent that stores what it is given; it is overloaded where the question is `fail` and `overloaded` is set."""

    def __init__(self) -> None:
        self.overloaded = True
        self.given: list[list[str]] = []
        self.earlier: list[bool] = []

    async def __call__(self, run: Run) -> AsyncIterator[Part]:
        self.given.append([message.content for message in run.messages])
        self.earlier.append(run.earlier)
        if self.overloaded and run.messages[-1].content == "fail":
            raise AgentError("Overloaded.", code="agent_overloaded", retryable=True)
        yield Text("Here I am.")


@pytest.mark.slow
async def test_a_retry_gets_the_history_of_its_question_however_many_newer_messages_exist(tmp_path: Path) -> None:
    recorder = Recorder()
    async with live_server(tmp_path, kinds={"recorder": Kind(recorder)}) as live:
        thread = await live.thread((await live.agent(kind="recorder"))["id"])
        assert (await live.post(thread, "Hello?")).status_code == 201
        assert (await live.post(thread, "fail", **{"Idempotency-Key": "k"})).status_code == 503

        async def note() -> None:
            body = {"role": "system", "content": "newer"}
            assert (await live.http.post(f"{thread}/messages", json=body)).status_code == 201

        await asyncio.gather(*[note() for _ in range(HISTORY + 1)])
        recorder.overloaded = False
        answer = await live.post(thread, "fail", **{"Idempotency-Key": "k"})
        assert (answer.status_code, answer.json()["content"]) == (201, "Here I am.")
        assert recorder.given[1:] == [["Hello?", "Here I am.", "fail"]] * 2

        await live.post(thread, "And now?")
        assert len(recorder.given[-1]) == HISTORY
        assert recorder.given[-1][-3:] == ["newer", "Here I am.", "And now?"]
        assert recorder.earlier == [False, False, False, True]
