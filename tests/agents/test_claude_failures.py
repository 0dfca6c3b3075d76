"""The failure table: what the model's service does, what the client receives, what is stored, and what follows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent_chat.agents import Part, Run, ToolCompleted, ToolStarted
from agent_chat.agents.claude.agent import ATTEMPTS, Claude
from agent_chat.agents.registry import Kind
from tests.support.anthropic_api import Gate, Refusal, Reply, StandIn, Stream, says, text, thinking, use
from tests.support.anthropic_rules import BROKEN
from tests.support.claude_runs import png
from tests.support.claude_server import claude_server, mcp_file, quick
from tests.support.mcp_pool import raw
from tests.support.servers import Live, live_server
from tests.support.shapes import is_message, is_problem

HALF = says(text("Half ", "of it", " is here"))
BEFORE, AFTER = 3, 5
"""The number of events before the first delta, and up to the second one."""

JSON = dict[str, Any]
Row = tuple[Reply, int, str, bool, str | None]
OVERLOADED = Refusal(529, "overloaded_error")
LIMITED = Refusal(429, "rate_limit_error", headers={"retry-after": "17"})

# what the service does -> status, code, retryable, Retry-After; before the first token, as often as it is asked
BEFORE_THE_FIRST: dict[str, Row] = {
    "overloaded": (OVERLOADED, 503, "agent_overloaded", True, "2"),
    "rate limit": (Refusal(429, "rate_limit_error"), 503, "agent_overloaded", True, "2"),
    "rate limit, short": (
        Refusal(429, "rate_limit_error", headers={"retry-after": "0.01"}), 503, "agent_overloaded", True, "1",
    ),
    "internal error": (Refusal(500, "api_error"), 502, "agent_failed", True, None),
    "no JSON": (Refusal(502, "api_error", "<html>"), 502, "agent_failed", True, None),
    "timed out": (Refusal(504, "timeout_error"), 504, "agent_timeout", True, None),
    "error event": (HALF.ends("overloaded_error", BEFORE), 503, "agent_overloaded", True, "2"),
    "error event, other": (HALF.ends("api_error", BEFORE), 502, "agent_failed", True, None),
    "cut": (HALF.ends("cut", BEFORE), 502, "agent_failed", True, None),
    "cut at once": (HALF.ends("cut", 0), 502, "agent_failed", True, None),
    "clean end": (HALF.ends("end", BEFORE), 502, "agent_failed", True, None),
    "stall": (HALF.ends("stall", BEFORE), 504, "agent_timeout", True, None),
    "garbage": (HALF.ends("garbage", BEFORE), 502, "agent_failed", True, None),
}  # fmt: skip

# the same, but asking again is no use and isn't done
HOPELESS: dict[str, Row] = {
    "rate limit, long": (LIMITED, 503, "agent_overloaded", True, "17"),
    "bad key": (Refusal(401, "authentication_error"), 502, "agent_failed", False, None),
    "forbidden": (Refusal(403, "permission_error"), 502, "agent_failed", False, None),
    "unknown model": (Refusal(404, "not_found_error"), 502, "agent_failed", False, None),
    "not paid": (Refusal(402, "billing_error"), 502, "agent_failed", False, None),
    "refused": (Refusal(400, "invalid_request_error", "max_tokens: 9 > 8"), 502, "agent_failed", False, None),
    "too long": (Refusal(400, "invalid_request_error", "prompt is too long"), 502, "agent_failed", False, None),
    "too large": (Refusal(413, "request_too_large"), 502, "agent_failed", False, None),
    "refused in the stream": (HALF.ends("invalid_request_error", BEFORE), 502, "agent_failed", False, None),
}

# after the first token: not requested again, the partial answer is stored
AFTER_THE_FIRST: dict[str, Row] = {
    "error event": (HALF.ends("overloaded_error", AFTER), 503, "agent_overloaded", True, "2"),
    "error event, other": (HALF.ends("api_error", AFTER), 502, "agent_failed", True, None),
    "cut": (HALF.ends("cut", AFTER), 502, "agent_failed", True, None),
    "clean end": (HALF.ends("end", AFTER), 502, "agent_failed", True, None),
    "clean end of all but the last event": (
        HALF.ends("end", len(HALF.events) - 1), 502, "agent_failed", True, None,
    ),
    "stall": (HALF.ends("stall", AFTER), 504, "agent_timeout", True, None),
    "garbage": (HALF.ends("garbage", AFTER), 502, "agent_failed", True, None),
}  # fmt: skip


@pytest.fixture(scope="module")
async def live(tmp_path_factory: pytest.TempPathFactory, started: StandIn, claude: Claude) -> AsyncIterator[Live]:
    """The default agent's kind, and others beside it.

    `hasty`: a third of a second of silence is a stall; for streams that stall on purpose. `nowhere`: its service is
    not there. `pictures`: shows a broken one.
    """

    async def pictures(run: Run) -> AsyncIterator[Part]:
        if run.messages[-1].content == "show":
            block = {"type": "image", "data": png(BROKEN), "mimeType": "image/png"}
            yield ToolStarted("1", "show", {})
            yield ToolCompleted("1", {"content": [block]})
        else:
            async for part in claude.reply(run):
                yield part

    hasty, nowhere = quick(started, stall_seconds=0.3), Claude("a-key", "http://127.0.0.1:9", retry_seconds=0.01)
    kinds = {"hasty": Kind(hasty.reply), "nowhere": Kind(nowhere.reply), "pictures": Kind(pictures)}
    async with claude_server(tmp_path_factory.mktemp("live"), started, claude, {"raw": raw()}, kinds) as live:
        yield live
    await nowhere.close()
    await hasty.close()


async def _thread(live: Live, reply: Reply) -> str:
    """A thread with an agent whose stall limit is long, unless the reply stalls."""
    if isinstance(reply, Stream) and reply.ending == "stall":
        return await live.thread((await live.agent(kind="hasty", mcp_servers=["raw"]))["id"])
    return await live.thread()


async def _fails(live: Live, service: StandIn, row: Row, stored: str, attempts: int) -> None:
    """Post twice, as JSON and as a stream: both report the same, everything is stored, and the thread goes on."""
    reply, status, code, retryable, retry_after = row
    service.otherwise = lambda request: reply
    thread = await _thread(live, reply)

    answer = await live.post(thread, "Hello?")
    problem = is_problem(answer, status, code, "thread_id", "message_id", "retryable")
    assert problem["retryable"] is retryable
    assert answer.headers.get("Retry-After") == retry_after
    assert "secret" not in answer.text
    assert len(service.requests) == attempts

    stream = await live.streamed(thread, "Hello again?")
    assert stream[-1].event == "run.failed"
    error = stream[-1].data["error"]
    assert (error["code"], error["retryable"]) == (code, retryable)
    assert [message["role"] for message in (await live.get(thread))["messages"]] == ["user", "assistant"] * 2
    for message in (await live.get(thread))["messages"][1::2]:
        run = is_message(message)["metadata"]["run"]
        assert (message["content"], run["status"]) == (stored, "failed")
        assert run["error"] == {**error, "detail": problem["detail"]}
    assert stream[-1].data["message"] == (await live.get(thread))["messages"][-1]

    service.otherwise = lambda request: says(text("Here I am."))
    assert (await live.post(thread, "And now?")).json()["content"] == "Here I am."
    assert service.refused == []


@pytest.mark.parametrize("name", BEFORE_THE_FIRST)
async def test_a_failure_before_the_first_token_is_retried_and_then_reported(
    live: Live, service: StandIn, name: str
) -> None:
    await _fails(live, service, BEFORE_THE_FIRST[name], "", ATTEMPTS)


@pytest.mark.parametrize("name", HOPELESS)
async def test_a_permanent_failure_is_reported_without_a_retry(live: Live, service: StandIn, name: str) -> None:
    await _fails(live, service, HOPELESS[name], "", 1)


@pytest.mark.parametrize("name", AFTER_THE_FIRST)
async def test_a_failure_after_the_first_token_leaves_the_text_stored(live: Live, service: StandIn, name: str) -> None:
    row = AFTER_THE_FIRST[name]
    stored = "Half of it is here" if name.endswith("last event") else "Half of it"
    await _fails(live, service, row, stored, 1)


@pytest.mark.parametrize("name", BEFORE_THE_FIRST)
async def test_a_passing_failure_before_the_first_token_is_not_visible(live: Live, service: StandIn, name: str) -> None:
    reply = BEFORE_THE_FIRST[name][0]
    service.will(reply, reply, says(text("Whole.")))
    stream = await live.streamed(await _thread(live, reply), "Hello?")
    assert [frame.event for frame in stream].count("message.delta") == 1
    assert stream[-1].event == "run.completed"
    assert stream[-1].data["message"]["content"] == "Whole."


async def test_a_long_retry_after_is_passed_on_to_the_client(live: Live, service: StandIn) -> None:
    service.will(LIMITED)
    stream = await live.streamed(await live.thread(), "Hello?")
    assert stream[-1].data["error"]["retry_after"] == 17
    assert stream[-1].data["message"]["metadata"]["run"]["error"]["retry_after"] == 17


async def test_a_tool_call_that_is_cut_off_is_retried(live: Live, service: StandIn) -> None:
    call = says(use("echo", {"text": "hello"}))
    service.will(call.ends("cut", len(call.events) - 3), says(text("Never mind.")))
    answer = (await live.post(await live.thread(), "Hello?")).json()
    assert (answer["content"], answer["tool_calls"]) == ("Never mind.", [])


async def test_text_and_an_error_in_the_same_chunk_are_both_published(live: Live, service: StandIn) -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": ""}}
    service.will(Stream([*HALF.events[:AFTER], error], joined=True))
    thread = await live.thread()
    is_problem(await live.post(thread, "Hello?"), 503, "agent_overloaded", "thread_id", "message_id", "retryable")
    assert (await live.get(thread))["messages"][-1]["content"] == "Half of it"


async def test_an_unreachable_service_is_reported(live: Live) -> None:
    thread = await live.thread((await live.agent(kind="nowhere"))["id"])
    answer = await live.post(thread, "Hello?")
    assert is_problem(answer, 502, "agent_failed", "thread_id", "message_id", "retryable")["retryable"]


async def test_a_wrong_key_and_a_wrong_address_are_reported(tmp_path: Path, service: StandIn) -> None:
    no_tools = mcp_file(tmp_path, {})
    where = service.url
    async with live_server(tmp_path, anthropic_api_key="wrong", anthropic_base_url=where, mcp_config=no_tools) as live:
        answer = await live.post(await live.thread(), "Hello?")
        assert is_problem(answer, 502, "agent_failed", "thread_id", "message_id", "retryable")["detail"] == (
            "The model's service refused this server's key."
        )


async def test_a_thread_that_is_too_long_for_the_model_goes_on_with_what_fits(live: Live, service: StandIn) -> None:
    thread = await live.thread()
    for number in range(6):
        service.will(says(text(f"Answer {number}. " + "x" * 3000)))
        assert (await live.post(thread, f"Question {number}. " + "y" * 3000)).status_code == 201
    service.overlong = 20_000
    requests = len(service.requests)
    assert (await live.post(thread, "And?")).json()["content"] == "Fine."
    first, *_, last = service.requests[requests:]
    assert len(str(first)) > service.overlong > len(str(last["messages"]))
    assert last["messages"][0]["content"][0]["text"] == "[Earlier messages of this thread are left out here.]"
    assert last["messages"][-1]["content"][-1]["text"] == "And?"
    assert len(last["messages"]) > 1


async def test_a_message_that_alone_is_too_long_is_reported_and_the_thread_goes_on(
    live: Live, service: StandIn
) -> None:
    service.overlong = 20_000
    thread = await live.thread()
    answer = await live.post(thread, "y" * 30_000)
    assert is_problem(answer, 502, "agent_failed", "thread_id", "message_id", "retryable")["detail"] == (
        "The thread is longer than the model can read."
    )
    assert (await live.post(thread, "Sorry.")).json()["content"] == "Fine."


async def test_cancelling_in_mid_stream_closes_the_connection_to_the_service(live: Live, service: StandIn) -> None:
    gate = Gate()
    service.will(HALF.waits(AFTER, gate))
    thread = await live.thread()
    asking = asyncio.create_task(live.post(thread, "Hello?"))
    async with asyncio.timeout(5):
        await gate.reached.wait()
        message = (await live.get(thread))["messages"][-1]
        cancelled = await live.http.post(f"{thread}/messages/{message['id']}/cancel")
        await service.abandoned.acquire()
    assert cancelled.json()["metadata"]["run"]["status"] == "cancelled"
    assert cancelled.json()["content"] == "Half of it"
    assert (await asking).json() == cancelled.json()
    assert (await live.post(thread, "Go on.")).json()["content"] == "Fine."
    assert service.refused == []


async def test_a_client_that_disconnects_does_not_end_the_answer(live: Live, service: StandIn) -> None:
    gate = Gate()
    service.will(HALF.waits(AFTER, gate))
    thread = await live.thread()
    async with live.posting(thread, "Hello?"):
        await gate.reached.wait()
    gate.go.set()
    async with live.watching(thread) as events:
        async for frame in events:
            if frame.event == "run.completed" or "'completed'" in str(frame.data):
                break
    assert (await live.get(thread))["messages"][-1]["content"] == "Half of it is here"


# --- never bricked

EVENTFUL = says(thinking("Let me ", "see."), text("I ", "look. "), use("echo", {"text": "a"}), use("nothing", {}))
CLOSING = says(text("That ", "was it."))


ANSWER = (EVENTFUL, CLOSING)
EVENTS = [(round_, at) for round_, reply in enumerate(ANSWER) for at in range(len(reply.events))]
"""Every place where the answer can be interrupted: in a round with tools, and in the last round."""
TOGETHER = 3
"""How many interruptions one thread has. The threads run concurrently, since they mostly wait."""

Interrupt = Callable[[int, int], Reply]


def _interrupted(by: Interrupt) -> Callable[[JSON], Reply]:
    """The service's response to each request; the message names the place of the interruption."""

    def reply(request: JSON) -> Reply:
        asked = [turn["content"][-1] for turn in request["messages"] if turn["role"] == "user"]
        *_, question = (block["text"] for block in asked if block["type"] == "text")
        if question == "Go on.":
            return says(text("Fine."))
        round_, at = map(int, question.split())
        before = round_ > 0 and asked[-1]["type"] == "text"
        return EVENTFUL if before else by(round_, at)

    return reply


