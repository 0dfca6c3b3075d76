"""The Toolbox of one agent for one run: which MCP tools it has, their calls, and what is kept of the results.

Calls are plain tasks that say what happens into a small buffer, and the generator only reads that buffer: no cancel
scope stands open across a `yield`, so it may be closed from any task.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from jsonschema.exceptions import best_match  # type: ignore[import-untyped]

from agent_chat.agents import Tool, ToolCompleted, ToolPart, ToolProgress, ToolStarted, ToolUse
from agent_chat.agents.mcp.connection import CallFailed, Connection, Gone, Refused, Unreachable
from agent_chat.agents.mcp.results import completed, cut
from agent_chat.agents.mcp.slot import Slot
from agent_chat.agents.mcp.tools import Listed
from agent_chat.stores.models import JSONObject, Principal

READY_SECONDS = 2.0
"""How long a run waits for servers that are still being connected before it goes on without them."""
NOTICE_SECONDS = 0.1
"""A wait that is longer than this is reported."""
META = "agent-chat-server/"
"""The namespace of what each call's `_meta` says of the caller: `organization_id` and `user_id`."""

_log = logging.getLogger(__name__)


class _Route(msgspec.Struct, frozen=True):
    """Where a tool is found: its slot, its own name there, and what was listed."""

    slot: Slot
    name: str
    listed: Listed


