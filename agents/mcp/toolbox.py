"""The toolbox of one agent for one run: its MCP tools, and the calls to them.

Each call is a plain task that puts its parts into a queue, and the generator only reads that queue: no cancel scope is
open across a `yield`, so the generator may be closed from any task.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from jsonschema.exceptions import best_match  # type: ignore[import-untyped]

from agent_chat.agents import Tool, ToolCompleted, ToolPart, ToolProgress, ToolStarted, ToolUse
from agent_chat.agents.mcp.connection import CallFailed, CallRejected, Connection, ConnectionLost, ServerUnavailable
from agent_chat.agents.mcp.results import build_completion, truncate_error
from agent_chat.agents.mcp.slot import Slot
from agent_chat.agents.mcp.tools import ListedTool
from agent_chat.stores.models import JSONObject, Principal

READY_SECONDS = 2.0
"""How long a run waits for servers that are connecting before it continues without them."""
NOTICE_SECONDS = 0.1
"""Longer waits for servers are reported."""
META_PREFIX = "agent-chat-server/"
"""The namespace of `organization_id` and `user_id` in the `_meta` of each call."""

_log = logging.getLogger(__name__)


class _Route(msgspec.Struct, frozen=True):
    """Where a tool is found: its slot, and its name and description on that server."""

    slot: Slot
    name: str
    tool: ListedTool


class AgentTools:
    """The Toolbox of one agent: the tools that its servers list and that the operator and the agent allow.

    Args:
        slots: the agent's servers by name; None for one that is not configured.
        allowed: the names of the tools that the agent allows. None: all.
        principal: the principal of the run.
        is_allowed: whether the principal's organization may use a server.
        waiting: called with True when a wait for servers becomes noticeable, and with False when it is over.

    Private attributes:
        _missing: the servers that were unavailable when the tools were listed last, with the reasons.
        _routes: the agent's tools by name. None until they are first listed.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot | None],
        allowed: Sequence[str] | None,
        principal: Principal,
        is_allowed: Callable[[Slot, Principal], Awaitable[bool]],
        waiting: Callable[[bool], None],
    ) -> None:
        self._slots = slots
        self._allowed = allowed
        self._who = principal
        self._is_allowed = is_allowed
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
            Tool(name, route.tool.description, route.tool.parameters, route.tool.repeatable)
            for name, route in (await self._update_routes(READY_SECONDS)).items()
        ]

    async def _update_routes(self, wait_seconds: float | None) -> dict[str, _Route]:
        """List the tools by the names that the agent uses for them: `server__tool` where servers share a name."""
        self._missing = {name: "It is not configured." for name, slot in self._slots.items() if slot is None}
        routes = [route for of_server in await self._list_servers(wait_seconds) for route in of_server]
        names = [route.name for route in routes]
        self._routes = {}
        for route in routes:
            is_shared = names.count(route.name) > 1
            self._routes.setdefault(f"{route.slot.name}__{route.name}" if is_shared else route.name, route)
        return self._routes

    async def _list_servers(self, wait_seconds: float | None) -> list[list[_Route]]:
        """List the tools of each server. Report a noticeable wait, and its end."""
        is_reported = False

        def report() -> None:
            nonlocal is_reported
            is_reported = True
            self._waiting(True)

        slots = [slot for slot in self._slots.values() if slot is not None]
        timer = asyncio.get_running_loop().call_later(NOTICE_SECONDS, report)
        try:
            return await asyncio.gather(*(self._list_server(slot, wait_seconds) for slot in slots))
        finally:
            timer.cancel()
            if is_reported:
                self._waiting(False)

    async def _list_server(self, slot: Slot, wait_seconds: float | None) -> list[_Route]:
        if not await self._is_allowed(slot, self._who):
            self._missing[slot.name] = "It is not configured for this organization."
            return []
        try:
            connection = await slot.get_connection(self._who, wait_seconds)
        except ServerUnavailable as error:
            self._missing[slot.name] = str(error)
            return []
        routes = [_Route(slot, name, tool) for name, tool in connection.tools.items()]
        return [route for route in routes if self._allows(route)]

    def _allows(self, route: _Route) -> bool:
        """Whether the operator's and the agent's lists both have the tool; the agent's may name it `server__tool`."""
        configured = route.slot.server.tools
        if configured is not None and route.name not in configured:
            return False
        return self._allowed is None or not {route.name, f"{route.slot.name}__{route.name}"}.isdisjoint(self._allowed)

    async def call(self, uses: Sequence[ToolUse], *, round: int = 0) -> AsyncGenerator[ToolPart, None]:
        """See Toolbox."""
        if self._routes is None:  # the tools were never listed: a call is worth waiting until connecting ends
            await self._update_routes(None)
        for use in uses:
            arguments = use.arguments if isinstance(use.arguments, dict) else {}
            yield ToolStarted(use.id, use.name, arguments, round, self._is_repeatable(use))
        parts = _PartQueue()
        tasks = [asyncio.create_task(self._run_call(use, index, parts)) for index, use in enumerate(uses)]
        try:
            for _ in tasks:
                while True:
                    part = await parts.get()
                    yield part
                    if isinstance(part, ToolCompleted):
                        break
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    def _is_repeatable(self, use: ToolUse) -> bool:
        """Whether the call may be repeated: the tool declares it, or the call is not made at all."""
        route = (self._routes or {}).get(use.name)
        return route is None or route.tool.repeatable or _check_arguments(route.tool, use.arguments) is not None

    async def _run_call(self, use: ToolUse, index: int, parts: _PartQueue) -> None:
        async def put_progress(progress: float, total: float | None, message: str | None) -> None:
            parts.put(index, ToolProgress(use.id, progress, total, message[:500] if message else message))

        completion = ToolCompleted(use.id, error="The call was cancelled.")
        try:
            completion = await self._call_tool(use, put_progress)
        finally:  # also on cancellation: every ToolStarted is followed by a ToolCompleted
            parts.put(index, completion)

    async def _call_tool(self, use: ToolUse, progress: Callable[..., Any]) -> ToolCompleted:
        route = (self._routes or {}).get(use.name)
        if route is None:
            return ToolCompleted(use.id, error=self._describe_unknown_tool(use.name))
        server = route.slot.name
        connection: Connection | None = None
        try:
            if (invalid := _check_arguments(route.tool, use.arguments)) is not None:
                return ToolCompleted(use.id, error=invalid)
            connection = await route.slot.get_connection(self._who)
            async with asyncio.timeout(route.slot.server.timeout):
                result = await connection.call(route.name, use.arguments, self._meta, progress)
            route.slot.record_success(self._who)
            return build_completion(use.id, result)
        except ServerUnavailable as error:
            reason = f"The server {server} is unavailable. {error}"
        except TimeoutError:
            reason = f"The tool did not respond within {route.slot.server.timeout:g} s."
        except ConnectionLost:
            if connection is not None and not connection.is_stable:
                route.slot.record_lost_call(self._who)
            reason = f"The server {server} disconnected during the call."
        except CallFailed as error:
            reason = str(error)
        except CallRejected as error:
            reason = f"The server rejected the call: {error}"
        except Exception as error:
            _log.warning("MCP server %s: calling %s failed: %.500r", server, route.name, error)
            reason = f"The server {server} returned an invalid response."
        return ToolCompleted(use.id, error=truncate_error(reason))

    @property
    def _meta(self) -> JSONObject:
        return {f"{META_PREFIX}organization_id": self._who.organization_id, f"{META_PREFIX}user_id": self._who.user_id}

    def _describe_unknown_tool(self, name: str) -> str:
        """Return why there is no such tool; if an unavailable server listed it last, that server's reason."""
        for slot in self._slots.values():
            if slot is None or slot.name not in self._missing:
                continue
            plain_name = name.removeprefix(f"{slot.name}__")
            tool = slot.last_tools.get(plain_name)
            if tool is not None and self._allows(_Route(slot, plain_name, tool)):
                return f"The server {slot.name} is unavailable. {self._missing[slot.name]}"
        unavailable = f" These servers are unavailable: {', '.join(self._missing)}." if self._missing else ""
        return truncate_error(f"There is no tool named {name[:200]!r}.{unavailable}")


