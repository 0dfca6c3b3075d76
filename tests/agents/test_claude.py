"""Agents of kind `claude` on a live stand-in: tools, thinking, usage, stop reasons, titles and caching."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from agent_chat.agents.claude.agent import MAX_ROUNDS, Claude
from agent_chat.agents.mcp.config import Server
from agent_chat.stores.models import timestamp, utcnow
from tests.support.anthropic_api import (
    OUTPUT_TOKENS,
    USAGE,
    Refusal,
    StandIn,
    parts,
    redacted,
    says,
    text,
    thinking,
    use,
)
from tests.support.claude_server import claude_server, quick
from tests.support.mcp_pool import raw
from tests.support.servers import Live
from tests.support.shapes import TOOL_CALL_KEYS, is_message
from tests.support.sockets import socket

JSON = dict[str, Any]
TWO = says(text("Let me ", "see. "), use("echo", {"text": "é"}), use("meet", {"guests": 1}))
SLOW = 0.21
"""Seconds that a tool takes: a little more than is asserted, since times are stored in whole milliseconds."""
QUICK_AND_SLOW = says(text("Let me ", "see. "), use("echo", {"text": "é"}), use("wait", {"seconds": SLOW}))
DONE = says(text("All ", "done."))


async def by_json(live: Live, thread: str) -> JSON:
    return dict((await live.post(thread, "Do it.")).json())


async def by_sse(live: Live, thread: str) -> JSON:
    stream = await live.streamed(thread, "Do it.")
    assert [frame.event for frame in stream][:2] == ["message.created", "run.started"]
    assert (
        "".join(frame.data["text"] for frame in stream if frame.event == "message.delta") == "Let me see. \n\nAll done."
    )
    return dict(stream[-1].data["message"])


async def by_websocket(live: Live, thread: str) -> JSON:
    async with socket(live.url, thread) as connection:
        await connection.create("Do it.")
        return dict((await connection.until("run.completed"))[-1]["message"])


async def by_polling(live: Live, thread: str) -> JSON:
    accepted = await live.post(thread, "Do it.", Prefer="respond-async")
    assert accepted.status_code == 202
    answer: JSON = accepted.json()
    async with asyncio.timeout(10):
        while answer["metadata"]["run"]["status"] == "in_progress":
            answer = await live.get(accepted.headers["Location"])
    return dict(answer)


def _taken(call: JSON) -> float:
    taken = datetime.fromisoformat(call["end_time"]) - datetime.fromisoformat(call["start_time"])
    return taken.total_seconds()


def _begins_with(later: dict[str, bytes], earlier: dict[str, bytes]) -> None:
    """Assert that the cached prefix of each request is the beginning of the next one, byte for byte."""
    assert {**later, "messages": b""} == {**earlier, "messages": b""}
    assert later["messages"].startswith(earlier["messages"].removesuffix(b"]") + b",")


@pytest.mark.parametrize("door", [by_json, by_sse, by_websocket, by_polling])
async def test_two_tools_are_called_stored_and_sent_back_in_every_transport(
    live: Live, service: StandIn, door: Any
) -> None:
    agent = await live.agent(kind="claude", mcp_servers=["raw"], instructions="Be brief.")
    thread = await live.thread(agent["id"])
    service.will(QUICK_AND_SLOW, DONE)
    posted = timestamp(utcnow())
    answer = is_message(await door(live, thread))
    answered = timestamp(utcnow())
    assert answer["content"] == "Let me see. \n\nAll done."
    assert (await live.get(thread))["messages"][-1] == answer

    assert [call["tool_name"] for call in answer["tool_calls"]] == ["echo", "wait"]
    assert [call["arguments"] for call in answer["tool_calls"]] == [{"text": "é"}, {"seconds": SLOW}]
    assert [call["result"]["content"][0]["text"] for call in answer["tool_calls"]] == ["é", "waited"]
    for call in answer["tool_calls"]:
        assert set(call) == TOOL_CALL_KEYS
        moments = [posted, answer["created_at"], call["start_time"], call["end_time"], answered]
        assert moments == sorted(moments)
    short, long = (_taken(call) for call in answer["tool_calls"])
    assert 0.2 <= long < 2
    assert short < long - 0.05, "each has its own end"
    run = answer["metadata"]["run"]
    place = {"round": 0, "offset": 12}
    assert run["tool_calls"] == [{"id": "toolu_echo", **place}, {"id": "toolu_wait", **place}]

    assert [turn["role"] for turn in service.requests[1]["messages"]] == ["user", "assistant", "user"]
    assert (await live.post(thread, "And?")).status_code == 201
    assert service.requests[2]["messages"][-2]["content"] == [{"type": "text", "text": "All done."}]
    first, second, third = map(parts, service.bodies)
    assert set(first) >= {"tools", "system", "messages"}
    _begins_with(second, first)
    _begins_with(third, second)
    assert service.refused == []


ROUNDS = [
    ("Let me check the weather.", "It is sunny."),
    ("Look:\n", "Sunny."),
    ("Look.\n\n\n", "\n\nSunny."),
    ("", "Sun"),
]


@pytest.mark.parametrize("texts", ROUNDS)
async def test_texts_of_two_rounds_are_separated_by_a_blank_line_that_the_model_does_not_get(
    live: Live, service: StandIn, texts: tuple[str, str]
) -> None:
    before, after = texts
    agent = await live.agent(kind="claude", mcp_servers=["raw"])
    thread = await live.thread(agent["id"])
    service.will(says(text(before), use("echo", {"text": "a"})), says(text(*after)))
    stream = await live.streamed(thread, "How is the weather?")
    answer = stream[-1].data["message"]
    lines = answer["content"].removeprefix(before.rstrip("\n")).removesuffix(after.lstrip("\n"))
    assert set(lines) <= {"\n"}
    assert len(lines) >= 2 or not before
    assert answer["metadata"]["run"]["tool_calls"][0]["offset"] == len(before)
    deltas = [frame.data for frame in stream if frame.event == "message.delta"]
    assert "".join(delta["text"] for delta in deltas) == answer["content"]
    assert (await live.get(thread))["messages"][-1] == answer
    assert answer["content_html"].count("<p ") == (2 if before else 1)

    await live.post(thread, "And tomorrow?")
    _, second, third = service.requests
    blocks = [block["text"] for turn in third["messages"] for block in turn["content"] if block["type"] == "text"]
    assert blocks == [block for block in ("How is the weather?", before, after, "And tomorrow?") if block]
    first, second, third = map(parts, service.bodies)
    _begins_with(second, first)
    _begins_with(third, second)


async def test_the_stable_prefix_is_marked_for_the_cache(live: Live, service: StandIn) -> None:
    agent = await live.agent(kind="claude", mcp_servers=["raw"], instructions="Be brief.", model="big", max_tokens=77)
    await live.post(await live.thread(agent["id"]), "Hello?")
    request = service.requests[0]
    mark = {"type": "ephemeral"}
    assert (request["model"], request["max_tokens"], request["cache_control"]) == ("big", 77, mark)
    assert request["system"] == [{"type": "text", "text": "Be brief.", "cache_control": mark}]
    names = [tool["name"] for tool in request["tools"]]
    assert names == sorted(names)
    await live.http.patch(f"/api/v1/agents/{agent['id']}", json={"instructions": ""})
    await live.post(await live.thread(agent["id"]), "Hello?")
    assert "system" not in service.requests[1]
    assert [tool.get("cache_control") for tool in service.requests[1]["tools"]][-2:] == [None, mark]


async def test_usage_is_summed_over_the_rounds(live: Live, service: StandIn) -> None:
    service.will(TWO, TWO, DONE)
    run = (await live.post(await live.thread(), "Do it.")).json()["metadata"]["run"]
    assert run["usage"] == {**{name: 3 * count for name, count in USAGE.items()}, "output_tokens": 3 * OUTPUT_TOKENS}
    assert (run["model"], run["stop_reason"]) == ("stand-in-1", "end_turn")


async def test_a_failed_run_has_its_usage(live: Live, service: StandIn) -> None:
    service.will(TWO, DONE.ends("cut", 5))
    thread = await live.thread()
    assert (await live.post(thread, "Do it.")).status_code == 502
    run = (await live.get(thread))["messages"][-1]["metadata"]["run"]
    assert run["usage"]["output_tokens"] == OUTPUT_TOKENS + USAGE["output_tokens"]
    assert run["stop_reason"] is None


@pytest.mark.parametrize("reason", ["max_tokens", "refusal", "stop_sequence", "model_context_window_exceeded", "new"])
async def test_the_answer_has_its_stop_reason(live: Live, service: StandIn, reason: str) -> None:
    service.will(says(text("I"), stop=reason))
    thread = await live.thread()
    answer = (await live.post(thread, "Hello?")).json()
    assert (answer["content"], answer["metadata"]["run"]["stop_reason"]) == ("I", reason)
    assert answer["metadata"]["run"]["status"] == "completed"
    assert (await live.post(thread, "Go on.")).json()["content"] == "Fine."


async def test_a_call_that_is_cut_off_by_max_tokens_is_not_made(live: Live, service: StandIn) -> None:
    service.will(says(text("I"), use("echo", '{"text": "hal'), stop="max_tokens"))
    answer = (await live.post(await live.thread(), "Hello?")).json()
    assert (answer["tool_calls"], answer["metadata"]["run"]["stop_reason"]) == ([], "max_tokens")


async def test_a_call_whose_arguments_are_no_object_is_an_error_and_not_made(live: Live, service: StandIn) -> None:
    service.will(says(use("pid", '{"a": '), use("pid", "[1]"), use("pid", "")), DONE)
    answer = (await live.post(await live.thread(), "Hello?")).json()
    assert [call["error"] for call in answer["tool_calls"]] == ["The arguments were no JSON object."] * 2 + [None]
    assert answer["tool_calls"][2]["result"]["pid"] > 0
    assert service.refused == []


async def test_after_sixteen_rounds_of_tools_the_model_may_call_none(live: Live, service: StandIn) -> None:
    service.otherwise = lambda request: (
        says(text("Enough.")) if request.get("tool_choice") == {"type": "none"} else says(use("echo", {"text": "."}))
    )
    answer = (await live.post(await live.thread(), "Hello?")).json()
    assert (len(answer["tool_calls"]), answer["content"]) == (MAX_ROUNDS, "Enough.")
    service.otherwise = lambda request: says(use("echo", {"text": "."}))
    answer = (await live.post(await live.thread(), "Hello?")).json()
    assert (len(answer["tool_calls"]), answer["metadata"]["run"]["stop_reason"]) == (MAX_ROUNDS, "tool_use")
    assert service.refused == []


async def test_calls_of_one_round_are_made_concurrently(live: Live, service: StandIn) -> None:
    service.will(says(*[use("meet", {"guests": 5})] * 5), DONE)
    answer = (await live.post(await live.thread(), "Meet.")).json()
    assert [call["result"]["content"][0]["text"] for call in answer["tool_calls"]] == ["met"] * 5


@pytest.mark.parametrize("given", ["same", "0_1", "", None, 7, "x" * 129, "a b", "\ud83d", "ü"])
async def test_calls_have_unique_ids_whatever_the_service_sends(live: Live, service: StandIn, given: Any) -> None:
    calls = [use("echo", {"text": "."}, id=given) for _ in range(3)]
    service.will(says(*calls), says(*calls), DONE)
    stream = await live.streamed(await live.thread(), "Hello?")
    stored = stream[-1].data["message"]["metadata"]["run"]["tool_calls"]
    ids = [call["id"] for call in stored]
    assert len(set(ids)) == len(ids) == 6
    assert (ids[0] == given) is (given in ("same", "0_1"))
    published = [frame.data for frame in stream if frame.event.startswith("tool_call.")]
    assert {(data["index"], data["id"]) for data in published} == set(enumerate(ids))
    assert service.refused == []


async def test_thinking_is_published_and_stored_and_sent_back_signed_only_while_tools_are_called(
    live: Live, service: StandIn
) -> None:
    agent = await live.agent(
        kind="claude", mcp_servers=["raw"], metadata={"thinking": {"type": "enabled", "budget_tokens": 1024}}
    )
    thread = await live.thread(agent["id"])
    first = says(thinking("Hm, ", "well."), redacted("xyz"), text("I look. "), use("echo", {"text": "a"}))
    second = says(thinking("So."), use("echo", {"text": "b"}))
    service.will(first, second, says(thinking("Ah!"), text("Done.")))
    stream = await live.streamed(thread, "Think.")
    assert "".join(frame.data["text"] for frame in stream if frame.event == "reasoning.delta") == "Hm, well.So.Ah!"
    assert stream[-1].data["message"]["content"] == "I look. \n\nDone."
    spoken = [turn["content"] for turn in service.requests[-1]["messages"] if turn["role"] == "assistant"]
    assert [[block["type"] for block in blocks] for blocks in spoken] == [
        ["thinking", "redacted_thinking", "text", "tool_use"],
        ["thinking", "tool_use"],
    ]
    assert spoken[0][:2] == [
        {"type": "thinking", "thinking": "Hm, well.", "signature": "signed Hm, well."},
        {"type": "redacted_thinking", "data": "xyz"},
    ]
    assert stream[-1].data["message"]["metadata"]["run"]["reasoning"] == [
        {"index": 0, "after": 0, "calls": 0, "text": "Hm, well."},
        {"index": 1, "after": 8, "calls": 1, "text": "So."},
        {"index": 2, "after": 8, "calls": 2, "text": "Ah!"},
    ]
    assert (await live.post(thread, "And?")).status_code == 201
    assert service.refused == []
    unsigned = [turn["content"] for turn in service.requests[-1]["messages"] if turn["role"] == "assistant"]
    kinds = [[block["type"] for block in blocks] for blocks in unsigned]
    assert kinds == [["text", "tool_use"], ["tool_use"], ["text"]]
    assert not any(thought in json.dumps(unsigned) for thought in ("Hm", "So.", "Ah!"))


async def test_an_unreachable_server_costs_only_its_tools_and_the_model_is_informed(
    tmp_path: Path, service: StandIn, claude: Claude
) -> None:
    servers = {"raw": raw(), "absent": Server(command="/nowhere/at-all")}
    async with claude_server(tmp_path, service, claude, servers) as live:
        service.will(TWO, DONE)
        answer = (await live.post(await live.thread(), "Do it.")).json()
        assert [call["error"] for call in answer["tool_calls"]] == [None, None]
    first, last = service.requests[0], service.requests[-1]
    note = first["system"][-1]["text"]
    assert note == "[The tools of the server absent are not available now. Its command was not found.]"
    assert [block["text"] for block in first["messages"][0]["content"]] == ["Do it."]
    assert last["system"] == first["system"]


async def test_an_agent_without_tools_still_sends_its_earlier_calls(live: Live, service: StandIn) -> None:
    agent = await live.agent(kind="claude", mcp_servers=["raw"])
    thread = await live.thread(agent["id"])
    service.will(TWO, DONE)
    assert (await live.post(thread, "Do it.")).status_code == 201
    await live.http.patch(f"/api/v1/agents/{agent['id']}", json={"mcp_servers": []})
    assert (await live.post(thread, "Again.")).json()["content"] == "Fine."
    assert service.requests[-1]["tool_choice"] == {"type": "none"}
    assert service.refused == []


async def test_system_notes_and_stored_answers_are_sent(live: Live, service: StandIn) -> None:
    thread = await live.thread()
    for role, content in (("assistant", "Welcome."), ("system", "It is late."), ("user", "  ")):
        await live.http.post(f"{thread}/messages", json={"role": role, "content": content})
    words = [block["text"] for turn in service.requests[0]["messages"] for block in turn["content"]]
    assert words == [
        "[The assistant begins.]",
        "Welcome.",
        "[A note by the system of this chat]\nIt is late.",
        "[No text.]",
    ]
    assert service.refused == []


async def test_a_thread_of_more_messages_than_an_agent_is_given_begins_with_a_note(
    live: Live, service: StandIn
) -> None:
    thread = await live.thread()
    for number in range(68):  # a question, its answer, and another's answer each time
        await live.http.post(f"{thread}/messages", json={"role": "assistant" if number % 2 else "user", "content": "x"})
    await live.post(thread, "And?")
    assert "left out" in json.dumps(service.requests[-1]["messages"][0])
    assert service.refused == []


async def test_successive_runs_use_one_connection(tmp_path: Path, service: StandIn) -> None:
    service.otherwise = lambda request: DONE if len(service.requests) % 2 == 0 else TWO
    claude = quick(service)
    async with claude_server(tmp_path, service, claude, {"raw": raw()}) as live:
        thread = await live.thread()
        for _ in range(5):
            assert (await live.post(thread, "Do it.")).status_code == 201
    await claude.close()
    assert len(service.requests) == 10
    assert len(service.connections) == 1


# --- titles


async def test_a_title_is_generated_by_the_title_model(live: Live, service: StandIn) -> None:
    thread = await live.thread()
    await live.post(thread, "What is an *event log*?")
    assert (await live.http.post(f"{thread}/generate_title")).json()["title"] == "A Fine Title"
    request = service.titles[0]
    assert request["model"] == "small"
    assert "What is an *event log*?" in request["messages"][0]["content"]


@pytest.mark.parametrize(
    "reply", [Refusal(529, "overloaded_error"), Refusal(401, "authentication_error"), "", ' "" ', DONE]
)
async def test_without_a_title_from_the_model_the_first_words_are_the_title(
    live: Live, service: StandIn, reply: Any
) -> None:
    service.title = reply
    thread = await live.thread()
    await live.post(thread, "What is an *event log*?")
    assert (await live.http.post(f"{thread}/generate_title")).json()["title"] == "What is an event log?"


@pytest.mark.parametrize(
    ("reply", "title"),
    [("A \ud83e fox", "A \ufffd fox"), ("NUL\0", "NUL"), ("x" * 300, "x" * 99 + "…"), ("A\nB", "A B")],
)
async def test_a_title_from_the_model_is_sanitized(live: Live, service: StandIn, reply: str, title: str) -> None:
    service.title = reply
    thread = await live.thread()
    await live.post(thread, "Hello?")
    assert (await live.http.post(f"{thread}/generate_title")).json()["title"] == title