async def _goes_on(live: Live, thread: str) -> None:
    answer = await live.post(thread, "Go on.")
    assert (answer.status_code, answer.json()["content"]) == (201, "Fine.")


async def _side_by_side(live: Live, by: Interrupt, interrupt: Callable[[str, int, int], Awaitable[None]]) -> None:
    async def bears(events: Sequence[tuple[int, int]]) -> None:
        thread = await _thread(live, by(0, 0))
        for round_, at in events:
            await interrupt(thread, round_, at)
            await _goes_on(live, thread)

    async with asyncio.timeout(50), asyncio.TaskGroup() as threads:
        for start in range(0, len(EVENTS), TOGETHER):
            threads.create_task(bears(EVENTS[start : start + TOGETHER]))


@pytest.mark.parametrize("ending", ["cut", "end", "stall", "garbage", "overloaded_error"])
@pytest.mark.slow
async def test_a_stream_that_breaks_at_any_event_leaves_a_thread_that_goes_on(
    live: Live, service: StandIn, ending: str
) -> None:
    def by(round_: int, at: int) -> Reply:
        return ANSWER[round_].ends(ending, at)

    async def breaks(thread: str, round_: int, at: int) -> None:
        assert (await live.post(thread, f"{round_} {at}")).status_code >= 502

    service.otherwise = _interrupted(by)
    await _side_by_side(live, by, breaks)
    assert service.refused == []


