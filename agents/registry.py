"""The kinds of agents: which functions generate the answers and titles for `agent.kind`.

Other packages add kinds by an entry point in the group `chat.agents`. A kind that needs resources is opened when the
server starts and closed after its last run. A faulty package is logged and skipped: it must not stop the server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib.metadata import EntryPoint, entry_points

import msgspec

from agent_chat.agents import titles
from agent_chat.agents.parts import AgentError
from agent_chat.agents.run import MakeTitle, Reply

logger = logging.getLogger(__name__)

GROUP = "chat.agents"
OPEN_SECONDS = 30.0
"""How long opening or closing the kind of an installed package may take."""


class Kind(msgspec.Struct, frozen=True):
    """A kind of agents: the function that generates answers, and the one that generates titles."""

    reply: Reply
    title: MakeTitle = titles.from_first_message


class OpenKind(msgspec.Struct, frozen=True):
    """A kind with resources: `open()` is an async context manager that yields the Kind.

    It is entered when the server starts and left when the server stops, after the last run, in the same task.

        @asynccontextmanager
        async def open_weather() -> AsyncIterator[Kind]:
            async with httpx.AsyncClient(base_url=os.environ["WEATHER_URL"]) as client:
                yield Kind(Weather(client).reply)

        weather = OpenKind(open_weather)  # what the entry point names
    """

    open: Callable[[], AbstractAsyncContextManager[Kind]]


class Registry(Mapping[str, Kind]):
    """The opened kinds by name."""

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self._kinds = dict(kinds)

    def __getitem__(self, name: str) -> Kind:
        return self._kinds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def kind(self, name: str) -> Kind:
        """The kind of that name. Raises: AgentError if this server does not have it (any more)."""
        if name not in self:
            raise AgentError(f"This server has no agents of kind {name!r}.")
        return self[name]


@asynccontextmanager
async def open_registry(kinds: Mapping[str, Kind | OpenKind], *, installed: bool = True) -> AsyncIterator[Registry]:
    """Open the given kinds and those of installed packages; a given kind hides an installed one of the same name.

    Raises: whatever opening or closing a given kind raises.
    """
    async with AsyncExitStack() as stack:
        opened: dict[str, Kind] = {}
        for name, kind in kinds.items():
            opened[name] = await stack.enter_async_context(kind.open()) if isinstance(kind, OpenKind) else kind
        for point in entry_points(group=GROUP) if installed else ():
            if point.name not in opened and (installed_kind := await _open_installed(point, stack)) is not None:
                opened[point.name] = installed_kind
        yield Registry(opened)


async def _open_installed(point: EntryPoint, stack: AsyncExitStack) -> Kind | None:
    """Load and open the kind of an installed package; None, and a warning, if that fails."""
    try:
        found = point.load()
        if isinstance(found, OpenKind):
            return await _open_guarded(point.name, found, stack)
        return found if isinstance(found, Kind) else Kind(found)
    except Exception:
        logger.warning("agent kind %r skipped: %s cannot be loaded or opened", point.name, point.value, exc_info=True)
        return None


async def _open_guarded(name: str, kind: OpenKind, stack: AsyncExitStack) -> Kind:
    """Open the kind within the time limit; the stack closes it, within the time limit too, and logs a failure."""
    opening = kind.open()
    async with asyncio.timeout(OPEN_SECONDS):
        opened = await opening.__aenter__()

    async def close() -> None:
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                await opening.__aexit__(None, None, None)
        except Exception:
            logger.exception("agent kind %r: closing failed", name)

    stack.push_async_callback(close)
    return opened
