"""Which of a thread's messages are read if not all of them fit (I9)."""

from __future__ import annotations

import pytest

from agent_chat.stores.fitting import select_fitting


@pytest.mark.parametrize(
    ("max_bytes", "count"), [(0, 1), (1, 1), (10, 1), (19, 1), (20, 2), (39, 3), (40, 4), (10**9, 4)]
)
def test_the_latest_messages_that_fit_are_read_and_always_the_last(max_bytes: int, count: int) -> None:
    assert select_fitting([10, 10, 10, 10], max_bytes) == list(range(count))


def test_no_message_older_than_one_that_does_not_fit_is_read() -> None:
    assert select_fitting([10, 50, 1], 30) == [0]


def test_a_running_message_is_always_read() -> None:
    assert select_fitting([10, 10, 10], 10, running=2) == [0, 2]
    assert select_fitting([10, 10, 10], 30, running=1) == [0, 1, 2]
    assert select_fitting([], 0) == []
