"""The message that a run builds: the ids of its calls, and the bound of its reasoning."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from agent_chat.agents import Part, Reasoning, Run, Text, ToolCompleted, ToolProgress, ToolStarted, ToolUse
from agent_chat.agents.answer import REASONING_CUT, AnswerBuilder
from agent_chat.agents.parts import InlinePart
from agent_chat.agents.testing import ScriptedTools, run_reply
from agent_chat.stores.events import ReasoningDelta, ToolCallCompleted, ToolCallProgress, ToolCallStarted
from agent_chat.stores.models import REASONING_BYTES, utcnow
from tests.support.run_events import EMPTY, NOT_STORING


def ids_of(builder: AnswerBuilder) -> list[str]:
    return [call["id"] for call in (builder.message().run or {})["tool_calls"]]


def test_a_call_without_an_id_gets_one_that_all_its_events_have() -> None:
    builder = AnswerBuilder(EMPTY, utcnow)
    parts: list[InlinePart] = [ToolStarted("", "look", {}), ToolProgress("", 0.5), ToolCompleted("", {"n": 1})]
    first = [builder.take(part) for part in parts]
    second = [builder.take(part) for part in parts]
    ids = ids_of(builder)
    for call_id, events in zip(ids, (first, second), strict=True):
        for event, kind in zip(events, (ToolCallStarted, ToolCallProgress, ToolCallCompleted), strict=True):
            assert isinstance(event, kind)
            assert event.id == call_id
    assert len(set(ids)) == 2
    assert all(ids)
    assert all(call.result == {"n": 1} for call in builder.message().tool_calls)


def test_parts_without_an_id_before_any_call_without_one_are_refused() -> None:
    builder = AnswerBuilder(EMPTY, utcnow)
    builder.take(ToolStarted("a", "look", {}))
    with pytest.raises(ValueError, match="never started"):
        builder.take(ToolCompleted("", {}))


async def test_tools_that_are_called_without_an_id_get_one() -> None:
    async def reply(run: Run) -> AsyncIterator[Part]:
        uses = [ToolUse(call_id, "look", {}) for call_id in ("", "", "mine")]
        async for part in run.tools.call(uses):
            yield part
        await run.tools.invoke(ToolUse("", "look", {}))
        yield Text("Done.")

    answer = await run_reply(reply, "Hello?", tools=ScriptedTools({"look": {"n": 1}}))
    ids = [call["id"] for call in (answer.message.run or {})["tool_calls"]]
    assert (len(set(ids)), ids[2], all(ids)) == (4, "mine", True)
    assert [call.result for call in answer.tool_calls] == [{"n": 1}] * 4


@pytest.mark.parametrize("over", [0, 1, REASONING_BYTES])
def test_reasoning_is_cut_at_its_bound_and_not_before(over: int) -> None:
    builder = AnswerBuilder(EMPTY, utcnow)
    builder.take(Reasoning("x" * (REASONING_BYTES - 5)))
    last = builder.take(Reasoning("x" * (5 + over)))
    assert isinstance(last, ReasoningDelta)
    assert last.text == "x" * 5 + (REASONING_CUT if over else "")
    builder.take(Text("So."))
    after = builder.take(Reasoning("x"))
    if over:
        assert after is None
    else:
        assert isinstance(after, ReasoningDelta)
        assert (after.index, after.text) == (1, REASONING_CUT)
    assert builder.take(Reasoning("x")) is None


def test_reasoning_that_is_not_stored_has_no_bound() -> None:
    builder = AnswerBuilder(NOT_STORING, utcnow)
    for _ in range(2):
        event = builder.take(Reasoning("x" * REASONING_BYTES))
        assert isinstance(event, ReasoningDelta)
        assert len(event.text) == REASONING_BYTES
    assert builder.message().reasoning is None
