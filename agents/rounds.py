"""The blank line between the texts of successive tool rounds.

Models end the text before a call and begin the text behind it without a separator. The stored message contains one, so
that "Let me look.It is sunny." never appears; what is sent to the model contains none, so that the model's blocks stay
as it generated them. The separator depends only on the text before the call: it is removed again exactly, and what a
provider has cached of a run is still the beginning of the next run's request.
"""

from __future__ import annotations


def separator(before: str) -> str:
    """The line ends that `before` lacks for a blank line behind it; "" where there is no text before the call."""
    if not before:
        return ""
    line_ends = len(before) - len(before.rstrip("\n"))
    return "\n\n"[line_ends:]


def without_separator(text: str, before: str) -> str:
    """`text`, which follows a call, without the separator that was put between it and `before`.

    Text that was stored before there were separators loses at most line ends at its beginning.
    """
    return text.removeprefix(separator(before))
