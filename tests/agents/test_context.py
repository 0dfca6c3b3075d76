"""Requests of random threads: always valid, always the same, during the run as afterwards."""

from __future__ import annotations

import base64
import json
import random
import string
from typing import Any

import pytest
from msgspec.structs import replace

from agent_chat.agents import Run, RunTools, Text, ToolCompleted, ToolPart, ToolStarted
from agent_chat.agents.claude.attachments import LoadedFiles
from agent_chat.agents.claude.history import OMITTED, build_history, message_turns, model_name, replace_images
from agent_chat.agents.claude.request import RequestBuilder
from agent_chat.agents.parts import InlinePart
from agent_chat.server.runs.live_run import LiveRun
from agent_chat.stores.contracts import Posted
from agent_chat.stores.embedded.log import EmbeddedLog
from agent_chat.stores.models import Message, Principal, ToolCall, new_answer, new_id, utcnow
from tests.support.anthropic_rules import faults
from tests.support.claude_runs import AGENT, Tools, message, png

NAMES = ["echo", "time.now", "time_now", "a b", "", "ключ", "x" * 200, "x" * 201, "a__b", "a/b", "😀"]
TEXTS = ["", " ", "\n", "\n\n", "Hello", "Look.\n", "\n\nLook", "Grüße 😀", "x" * 3000, "<tool>", "\u2028", "{}", "  x"]
Turns = list[dict[str, Any]]


BLOCKS: list[Any] = [
    {"type": "text", "text": "words"},
    {"type": "text", "text": " "},
    {"type": "image", "data": png(), "mimeType": "image/png"},
    {"type": "image", "data": png(), "mimeType": "image/jpeg"},
    {"type": "image", "data": base64.b64encode(b"<svg/>").decode(), "mimeType": "image/svg+xml"},
    {"type": "image", "data": "no base64!", "mimeType": "image/png"},
    {"type": "image", "data": "", "mimeType": "image/png"},
    {"type": "audio", "data": "UklGRg==", "mimeType": "audio/wav"},
    {"type": "resource", "resource": {"uri": "file:///a", "text": "inside"}},
    {"type": "resource", "resource": {"uri": "file:///b", "blob": png(), "mimeType": "image/png"}},
    {"type": "resource", "resource": {"uri": "file:///c", "blob": "AAAA"}},
    {"type": "resource_link", "uri": "file:///d", "name": "d"},
    {"type": "of the future"},
    "no block",
    None,
    7,
]


def result(dice: random.Random) -> dict[str, Any]:
    return dice.choice(
        [
            {},
            {"value": 42, "nested": {"list": [1, 2.5, None, "ü"]}},
            {"content": [dice.choice(BLOCKS) for _ in range(dice.randrange(4))]},
            {"content": "no list"},
            {"content": [], "more": 1},
            {"truncated": True, "full_bytes": 10**6, "text": "y" * dice.choice([10, 60_000])},
        ]
    )


def called(dice: random.Random) -> ToolCall:
    """A call with a result, an error, a blank error, or none of them because it was interrupted."""
    call = ToolCall(dice.choice(NAMES), dice.choice([{}, {"a": [1]}, {"n": 2**70}, {"": None}]))
    match dice.randrange(4):
        case 0:
            return ToolCall(call.tool_name, call.arguments, result=result(dice))
        case 1:
            return ToolCall(call.tool_name, call.arguments, error=dice.choice(["It failed.", "", "\n"]))
        case 2:
            return call
    return ToolCall(call.tool_name, call.arguments, result=result(dice), end_time="t")


def answer(dice: random.Random) -> Message:
    """An assistant's message as a store may contain it: from a run or not, complete or repaired."""
    content = "".join(dice.choice(TEXTS) for _ in range(dice.randrange(4)))
    calls = [called(dice) for _ in range(dice.choice([0, 0, 1, 2, 5]))]
    known, round_, offset = [], 0, 0
    for index in range(len(calls)):
        round_ += index and dice.random() < 0.5
        offset = dice.randint(offset, max(offset, len(content) + dice.choice([0, 0, 9])))
        known.append({"id": f"{index}", "round": int(round_), "offset": offset})
    if dice.random() < 0.2:
        del known[dice.randrange(len(known) + 1) :]
    status = dice.choice(["completed", "failed", "cancelled"])
    return message("assistant", content, status=status, tool_calls=known, calls=calls)


def thread(dice: random.Random, length: int) -> list[Message]:
    messages: list[Message] = []
    for _ in range(length):
        match dice.randrange(8):
            case 0:
                messages.append(message("system", dice.choice(TEXTS)))
            case 1:
                messages.append(message("assistant", dice.choice(TEXTS)))
            case 2 | 3 | 4:
                messages.append(message("user", dice.choice(TEXTS)))
            case _:
                messages.append(answer(dice))
    if dice.random() < 0.1:
        messages.insert(dice.randrange(len(messages) + 1), message("assistant", "half", status="in_progress"))
    return [*messages, message("user", dice.choice(TEXTS))]


def builder_of(messages: list[Message], *, budget: int = 160_000) -> RequestBuilder:
    run = Run(new_id(), Principal("o", "u"), AGENT, messages, RunTools(Tools()))
    return RequestBuilder(run, {"model": "m", "max_tokens": 1}, budget, LoadedFiles())


