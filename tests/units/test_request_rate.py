"""The requests that an organization may send in a minute."""

from __future__ import annotations

import threading

import pytest

from agent_chat.server.errors import RateLimited
from agent_chat.server.limits import Limits, RequestRate


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_each_organization_has_its_own_count_and_the_next_minute_starts_at_zero() -> None:
    clock = Clock()
    rate = RequestRate(Limits(requests=2), clock=clock)
    for _ in range(2):
        rate.count("one")
        rate.count("other")
    clock.now += 59.5
    with pytest.raises(RateLimited) as refused:
        rate.count("one")
    assert refused.value.retry_after == 1
    clock.now += refused.value.retry_after
    rate.count("one")
    rate.count("one")
    with pytest.raises(RateLimited) as refused:
        rate.count("one")
    assert refused.value.retry_after == 60


def test_counting_requests_starts_no_thread() -> None:
    before = set(threading.enumerate())
    rate = RequestRate(Limits())
    for _ in range(100):
        rate.count("one")
        assert set(threading.enumerate()) <= before