@pytest.mark.slow
async def test_a_run_that_is_cancelled_at_any_event_leaves_a_thread_that_goes_on(live: Live, service: StandIn) -> None:
    gates = {event: Gate() for event in EVENTS}

    def by(round_: int, at: int) -> Reply:
        return ANSWER[round_].waits(at, gates[round_, at])

    async def is_cancelled(thread: str, round_: int, at: int) -> None:
        asking = asyncio.create_task(live.post(thread, f"{round_} {at}"))
        await gates[round_, at].reached.wait()
        running = (await live.get(thread))["messages"][-1]
        stopped = await live.http.post(f"{thread}/messages/{running['id']}/cancel")
        assert is_message(stopped.json())["metadata"]["run"]["status"] == "cancelled"
        assert (await asking).json() == stopped.json()

    service.otherwise = _interrupted(by)
    await _side_by_side(live, by, is_cancelled)
    assert service.refused == []


async def test_a_picture_that_the_service_rejects_is_omitted_from_then_on(live: Live, service: StandIn) -> None:
    thread = await live.thread((await live.agent(kind="pictures"))["id"])
    assert (await live.post(thread, "show")).status_code == 201
    for _ in range(2):
        assert (await live.post(thread, "Nice.")).json()["content"] == "Fine."
    assert set(service.refused) == {"messages.2: Could not process image"}
