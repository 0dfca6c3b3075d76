"""The Toolbox of one agent for one run: which MCP tools it has, their calls, and what is kept of the results.

Calls are plain tasks that say what happens into a small buffer, and the generator only reads that buffer: no cancel
scope stands open across a `yield`, so it may be closed from any task.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import msgspec
from jsonschema.exceptions import best_match  # type: ignore[import-untyped]

from agents import Tool, ToolCompleted, ToolPart, ToolProgress, ToolStarted, ToolUse
from agents.mcp_connection import Answer, Gone, Listed, Refused, Unreachable
from agents.mcp_slot import Slot
from stores.models import JSONObject

RESULT_BYTES = 64 * 1024
ERROR_CHARACTERS = 4_000

_log = logging.getLogger(__name__)


class _Route(msgspec.Struct, frozen=True):
    """Where a tool is found: its slot, its own name there, and what was listed."""

    slot: Slot
    name: str
    listed: Listed


class AgentTools:
    """The Toolbox of one agent: what its servers list, as far as the operator and the agent allow it."""

    def __init__(self, slots: Mapping[str, Slot | None], allowed: Sequence[str] | None) -> None:
        self._slots = slots
        self._allowed = allowed
        self._missing: dict[str, str] = {}
        self._routes: dict[str, _Route] | None = None

    @property
    def missing(self) -> dict[str, str]:
        return dict(self._missing)

    async def available(self) -> list[Tool]:
        self._missing = {name: "It is not configured." for name, slot in self._slots.items() if slot is None}
        slots = [slot for slot in self._slots.values() if slot is not None]
        found = [route for routes in await asyncio.gather(*map(self._found, slots)) for route in routes]
        names = [route.name for route in found]
        self._routes = {}
        for route in found:
            shared = names.count(route.name) > 1
            self._routes.setdefault(f"{route.slot.name}__{route.name}" if shared else route.name, route)
        return [
            Tool(name, route.listed.description, route.listed.parameters, route.listed.repeatable)
            for name, route in self._routes.items()
        ]

    async def _found(self, slot: Slot) -> list[_Route]:
        try:
            connection = await slot.connection()
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
        if self._routes is None:
            await self.available()
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
            return ToolCompleted(use.id, error=f"There is no tool named {use.name[:200]!r}.")
        server = route.slot.name
        try:
            if (misfit := _misfit(route.listed.check, use.arguments)) is not None:
                return ToolCompleted(use.id, error=misfit)
            connection = await route.slot.connection()
            async with asyncio.timeout(route.slot.server.timeout):
                answer = await connection.call(route.name, use.arguments, progressed)
            return _completed(use.id, answer)
        except Unreachable as error:
            why = f"The server {server} can't be reached. {error}"
        except TimeoutError:
            why = f"The tool did not answer within {route.slot.server.timeout:g} s."
        except Gone:
            why = f"The server {server} ended during the call."
        except Refused as error:
            why = f"The server refused it: {error}"
        except Exception as error:
            _log.warning("MCP server %s: the call of %s failed: %r", server, route.name, error)
            why = f"The server {server} gave an answer that can't be used."
        return ToolCompleted(use.id, error=_cut(why))


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


# --- arguments and results


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
    return _cut(f"The arguments don't fit the tool{f', at {where}' if where else ''}: {error.message}")


def _completed(call_id: str, answer: Answer) -> ToolCompleted:
    """The result as it is kept: structured content as it is, else the blocks; past 64 KB of JSON what is left of it.

    A cut result is `{"truncated": true, "full_bytes": size of the whole as JSON, "text": the beginning}`; the text is
    that of the blocks, in which a picture or a file is only named (half of one is no use), else the JSON of the result.
    """
    structured = answer.structured
    if answer.is_error:
        plain = answer.text or (msgspec.json.encode(structured).decode() if structured else "")
        return ToolCompleted(call_id, error=_cut(plain or "The tool failed without saying why."))
    kept: JSONObject = structured if isinstance(structured, dict) else {"content": answer.blocks}
    whole = msgspec.json.encode(kept)
    if len(whole) > RESULT_BYTES:
        named = "\n".join(_named(block) for block in answer.blocks)
        kept = _shortened((answer.text if structured else named) or whole.decode(), len(whole))
    return ToolCompleted(call_id, result=kept)


def _named(block: JSONObject) -> str:
    """A block in words: its text, or what it is and how large."""
    match block:
        case {"type": "text", "text": str(text)} | {"resource": {"text": str(text)}}:
            return text
        case {"resource": {"uri": str(uri), "blob": str(data)}}:
            return f"[{uri}: a file of {len(data)} base64 characters, left out]"
        case {"type": str(kind), "mimeType": str(mime), "data": str(data)}:
            return f"[{kind}, {mime}: {len(data)} base64 characters, left out]"
    return msgspec.json.encode(block).decode()


def _shortened(text: str, full_bytes: int) -> JSONObject:
    while True:
        kept: JSONObject = {"truncated": True, "full_bytes": full_bytes, "text": text}
        size = len(msgspec.json.encode(kept))
        if size <= RESULT_BYTES:
            return kept
        text = text[: min(int(len(text) * RESULT_BYTES / size), len(text) - 1)]


def _cut(error: str) -> str:
    return (
        error if len(error) <= ERROR_CHARACTERS else f"{error[:ERROR_CHARACTERS]}… (cut from {len(error)} characters)"
    )
