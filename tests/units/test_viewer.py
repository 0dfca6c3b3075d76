"""Which of a thread's messages are shown where not all of them fit."""

from __future__ import annotations

import msgspec
import pytest

from server.viewer import shortened
from stores.models import Message, Thread, new_answer

WHEN = "2026-01-31T12:00:00.000Z"


def message(content: str) -> Message:
    return Message(content[:9], "t", content, "", "user", [], [], {}, WHEN)


def thread(*messages: Message) -> Thread:
    return Thread("t", "a", "u", "o", "", {}, WHEN, WHEN, False, list(messages))


MESSAGES = [message(f"{number}" * 1_000) for number in range(4)]
ONE = len(msgspec.json.encode(MESSAGES[0]))
RUNNING = new_answer("t", "q", None, WHEN)


@pytest.mark.parametrize(
    ("max_bytes", "count"),
    [(0, 1), (ONE, 1), (2 * ONE - 1, 1), (2 * ONE, 2), (4 * ONE - 1, 3), (4 * ONE, 4), (10**9, 4)],
)
def test_the_latest_that_fit_are_kept_and_the_very_latest_always(max_bytes: int, count: int) -> None:
    assert shortened(thread(*MESSAGES), max_bytes).messages == MESSAGES[-count:]


def test_nothing_older_is_kept_behind_one_that_does_not_fit() -> None:
    big = message("x" * 5_000)
    assert shortened(thread(MESSAGES[0], big, MESSAGES[1]), 3 * ONE).messages == [MESSAGES[1]]


def test_a_running_message_is_kept_wherever_it_stands() -> None:
    assert shortened(thread(MESSAGES[0], RUNNING, *MESSAGES[1:]), ONE).messages == [RUNNING, MESSAGES[3]]
    assert shortened(thread(), 0).messages == []
