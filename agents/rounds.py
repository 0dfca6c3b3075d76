"""The blank line between the texts of successive rounds of tool calls.

Models generate the text after a call without a separator from the text before it. The stored message contains one, so
that "Let me look.It is sunny." never appears; what is sent to the model contains none, so that the model's blocks
remain as it generated them. The separator depends only on the text before the call: it can be removed again exactly,
and what a provider has cached of a run remains the beginning of the next run's request.
"""

from __future__ import annotations


def separator(before: str) -> str:
    """The line ends that are missing for a blank line after `before`; "" if there is no text before the call."""
    if not before:
        return ""
    line_ends = len(before) - len(before.rstrip("\n"))
    return "\n\n"[line_ends:]


def without_separator(text: str, before: str) -> str:
    """Remove the separator that was inserted between `before` and `text`, which follows a call.

    Text that was stored by versions without separators loses at most line ends at its beginning.
    """
    return text.removeprefix(separator(before))
