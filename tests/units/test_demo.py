"""The demo agent, with the bundled tools as a real process. One process serves this whole file."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from agent_chat.agents import Ended, Part, Text, ToolCompleted, ToolProgress, ToolStarted
from agent_chat.agents.demo import reply, requested_calls
from agent_chat.agents.mcp.config import Server, read_servers
from agent_chat.agents.mcp.pool import Pool
from agent_chat.stores.models import Agent, Attachment
from tests.support.demo_runs import AGENT, run

pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture(scope="module")
async def pool() -> AsyncIterator[Pool]:
    pool = Pool({**read_servers(None, {}), "absent": Server(command="/nowhere/none")})
    yield pool
    await pool.close()


async def answer(pool: Pool, message: str, agent: Agent = AGENT) -> list[Part]:
    async with asyncio.timeout(30):
        return [part async for part in reply(run(pool, message, agent))]


def text(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text))


def kinds(parts: list[Part]) -> list[type]:
    """The types of the parts in order, adjacent ones of one type once."""
    return [kind for kind, _ in itertools.groupby(map(type, parts))]


async def test_a_long_answer_is_markdown_in_many_small_pieces(pool: Pool) -> None:
    parts = await answer(pool, "Tell me about this server")
    written = text(parts)
    for mark in ("\n## ", "\n- ", "\n1. ", "|---|", "```python\n", "demo agent"):
        assert mark in written
    assert len(parts) > 300
    assert max(len(part.text) for part in parts if isinstance(part, Text)) < 40
    assert parts[-1] == Ended(stop_reason="end_turn", model="demo")


async def test_an_unknown_message_is_repeated_with_a_list_of_what_can_be_tried(pool: Pool) -> None:
    written = text(await answer(pool, "Good morning"))
    assert "Good morning" in written
    assert "no model" in written
    assert "several" in written


PDF = Attachment("a", "a.pdf", "application/pdf", 1, "", "ready", 1, False, None, "")


async def test_an_attached_file_is_named(pool: Pool) -> None:
    parts = [part async for part in reply(run(pool, "", attachments=[PDF]))]
    assert "`a.pdf` (application/pdf, 1 bytes)" in text(parts)


@pytest.mark.parametrize(
    ("message", "tool", "outcome"),
    [
        ("what time is it in Tokyo", "current_time", "Asia/Tokyo"),
        ("What is 2*(3+4)?", "calculate", "**14**"),
        ("roll 3d6", "roll_dice", "3d6 gave"),
    ],
)
async def test_a_question_makes_one_call_between_two_texts(pool: Pool, message: str, tool: str, outcome: str) -> None:
    parts = await answer(pool, message)
    assert kinds(parts) == [Text, ToolStarted, ToolCompleted, Text, Ended]
    assert [part.tool_name for part in parts if isinstance(part, ToolStarted)] == [tool]
    assert outcome in text(parts)


async def test_several_calls_are_made_concurrently(pool: Pool) -> None:
    parts = await answer(pool, "What time is it in Paris, and what is 6*7? Roll d20.")
    assert kinds(parts) == [Text, ToolStarted, ToolCompleted, Text, Ended]
    assert len([part for part in parts if isinstance(part, ToolStarted)]) == 3
    assert "**42**" in text(parts)


async def test_the_answer_contains_the_error_of_a_failing_call(pool: Pool) -> None:
    parts = await answer(pool, "fail")
    (completed,) = [part for part in parts if isinstance(part, ToolCompleted)]
    assert completed.result is None
    assert "Division by zero" in str(completed.error)
    assert "Division by zero" in text(parts)


async def test_a_slow_call_reports_its_progress_and_can_be_cancelled(pool: Pool) -> None:
    parts = reply(run(pool, "slow"))
    async with asyncio.timeout(5):
        async for part in parts:
            if isinstance(part, ToolProgress):
                break
        await parts.aclose()  # type: ignore[attr-defined]
    assert part == ToolProgress("call_1", 1.0, 6.0, "Step 1 of 6")


async def test_the_answer_names_a_tool_that_is_missing(pool: Pool) -> None:
    agent = replace(AGENT, mcp_servers=["demo", "absent"], tools=["calculate"])
    parts = await answer(pool, "what time is it in Tokyo and what is 1+1", agent)
    assert "no tool named `current_time`" in text(parts)
    assert "`absent` is missing: Its command was not found." in text(parts)
    assert "**2**" in text(parts)
    assert kinds(await answer(pool, "roll 2d6", replace(AGENT, mcp_servers=[]))) == [Text, Ended]


@pytest.mark.parametrize(
    ("message", "calls"),
    [
        ("several", ["current_time", "calculate", "roll_dice", "slow_task"]),
        ("slow", ["slow_task"]),
        ("time in London and Berlin", ["current_time", "current_time"]),
        ("roll the dice", ["roll_dice"]),
        ("(it is 2+3)", ["calculate"]),
        ("compute 2 ** 10 - 1, please", ["calculate"]),
        ("Tell me about v1.2 of 3 things", []),
        ("sometimes I failover", []),
        ("", []),
    ],
)
def test_words_decide_which_tools_are_called(message: str, calls: list[str]) -> None:
    assert [use.name for use in requested_calls(message)] == calls


def test_expressions_are_extracted_from_their_sentence() -> None:
    found = [use.arguments["expression"] for use in requested_calls("(so 2+3), and -4 * (1.5 - 2). Also 10/4?")]
    assert found == ["2+3", "-4 * (1.5 - 2)", "10/4"]


def test_a_long_message_is_searched_quickly() -> None:
    started = time.monotonic()
    for piece in ("1+", "1 ", "(", "1d6 ", "((1", "-", "1.1.", "Time Europe/Paris "):
        assert len(requested_calls(piece * 100_000)) <= 8
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("demo", [None, 5, {}, {"delay_ms": "x"}, {"delay_ms": -1}, {"delay_ms": True}])
async def test_an_invalid_delay_is_ignored(pool: Pool, demo: object) -> None:
    parts = reply(run(pool, "hello", replace(AGENT, metadata={"demo": demo})))
    assert isinstance(await anext(parts), Text)
    await parts.aclose()  # type: ignore[attr-defined]