class AgentTools:
    """The Toolbox of one agent: what its servers list, as far as the operator and the agent allow it.

    Args:
        serves: whether a server is configured for the caller's organization.
        waiting: called with True when servers are waited for noticeably, and with False when that is over.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot | None],
        allowed: Sequence[str] | None,
        who: Principal,
        serves: Callable[[Slot, Principal], Awaitable[bool]],
        waiting: Callable[[bool], None],
    ) -> None:
        self._slots = slots
        self._allowed = allowed
        self._who = who
        self._serves = serves
        self._waiting = waiting
        self._missing: dict[str, str] = {}
        self._routes: dict[str, _Route] | None = None

    @property
    def missing(self) -> dict[str, str]:
        """See Toolbox."""
        return dict(self._missing)

    async def available(self) -> list[Tool]:
        """See Toolbox."""
        return [
            Tool(name, route.listed.description, route.listed.parameters, route.listed.repeatable)
            for name, route in (await self._find_routes(READY_SECONDS)).items()
        ]

    async def _find_routes(self, patience: float | None) -> dict[str, _Route]:
        """The tools that there are, by the names that the agent knows them by; servers are waited for that long."""
        self._missing = {name: "It is not configured." for name, slot in self._slots.items() if slot is None}
        found = [route for routes in await self._found_everywhere(patience) for route in routes]
        names = [route.name for route in found]
        self._routes = {}
        for route in found:
            shared = names.count(route.name) > 1
            self._routes.setdefault(f"{route.slot.name}__{route.name}" if shared else route.name, route)
        return self._routes

    async def _found_everywhere(self, patience: float | None) -> list[list[_Route]]:
        """What each server has. A wait that can be noticed is reported, and its end too."""
        reported = False

        def report() -> None:
            nonlocal reported
            reported = True
            self._waiting(True)

        slots = [slot for slot in self._slots.values() if slot is not None]
        notice = asyncio.get_running_loop().call_later(NOTICE_SECONDS, report)
        try:
            return await asyncio.gather(*(self._found(slot, patience) for slot in slots))
        finally:
            notice.cancel()
            if reported:
                self._waiting(False)

    async def _found(self, slot: Slot, patience: float | None) -> list[_Route]:
        if not await self._serves(slot, self._who):
            self._missing[slot.name] = "It is not configured for this organization."
            return []
        try:
            connection = await slot.connection(self._who, patience)
        except Unreachable as error:
            self._missing[slot.name] = str(error)
            return []
        routes = [_Route(slot, name, listed) for name, listed in connection.tools.items()]
        return [route for route in routes if self._allows(route)]

    def _allows(self, route: _Route) -> bool:
        """Both lists must have it; an agent's may name it as `server__tool` too."""
        operators = route.slot.server.tools
        if operators is not None and route.name not in operators:
            return False
        return self._allowed is None or not {route.name, f"{route.slot.name}__{route.name}"}.isdisjoint(self._allowed)

    async def call(self, uses: Sequence[ToolUse], *, round: int = 0) -> AsyncGenerator[ToolPart, None]:
        """See Toolbox. All calls are told as started before the first one is made."""
        if self._routes is None:  # nobody has asked what there is: a call is worth the whole time of connecting
            await self._find_routes(None)
        for use in uses:
            arguments = use.arguments if isinstance(use.arguments, dict) else {}
            yield ToolStarted(use.id, use.name, arguments, round, self._is_repeatable(use))
        news = _News()
        calls = [asyncio.create_task(self._make(use, place, news)) for place, use in enumerate(uses)]
        try:
            for _ in calls:
                while True:
                    part = await news.next()
                    yield part
                    if isinstance(part, ToolCompleted):
                        break
        finally:
            for call in calls:
                call.cancel()
            if calls:
                await asyncio.wait(calls)

    def _is_repeatable(self, use: ToolUse) -> bool:
        """Whether making the call again does no harm: by its tool's own declaration, or because it is not made."""
        route = (self._routes or {}).get(use.name)
        return route is None or route.listed.repeatable or _misfit(route.listed.check, use.arguments) is not None

    async def _make(self, use: ToolUse, place: int, news: _News) -> None:
        async def progressed(progress: float, total: float | None, message: str | None) -> None:
            news.tell(place, ToolProgress(use.id, progress, total, message[:500] if message else message))

        completed = ToolCompleted(use.id, error="The call was cancelled.")
        try:
            completed = await self._outcome(use, progressed)
        finally:  # whatever happens: what was started completes
            news.tell(place, completed)

    async def _outcome(self, use: ToolUse, progressed: Callable[..., Any]) -> ToolCompleted:
        route = (self._routes or {}).get(use.name)
        if route is None:
            return ToolCompleted(use.id, error=self._absent(use.name))
        server = route.slot.name
        connection: Connection | None = None
        try:
            if (misfit := _misfit(route.listed.check, use.arguments)) is not None:
                return ToolCompleted(use.id, error=misfit)
            connection = await route.slot.connection(self._who)
            async with asyncio.timeout(route.slot.server.timeout):
                answer = await connection.call(route.name, use.arguments, self._meta, progressed)
            route.slot.trust(self._who)
            return completed(use.id, answer)
        except Unreachable as error:
            why = f"The server {server} is unavailable. {error}"
        except TimeoutError:
            why = f"The tool did not answer within {route.slot.server.timeout:g} s."
        except Gone:
            if connection is not None and not connection.proven:
                route.slot.blame(self._who)
            why = f"The server {server} ended during the call."
        except CallFailed as error:
            why = str(error)
        except Refused as error:
            why = f"The server refused it: {error}"
        except Exception as error:
            _log.warning("MCP server %s: the call of %s failed: %.500r", server, route.name, error)
            why = f"The server {server} gave an answer that can't be used."
        return ToolCompleted(use.id, error=cut(why))

    @property
    def _meta(self) -> JSONObject:
        return {f"{META}organization_id": self._who.organization_id, f"{META}user_id": self._who.user_id}

    def _absent(self, name: str) -> str:
        """Why there is no such tool: the server that has it is unavailable, or may be."""
        for slot in self._slots.values():
            if slot is None or slot.name not in self._missing:
                continue
            plain = name.removeprefix(f"{slot.name}__")
            if plain in slot.known and self._allows(_Route(slot, plain, slot.known[plain])):
                return f"The server {slot.name} is unavailable. {self._missing[slot.name]}"
        unavailable = f" These servers are unavailable: {', '.join(self._missing)}." if self._missing else ""
        return cut(f"There is no tool named {name[:200]!r}.{unavailable}")


class _News:
    """What happens in several calls, in order. Of a call's progress only the newest waits: a flood costs nothing."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, bool], ToolPart] = {}
        self._completed: set[int] = set()
        self._wake = asyncio.Event()

    def tell(self, place: int, part: ToolProgress | ToolCompleted) -> None:
        if place in self._completed:
            return  # progress that comes behind the result
        done = isinstance(part, ToolCompleted)
        if done:
            self._completed.add(place)
        self._waiting[place, done] = part
        self._wake.set()

    async def next(self) -> ToolPart:
        while not self._waiting:
            self._wake.clear()
            await self._wake.wait()
        return self._waiting.pop(next(iter(self._waiting)))


def _misfit(check: Any, arguments: object) -> str | None:
    """Why the arguments don't fit the tool's schema; null if they do."""
    if not isinstance(arguments, dict):
        return "The arguments must be a JSON object."
    try:
        error = best_match(check.iter_errors(arguments))
    except Exception:  # a $ref to nowhere, or endless: the server shall judge
        return None
    if error is None:
        return None
    where = ".".join(str(step) for step in error.absolute_path)
    return cut(f"The arguments don't fit the tool{f', at {where}' if where else ''}: {error.message}")
