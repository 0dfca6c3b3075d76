"""Text that every store and every JSON document can hold."""

from __future__ import annotations


def without_surrogates(text: str) -> str:
    """Return the text with each surrogate pair as one character, and U+FFFD in place of each lone surrogate."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
