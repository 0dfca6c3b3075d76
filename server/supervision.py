"""Background loops that are restarted: one that raises, or returns, is logged and started again.

Each pause before a restart is longer than the last one, up to a bound; a loop that then works for a minute counts as
healthy again. Readiness reports a loop that failed at least twice in a row.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from agent_chat.server.timing import Timing

logger = logging.getLogger(__name__)

_FAILING = 2
"""So many failures in a row are reported: a single one can be the database's restart."""


class Supervisor:
    """The background loops of one process.

    Attributes:
        restarts: how many times a loop was started again.
    """

    def __init__(self, timing: Timing = Timing()) -> None:
        self.restarts = 0
        self._timing = timing
        self._failures: dict[str, int] = {}
        """Failures in a row of each loop that is not healthy."""
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def failing(self) -> list[str]:
        """The names of the loops that failed at least twice in a row, or whose task has ended."""
        dead = {task.get_name() for task in self._tasks if task.done()}
        return sorted({name for name, count in self._failures.items() if count >= _FAILING} | dead)

    def start(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        """Run `loop()` in a task, again and again until `close`."""
        self._tasks.append(asyncio.create_task(self._run(name, loop), name=name))

    async def close(self) -> None:
        """Cancel the loops and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _run(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        while True:
            reset = asyncio.get_running_loop().call_later(self._timing.healthy, self._failures.pop, name, None)
            try:
                await loop()
                logger.error("the background loop %r returned; it is started again", name)
            except Exception:
                logger.exception("the background loop %r failed; it is started again", name)
            finally:
                reset.cancel()
            self.restarts += 1
            failures = self._failures[name] = self._failures.get(name, 0) + 1
            await asyncio.sleep(min(self._timing.restart * 2 ** (failures - 1), self._timing.longest_restart))
