"""Background loops that do not stop for good: one that raises, or returns, is logged and started again.

Each wait before a new start is longer than the last, up to half a minute; a loop that then works for a minute counts as
healthy again. Readiness reports a loop that is waiting for its second or a later start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
HEALTHY_SECONDS = 60.0
_FAILING = 2


class Supervisor:
    """The background loops of one process, started by `start` and ended by `close`."""

    def __init__(self) -> None:
        self.restarts = 0
        self._failures: dict[str, int] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def failing(self) -> list[str]:
        """The names of the loops that failed at least twice in a row, or whose task is gone."""
        dead = {task.get_name() for task in self._tasks if task.done()}
        return sorted({name for name, count in self._failures.items() if count >= _FAILING} | dead)

    def start(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        """Run `loop()` in a task for as long as this is open."""
        self._tasks.append(asyncio.create_task(self._run(name, loop), name=name))

    async def close(self) -> None:
        """Cancel all loops and wait for their end."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _run(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        while True:
            forgiving = asyncio.get_running_loop().call_later(HEALTHY_SECONDS, self._failures.pop, name, None)
            try:
                await loop()
                logger.error("the background loop %r returned and is started again", name)
            except Exception:
                logger.exception("the background loop %r failed and is started again", name)
            finally:
                forgiving.cancel()
            self.restarts += 1
            failures = self._failures[name] = self._failures.get(name, 0) + 1
            await asyncio.sleep(min(FIRST_WAIT_SECONDS * 2 ** (failures - 1), LONGEST_WAIT_SECONDS))
