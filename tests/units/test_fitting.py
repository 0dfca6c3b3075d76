"""Which of a thread's messages are read where not all of them fit."""

from __future__ import annotations

import pytest

from agent_chat.stores.fitting import select_fitting


@pytest.mark.parametrize(
    ("max_bytes", "count"), [(0, 1), (1, 1), (10, 1), (19, 1), (20, 2), (39, 3), (40, 4), (10**9, 4)]
)
def test_the_latest_that_fit_are_read_and_the_very_latest_always(max_bytes: int, count: int) -> None:
    assert select_fitting([10, 10, 10, 10], max_bytes) == list(range(count))


def test_nothing_older_is_read_behind_one_that_does_not_fit() -> None:
    assert select_fitting([10, 50, 1], 30) == [0]


def test_a_running_message_is_read_wherever_it_stands() -> None:
    assert select_fitting([10, 10, 10], 10, running=2) == [0, 2]
    assert select_fitting([10, 10, 10], 30, running=1) == [0, 1, 2]
    assert select_fitting([], 0) == []