class _PartQueue:
    """The parts of several calls, in order. A new progress part replaces an unread one of the same call."""

    def __init__(self) -> None:
        self._parts: dict[tuple[int, bool], ToolPart] = {}
        self._completed: set[int] = set()
        self._wake = asyncio.Event()

    def put(self, index: int, part: ToolProgress | ToolCompleted) -> None:
        if index in self._completed:
            return  # a progress notification that arrived after the result
        is_completion = isinstance(part, ToolCompleted)
        if is_completion:
            self._completed.add(index)
        self._parts[index, is_completion] = part
        self._wake.set()

    async def get(self) -> ToolPart:
        while not self._parts:
            self._wake.clear()
            await self._wake.wait()
        return self._parts.pop(next(iter(self._parts)))


def _check_arguments(tool: ListedTool, arguments: object) -> str | None:
    """Return why the arguments do not match the tool's schema, or None if they do."""
    if not isinstance(arguments, dict):
        return "The arguments must be a JSON object."
    try:
        error = best_match(tool.validator.iter_errors(arguments))
    except Exception:  # an unresolvable or endless $ref: leave the check to the server
        return None
    if error is None:
        return None
    path = ".".join(str(step) for step in error.absolute_path)
    place = f", at {path}" if path else ""
    return truncate_error(f"The arguments do not match the tool's schema{place}: {error.message}")
