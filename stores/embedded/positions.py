"""Positions of the embedded log: milliseconds and a sequence number, as text and as one integer that orders them."""

from __future__ import annotations

import re

_SEQUENCE_BITS = 20
_SEQUENCE = (1 << _SEQUENCE_BITS) - 1
_FORM = re.compile(r"(\d{1,15})-(\d{1,7})", re.ASCII)
LONGEST = "999999999999999-9999999"


def at_milliseconds(milliseconds: int) -> int:
    """Return the first position of that millisecond."""
    return milliseconds << _SEQUENCE_BITS


def milliseconds_of(position: int) -> int:
    """Return the milliseconds of a position."""
    return position >> _SEQUENCE_BITS


def text_of(position: int) -> str:
    """Return the position as clients get it, in the form of a stream id of Redis."""
    return f"{position >> _SEQUENCE_BITS}-{position & _SEQUENCE}"


def parse(text: str) -> int | None:
    """Return the position that `text_of` made this text of; None if there is none."""
    match = _FORM.fullmatch(text)
    if match is None:
        return None
    position = int(match[1]) << _SEQUENCE_BITS | int(match[2])
    return position if text_of(position) == text else None
