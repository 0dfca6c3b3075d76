"""Titles from the first user's message."""

from __future__ import annotations

import itertools
import time

import pytest

from agent_chat.agents import Run, RunTools
from agent_chat.agents.mcp.pool import Pool
from agent_chat.agents.titles import LENGTH, from_first_message
from agent_chat.server.titles import TITLE_LENGTH, sanitized
from agent_chat.stores.models import Agent, Attachment, Message, Principal, Role
from tests.support.samples import new_file

AGENT = Agent("a", "o", "", "demo", None, "", [], None, None, True, {}, "", "")


def message(content: str, role: Role = "user", attachments: list[Attachment] | None = None) -> Message:
    return Message("m", "t", content, "", role, [], attachments or [], {}, "")


async def title(*messages: Message) -> str:
    return await from_first_message(
        Run("r", Principal("o", "u"), AGENT, list(messages), RunTools(Pool({}).toolbox(AGENT)))
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Hello", "Hello"),
        ("  What\n\n is\tthis? ", "What is this?"),
        ("# Plan\n- **one**\n- `two`", "Plan one two"),
        ("> See [the docs](https://example.org/x) for *more*", "See the docs for more"),
        ("```python\nprint(1)\n```", "print(1)"),
        ("What is 2*3*4 and snake_case_name?", "What is 2*3*4 and snake_case_name?"),
        ("a" * 60, "a" * 60),
        ("a" * 61, "a" * 59 + "…"),
        ("", "New thread"),
        (" \n ", "New thread"),
    ],
)
async def test_a_title_is_the_plain_text_of_the_message(content: str, expected: str) -> None:
    assert await title(message(content)) == expected


async def test_a_long_message_is_cut_between_words_and_the_cut_is_marked() -> None:
    made = await title(message("seven letters and words, " * 50))
    assert made == "seven letters and words, seven letters and words, seven…"
    assert len(made) <= LENGTH


async def test_it_is_the_first_message_of_the_user() -> None:
    made = await title(message("Be kind.", "system"), message("First"), message("Answer", "assistant"), message("2nd"))
    assert made == "First"


async def test_a_message_without_text_has_the_title_of_its_first_file() -> None:
    assert await title(message("", attachments=[new_file("t", filename="report.pdf").attachment])) == "report.pdf"


async def test_a_thread_without_text_is_a_new_thread() -> None:
    assert await title() == "New thread"


async def test_a_megabyte_of_markdown_is_converted_quickly() -> None:
    for marks in ("[", "*", "`", "**a ", "- ", "> ", "\n"):
        assert len(await title(message(marks * (1_000_000 // len(marks))))) <= LENGTH


PIECES = [
    "\n",
    " \n",
    "\t\n",
    "[",
    "](",
    "[](",
    "![a](b",
    "*",
    "**",
    "**a",
    "`",
    "`a",
    "`> ",
    "__a_",
    "# ",
    "1. ",
    "```",
    "*a",
    "- ",
]


async def test_no_message_takes_long() -> None:
    """The best of three measurements counts, since other processes use the core too."""
    for piece in [*PIECES, *map("".join, itertools.pairwise(PIECES))]:
        given = message(piece * 2_000)
        took = [await _seconds(given) for _ in range(3)]
        assert min(took) < 0.01, repr(piece)


async def _seconds(given: Message) -> float:
    began = time.thread_time()
    await title(given)
    return time.thread_time() - began


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Plain", "Plain"),
        ("a\0b\x07c", "a b c"),
        ("Fox \ud83e", "Fox \ufffd"),
        ("Fox \ud83e\udd8a", "Fox 🦊"),
        (" two\nlines\u2028 ", "two lines"),
        ("word " * 1_000_000, "word " * 19 + "word…"),
        ("\0" * 10, ""),
        ("\r\n", ""),
    ],
)
def test_a_title_is_sanitized(given: str, expected: str) -> None:
    assert sanitized(given) == expected
    assert len(sanitized(given)) <= TITLE_LENGTH
