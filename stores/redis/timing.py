"""The time constants of the log in Redis, which tests shorten."""

from __future__ import annotations

import msgspec


class RedisTiming(msgspec.Struct, frozen=True):
    """Times in seconds.

    Attributes:
        read: how long a request waits for Redis (I19).
        page: how long a feed waits for a page of its stream.
        close: how long closing the log may take to send what is pending.
        refill: the interval at which a feed reads its stream again, whatever pub/sub brought.
        linger: how long a feed without readers stays open.
        tick: the interval at which feeds are checked for the last two.
    """

    read: float = 2.0
    page: float = 2.0
    close: float = 2.0
    refill: float = 15.0
    linger: float = 5.0
    tick: float = 1.0
