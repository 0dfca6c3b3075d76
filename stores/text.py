"""Text that every store and every JSON document can hold."""

from __future__ import annotations


def without_surrogates(text: str) -> str:
    """The same text with surrogate pairs as one character each, and U+FFFD in place of a lone surrogate."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
