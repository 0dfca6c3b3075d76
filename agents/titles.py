"""Titles made without a model: the first words of the first user's message.

What an agent's kind uses unless it brings something better. Only the commonest Markdown is taken away, by patterns:
parsing it properly was refused, since a title is a hint for the eye and nothing is built on it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent_chat.agents import Run

LENGTH = 60
"""The most characters in a title, the ellipsis included."""

FALLBACK = "New thread"

_LOOKED_AT = 2_000
_MARKDOWN = (  # each repetition is bounded or cannot start twice in one place: the time is linear in the text
    (re.compile(r"^[^\S\n]*+(`{3,}|~{3,}).*$", re.MULTILINE), " "),  # the fences of code, not the code
    (re.compile(r"!?\[([^\[\]]{0,200}+)\]\([^()\s]{0,500}+\)"), r"\1"),  # links and images: their words
    (re.compile(r"^[^\S\n]*+(#{1,6}|>|[-*+]|\d{1,3}\.)[^\S\n]+", re.MULTILINE), ""),  # headings, quotes, list marks
    (re.compile(r"(\*\*|__|~~|`)(?=\S)(.{1,200}?)(?<=\S)\1"), r"\2"),  # strong, struck, code
    (re.compile(r"(?<![\w*])\*(?=\S)([^*\n]{1,200}?)(?<=\S)\*(?![\w*])"), r"\1"),  # emphasis, not 2*3*4
)


async def from_first_message(run: Run) -> str:
    """A plain title of at most 60 characters from the first user's message: its words, else its first file's name.

    A thread without one is named after its first message.
    """
    if not run.messages:
        return FALLBACK
    first = next((message for message in run.messages if message.role == "user"), run.messages[0])
    filename = first.attachments[0].filename if first.attachments else None
    return shortened(_plain(first.content)) or shortened(" ".join(str(filename or "").split())) or FALLBACK


def _plain(markdown: str) -> str:
    text = markdown.lstrip()[:_LOOKED_AT]
    for pattern, instead in _MARKDOWN:
        text = pattern.sub(instead, text)
    return " ".join(text.split())


def shortened(text: str, length: int = LENGTH) -> str:
    """At most so many characters, cut between words; a first word that is longer is cut itself."""
    if len(text) <= length:
        return text
    start = text[: length - 1]
    if not text[length - 1].isspace() and " " in start:
        start = start[: start.rindex(" ")]
    return start.rstrip(" ,;:.-") + "…"
