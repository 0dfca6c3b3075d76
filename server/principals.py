"""Credentials, and the lookup of their Principals, cached for a few seconds (`Timing.key_lookup`).

A revoked key or an ended session works so much longer at most. Lookups that found nothing are not cached, so unknown
secrets take no memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import msgspec

from agent_chat.stores.contracts import Directory
from agent_chat.stores.models import Principal, hash_of

_SIZE = 10_000


class Credential(msgspec.Struct, frozen=True):
    """An API key, or the token of a browser's session."""

    kind: Literal["key", "session"]
    secret: str


class Principals:
    """Looks up the Principals of credentials.

    Args:
        seconds: how long a lookup is cached; 0 caches nothing.
        clock: monotonic seconds.
    """

    def __init__(
        self, directory: Directory, seconds: float, *, size: int = _SIZE, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._directory = directory
        self._seconds = seconds
        self._size = size
        self._clock = clock
        self._found: dict[tuple[str, str], tuple[Principal, float]] = {}

    def __len__(self) -> int:
        return len(self._found)

    async def find(self, credential: Credential) -> Principal | None:
        """Return the credential's Principal, from the cache or the database; None if it is not valid.

        Raises: StoreUnavailable.
        """
        if not credential.secret:
            return None
        cached = self._found.get(_name(credential))
        if cached is not None and self._clock() < cached[1]:
            return cached[0]
        return await self.check(credential)

    async def check(self, credential: Credential) -> Principal | None:
        """Return the credential's Principal from the database, and cache it. Raises: StoreUnavailable."""
        until = self._clock() + self._seconds  # measured from before the read, so that a change during the read counts
        if credential.kind == "key":
            principal = await self._directory.find_principal(credential.secret)
        else:
            principal = await self._directory.find_session_principal(credential.secret)
        self.forget(credential)
        if principal is not None and self._seconds:
            if len(self._found) >= self._size:
                del self._found[next(iter(self._found))]  # the oldest lookup
            self._found[_name(credential)] = (principal, until)
        return principal

    def forget(self, credential: Credential) -> None:
        """Remove a credential from the cache."""
        self._found.pop(_name(credential), None)


def _name(credential: Credential) -> tuple[str, str]:
    return credential.kind, hash_of(credential.secret)
