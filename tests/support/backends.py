"""How tests open a store, and a clock that they set."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from agent_chat.stores.contracts import Store
from agent_chat.stores.models import Clock, utcnow
from tests.support.mongo_server import mongo_server as mongo_server
from tests.support.mongo_server import mongo_url as mongo_url
from tests.support.services import redis_url as redis_url


class OpenStore(Protocol):
    """Open this test's database; opening it again finds its data. `peer`: open it as another process would."""

    def __call__(
        self, *, lease: float = 20.0, clock: Clock = utcnow, peer: bool = False
    ) -> AbstractAsyncContextManager[Store]: ...


class Seconds:
    """A monotonic clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
