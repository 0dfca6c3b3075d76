"""Titles without a model: the first words of the first user's message.

The default of every kind. Only the commonest Markdown is removed, by patterns: parsing it was refused, since nothing
but a reader's eye depends on a title.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent_chat.agents import Run

LENGTH = 60
"""The maximum number of characters in a title, including the ellipsis."""

FALLBACK = "New thread"

_READ_LENGTH = 2_000
_MARKDOWN = (  # each repetition is bounded or cannot start twice in one place: the time is linear in the text
    (re.compile(r"^[^\S\n]*+(`{3,}|~{3,}).*$", re.MULTILINE), " "),  # the fences of code, not the code
    (re.compile(r"!?\[([^\[\]]{0,200}+)\]\([^()\s]{0,500}+\)"), r"\1"),  # links and images: their words
    (re.compile(r"^[^\S\n]*+(#{1,6}|>|[-*+]|\d{1,3}\.)[^\S\n]+", re.MULTILINE), ""),  # headings, quotes, list marks
    (re.compile(r"(\*\*|__|~~|`)(?=\S)(.{1,200}?)(?<=\S)\1"), r"\2"),  # strong, struck, code
    (re.compile(r"(?<![\w*])\*(?=\S)([^*\n]{1,200}?)(?<=\S)\*(?![\w*])"), r"\1"),  # emphasis, not 2*3*4
)


async def from_first_message(run: Run) -> str:
    """A plain title of at most 60 characters: the first words of the first user's message, else its first file's name.

    A thread without a user's message is named after its first message.
    """
    if not run.messages:
        return FALLBACK
    first = next((message for message in run.messages if message.role == "user"), run.messages[0])
    filename = first.attachments[0].filename if first.attachments else None
    return shorten(_plain_text(first.content)) or shorten(" ".join(str(filename or "").split())) or FALLBACK


def _plain_text(markdown: str) -> str:
    text = markdown.lstrip()[:_READ_LENGTH]
    for pattern, replacement in _MARKDOWN:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def shorten(text: str, length: int = LENGTH) -> str:
    """Cut the text to `length` characters, between words if possible, and mark the cut with an ellipsis."""
    if len(text) <= length:
        return text
    start = text[: length - 1]
    if not text[length - 1].isspace() and " " in start:
        start = start[: start.rindex(" ")]
    return start.rstrip(" ,;:.-") + "…"
