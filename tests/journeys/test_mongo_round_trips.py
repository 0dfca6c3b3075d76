"""How many commands MongoDB gets for one posted message before `run.started` can be published."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pymongo.monitoring import CommandStartedEvent

from agent_chat.stores.contracts import EventLog, Store
from agent_chat.stores.embedded.log import EmbeddedLog
from agent_chat.stores.open import Where
from tests.support.mongo_commands import Read, opened
from tests.support.mongo_server import mongo_server as mongo_server
from tests.support.mongo_server import mongo_url as mongo_url
from tests.support.servers import live_server

COMMANDS = [
    "aggregate agents",
    "find threads",  # the service, to find the thread's agent
    "find threads",  # the claim: what its write depends on
    "findAndModify runs",
    "findAndModify threads",
]


class Sent(Read):
    """The commands in the order in which the driver sends them, each with its collection."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def started(self, event: CommandStartedEvent) -> None:
        super().started(event)
        self.sent.append(f"{event.command_name} {event.command.get(event.command_name)}")
        if self.sent[-1] == "delete runs":
            self._loop.call_soon_threadsafe(self.ended.set)  # the driver works in threads

    async def begin(self) -> None:
        """Wait until the last run's record is deleted, then count anew."""
        async with asyncio.timeout(10):
            await self.ended.wait()
        self.ended.clear()
        self.sent.clear()

    def before_the_run(self) -> list[str]:
        """Up to the write that claims the thread: `run.started` is published next."""
        return self.sent[: self.sent.index("findAndModify threads") + 1]


async def test_a_posted_message_is_claimed_by_few_commands(tmp_path: Path, mongo_url: str) -> None:
    read = Sent()

    @asynccontextmanager
    async def backends(where: Where) -> AsyncIterator[tuple[Store, EventLog]]:
        log = EmbeddedLog()
        async with opened(mongo_url, read=read) as store:
            yield store, log
        await log.close()

    async with live_server(tmp_path, backends) as live:
        thread = await live.scripted_thread()
        by_default = thread.replace(thread.split("/")[4], "default")
        await live.post(thread, "say first")  # from now on the key's principal and a piece of the quota are at hand
        for path in (thread, by_default):
            await read.begin()
            assert (await live.post(path, "say more")).status_code == 201
            assert sorted(read.before_the_run()) == COMMANDS