@pytest.mark.parametrize("seed", range(60))
def test_any_stored_thread_makes_a_valid_request(seed: int) -> None:
    dice = random.Random(seed)
    messages = thread(dice, dice.randrange(30))
    for budget in (160_000, 5_000, 100, 1):
        request = builder_of(messages, budget=budget).build(last=False)
        assert faults(json.loads(json.dumps(request))) == []
        without = {**request, "messages": replace_images(request["messages"])}
        assert faults(without) == []
        assert "'image'" not in str(without)


@pytest.mark.parametrize("seed", range(20))
def test_the_same_thread_always_makes_the_same_bytes(seed: int) -> None:
    messages = thread(random.Random(seed), 20)
    assert json.dumps(build_history(messages, 3_000)) == json.dumps(build_history(messages, 3_000))


@pytest.mark.parametrize("seed", range(40))
async def test_a_run_sends_its_own_message_as_later_runs_send_it(seed: int) -> None:
    dice = random.Random(seed)
    question = message("user", "What?")
    builder = builder_of([question])
    posted = Posted(question, new_answer("t", question.id, None, ""), replayed=False)
    live = LiveRun(builder.run.principal, AGENT, posted, EmbeddedLog(), utcnow)

    def take(part: InlinePart) -> None:
        live.take(part)
        builder.add(part)

    for number in range(dice.randrange(1, 5)):
        for _ in range(dice.randrange(4)):
            take(Text(dice.choice(TEXTS)))
        made = [called(dice) for _ in range(dice.randrange(1, 4))]
        ids = [f"{number}_{index}" for index in range(len(made))]
        for call_id, call in zip(ids, made, strict=True):
            take(ToolStarted(call_id, call.tool_name, call.arguments, number))
        ended: list[ToolPart] = [
            ToolCompleted(call_id, call.result, call.error) for call_id, call in zip(ids, made, strict=True)
        ]
        dice.shuffle(ended)
        for part in ended:
            take(part)
        request = builder.build(last=False)
        assert faults(request) == []
        stored = replace(live.message(), id=builder.run.id).with_run(status="completed")
        afterwards = build_history([question, stored, message("user", "And?")], 10**9)
        *before, last = request["messages"]
        assert afterwards[: len(before)] == before
        assert afterwards[len(before)]["content"][: len(last["content"])] == last["content"]


def test_adjacent_empty_answers_do_not_change_the_turns_before_them() -> None:
    question, empty = message("user", "What?"), message("assistant", "", status="failed", tool_calls=[])
    turns = build_history([question, empty, message("user", "And?")], 1000)
    assert [block["text"] for block in turns[0]["content"]] == ["What?", "And?"]


# --- what fits


def growing(length: int, size: int) -> list[Message]:
    """A thread of questions and answers with that many characters each."""
    return [
        message("user" if index % 2 == 0 else "assistant", f"{index} " + "z" * size, index) for index in range(length)
    ]


def included(turns: Turns) -> list[int]:
    """The numbers of the messages that are included."""
    texts = [block["text"] for turn in turns for block in turn["content"]]
    return [int(text.split()[0]) for text in texts if text[0] in string.digits]


@pytest.mark.parametrize(("budget", "window"), [(20_000, 10**9), (10**9, 100)])
def test_omitted_messages_are_noted_and_the_prefix_moves_rarely_as_the_thread_grows(budget: int, window: int) -> None:
    messages, starts = growing(601, 600), []
    for end in range(1, len(messages), 2):
        given = messages[max(0, end - window) : end]
        turns = build_history(given, budget, earlier=end > window)
        numbers = included(turns)
        assert numbers == list(range(numbers[0], end)), "the newest, without a hole"
        assert numbers[0] % 2 == 0, "a whole turn begins with its question"
        assert sum(len(block["text"]) for turn in turns for block in turn["content"]) < budget * 3
        assert (turns[0]["content"][0]["text"] == OMITTED) == (numbers[0] > 0)
        starts.append(numbers[0])
    assert starts == sorted(starts)
    cut = [start for start in starts if start]
    moves = len(set(cut))
    assert len(cut) > 240
    assert moves < len(cut) / 6, "what is cached is used again and again"
    held = [end - start for start, end in zip(starts, range(1, 601, 2), strict=True) if start]
    assert min(held) >= 45, "about half of what fits is always included"


def test_the_last_message_is_always_included_however_long_it_is() -> None:
    turns = build_history([*growing(4, 10), message("user", "9 " + "z" * 10_000)], 100)
    assert included(turns) == [9]


def test_tools_have_valid_and_different_names() -> None:
    assert len({model_name(name) for name in NAMES}) == len(NAMES)
    assert model_name("get-time_2") == "get-time_2"


def test_calls_of_one_round_come_together_after_the_text_before_them() -> None:
    calls = [ToolCall("a", {}, {"x": 1}), ToolCall("b", {}, error="No."), ToolCall("c", {})]
    known = [{"round": 0, "offset": 3}, {"round": 0, "offset": 3}, {"round": 1, "offset": 3}]
    turns = message_turns(message("assistant", "OneTwo", status="failed", tool_calls=known, calls=calls))
    assert [[block["type"] for block in turn["content"]] for turn in turns] == [
        ["text", "tool_use", "tool_use"],
        ["tool_result", "tool_result"],
        ["tool_use"],
        ["tool_result"],
        ["text"],
    ]
    assert turns[3]["content"][0]["content"] == [{"type": "text", "text": "The call was interrupted."}]
    assert turns[4]["content"] == [{"type": "text", "text": "Two"}]
