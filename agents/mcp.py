"""MCP servers: the tools of agents. The only file that imports `mcp`.

Above it stands the server, which makes one Pool per process and hands each run a toolbox; below it is the SDK. From top
to bottom: one connection, one server's slot, the pool, one agent's toolbox, results.

The SDK's contexts must be left by the task that entered them, so **a connection is a task**: it connects, lists the
tools, waits until it is over, and leaves. Everybody else only sets flags, wakes it, and makes calls. A connection lives
once; after its death the slot makes another on the next use. Restarting it in place was refused: every await would have
to ask which life it is in.

Calls are plain tasks that say what happens into a small buffer, and the generator only reads that buffer: no cancel
scope stands open across a `yield`, so it may be closed from any task.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio
import httpx2
import msgspec
from jsonschema.exceptions import SchemaError, best_match  # type: ignore[import-untyped]
from jsonschema.validators import Draft202012Validator, validator_for  # type: ignore[import-untyped]
from mcp import Client, MCPError, StdioServerParameters
from mcp.client import IncomingMessage
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.client.subscriptions import ListenNotSupportedError, SubscriptionLost
from mcp.types import CONNECTION_CLOSED, INVALID_REQUEST, CallToolResult, TextContent, ToolListChangedNotification
from referencing import Registry

from agents import Tool, Toolbox, ToolCompleted, ToolPart, ToolProgress, ToolStarted, ToolUse
from agents.mcp_config import Server
from stores.models import Agent, JSONObject

if TYPE_CHECKING:
    from mcp.client._transport import ReadStream, TransportStreams
    from mcp.shared.message import SessionMessage

CONNECT_SECONDS = 10.0
PATIENCE_SECONDS = 1.0
"""How long a use waits for a server that failed last time; the attempt itself goes on behind it."""
BACK_OFF_SECONDS = 30.0
IDLE_SECONDS = 900.0
"""How long a connection that nobody uses stays."""
CLOSE_SECONDS = 8.0
"""Above what the SDK takes at most to end a process: stdin closed, 2 s, SIGTERM, 2 s, SIGKILL."""
RESULT_BYTES = 64 * 1024
ERROR_CHARACTERS = 4_000

_PAGES = 100
_GONE = (CONNECTION_CLOSED, INVALID_REQUEST)  # the second is what the SDK says of an HTTP session that has ended
_log = logging.getLogger(__name__)


# --- one connection


class Unreachable(Exception):
    """A server can't be used now; the message says why, in words that a client may read."""


class _Listed(msgspec.Struct, frozen=True):
    """A tool as its server lists it."""

    description: str
    parameters: JSONObject
    check: Any  # a jsonschema validator: the package has no types


class _Incoming:
    """A transport's incoming stream that tells when it ends: the SDK tells only whoever waits for an answer."""

    def __init__(self, stream: ReadStream[SessionMessage | Exception], ended: Callable[[], None]) -> None:
        self._stream = stream
        self._ended = ended

    async def receive(self) -> SessionMessage | Exception:
        return await self._stream.receive()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self._stream.__anext__()
        except StopAsyncIteration:
            self._ended()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


@asynccontextmanager
async def _transport(server: Server, ended: Callable[[], None]) -> AsyncIterator[TransportStreams]:
    """Open the server's streams. Over HTTP `ended` isn't called: there a broken transport raises."""
    if server.url is not None:
        timeout = httpx2.Timeout(CONNECT_SECONDS, read=max(300.0, server.timeout + 10))
        async with (
            httpx2.AsyncClient(headers=server.headers, timeout=timeout) as http,
            streamable_http_client(server.url, http_client=http) as streams,
        ):
            yield streams
        return
    command = StdioServerParameters(command=server.command or "", args=server.args, env=server.env, cwd=server.cwd)
    async with stdio_client(command, errlog=sys.__stderr__ or sys.stderr) as (incoming, outgoing):
        yield _Incoming(incoming, ended), outgoing


class _Connection:
    """One life of the connection to a server, all in the task `life`.

    `decided` is set when it is known whether it came to be: then `client` is there, or `failure` says why not.
    `usable` turns false once, for good.
    """

    def __init__(self, name: str, server: Server) -> None:
        self._name = name
        self._server = server
        self.decided = asyncio.Event()
        self.usable = True
        self.failure: str | None = None
        self.client: Client | None = None
        self.tools: dict[str, _Listed] = {}
        self._calls = 0
        self._stale = False
        self._closing = False
        self._wake = asyncio.Event()
        self._scope = anyio.CancelScope()
        # A context of its own: it outlives the run that happened to need it first.
        self.life = asyncio.create_task(self._live(), name=f"mcp {name}", context=contextvars.Context())

    async def call(self, tool: str, arguments: JSONObject, progress: Callable[..., Any]) -> CallToolResult:
        """Make one call; cancelling it cancels it on the server.

        Raises:
            MCPError: the server refused it, or is gone.
        """
        if self.client is None:
            raise Unreachable("It is not connected.")
        self._calls += 1
        try:
            return await self.client.call_tool(tool, arguments, progress_callback=progress)
        except MCPError as error:
            if error.code in _GONE:
                self.retire()
            raise
        finally:
            self._calls -= 1
            self._wake.set()

    def touch(self) -> None:
        """Somebody is about to use it: it isn't idle."""
        self._wake.set()

    def retire(self) -> None:
        """No new calls: it leaves when the ones it has are through."""
        self.usable = False
        self._wake.set()

    def close(self) -> None:
        """Leave now; open calls end with an error."""
        self._closing = True
        self.retire()
        if not self.decided.is_set():
            self._fail("It is being shut down.")

    async def _live(self) -> None:
        limit = asyncio.get_running_loop().call_later(
            CONNECT_SECONDS, self._fail, f"It did not answer within {CONNECT_SECONDS:g} s."
        )
        try:
            with self._scope:
                transport = _transport(self._server, self.retire)
                async with (
                    Client(transport, message_handler=self._heard, cache=None) as client,
                    anyio.create_task_group() as beside,
                ):
                    self.tools = await _list_tools(client)
                    limit.cancel()
                    self.client = client
                    self.decided.set()
                    beside.start_soon(self._listen, client)
                    await self._stay(client)
                    beside.cancel_scope.cancel()
        except Exception as error:
            _log.warning("MCP server %s: the connection ended: %r", self._name, _root(error))
            self._fail(_why(_root(error)))
        finally:
            limit.cancel()
            self._fail("It ended before it was connected.")

    def _fail(self, why: str) -> None:
        """It will not come to be, or is over. Runs before the SDK cleans up, which may take seconds."""
        self.usable = False
        if not self.decided.is_set():
            self.failure = why
            self.decided.set()
            self._scope.cancel()

    async def _stay(self, client: Client) -> None:
        while not self._closing and (self.usable or self._calls):
            with anyio.move_on_after(IDLE_SECONDS) as idle:
                await self._wake.wait()
            if idle.cancelled_caught and not self._calls:
                self.retire()
            self._wake.clear()
            if self._stale and self.usable:
                self._stale = False
                try:
                    with anyio.fail_after(CONNECT_SECONDS):
                        self.tools = await _list_tools(client)
                except Exception as error:
                    _log.warning("MCP server %s: its tools could not be listed again: %r", self._name, error)

    async def _heard(self, message: IncomingMessage) -> None:
        if isinstance(message, ToolListChangedNotification):
            self._stale = True
            self._wake.set()

    async def _listen(self, client: Client) -> None:
        """Keep the stream open on which servers since 2026-07-28 tell of changes; `_heard` hears them."""
        offered = client.server_capabilities.tools
        while offered is not None and offered.list_changed:
            try:
                async with client.listen(tools_list_changed=True) as changes:
                    async for _ in changes:
                        pass
            except ListenNotSupportedError:
                return  # an older one, which tells without being asked
            except (MCPError, SubscriptionLost) as error:
                _log.debug("MCP server %s: the stream of changes broke: %r", self._name, error)
            await asyncio.sleep(BACK_OFF_SECONDS)
            self._stale = True
            self._wake.set()


async def _list_tools(client: Client) -> dict[str, _Listed]:
    """All pages of the server's tools. One with a wrong schema is left out: models' APIs refuse the whole request."""
    tools: dict[str, _Listed] = {}
    cursor: str | None = None
    for _ in range(_PAGES):
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            kind = validator_for(tool.input_schema, default=Draft202012Validator)
            try:
                kind.check_schema(tool.input_schema)
            except SchemaError as error:
                _log.warning("The schema of the MCP tool %s is none, it is left out: %s", tool.name, error.message)
                continue
            # The empty registry keeps a $ref from being fetched over the network.
            check = kind(tool.input_schema, registry=Registry())
            tools[tool.name] = _Listed(tool.description or "", tool.input_schema, check)
        cursor = page.next_cursor
        if cursor is None:
            break
    return tools


def _root(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _why(error: BaseException) -> str:
    match error:
        case FileNotFoundError():
            return "Its command was not found."
        case PermissionError():
            return "Its command may not be run."
        case MCPError(code=code) if code == CONNECTION_CLOSED:
            return "It ended before it answered."
        case MCPError():
            return f"It refused the connection: {error.message[:200]}"
        case httpx2.TransportError() | OSError():
            return "It does not answer at its address."
    return "The connection failed."


# --- all connections


class _Slot:
    """A configured server, the connection to it if there is one, and how often it failed in a row."""

    def __init__(self, name: str, server: Server) -> None:
        self.name = name
        self.server = server
        self.lives: set[_Connection] = set()
        self._current: _Connection | None = None
        self._failures = 0
        self._why = ""
        self._not_before = 0.0
        self._closed = False

    async def connection(self) -> _Connection:
        """The connection, made if there is none. It is the slot's, not the caller's: cancelling the wait leaves it.

        Raises:
            Unreachable: it failed, lately or now, or a server that failed last time is still not there.
        """
        self._settle()
        if self._closed:
            raise Unreachable("It is being shut down.")
        if self._current is None:
            if asyncio.get_running_loop().time() < self._not_before:
                raise Unreachable(self._why)
            self._current = self._connect()
        current = self._current
        if not current.decided.is_set():
            try:
                async with asyncio.timeout(PATIENCE_SECONDS if self._failures else None):
                    await current.decided.wait()
            except TimeoutError:
                raise Unreachable(self._why) from None
        self._settle()
        if current.failure is not None:
            raise Unreachable(current.failure)
        current.touch()
        return current

    def _connect(self) -> _Connection:
        connection = _Connection(self.name, self.server)
        self.lives.add(connection)
        connection.life.add_done_callback(lambda _: self.lives.discard(connection))
        return connection

    def _settle(self) -> None:
        """Draw the consequences of what has become of the current connection."""
        current = self._current
        if current is None or not current.decided.is_set():
            return
        if current.failure is not None:
            self._current, self._why = None, current.failure
            self._not_before = asyncio.get_running_loop().time() + min(2.0**self._failures, BACK_OFF_SECONDS)
            self._failures += 1
        else:
            self._failures = 0
            self._current = current if current.usable else None

    def close(self) -> None:
        self._closed = True
        for connection in self.lives:
            connection.close()


class Pool:
    """The connections of this process: made on first use, shared by all runs, remade after a death.

    A server that fails costs a turn at most CONNECT_SECONDS once, then nothing for 1 s, 2 s … 30 s, and at most
    PATIENCE_SECONDS for each attempt after that.
    """

    def __init__(self, servers: Mapping[str, Server]) -> None:
        self._slots = {name: _Slot(name, server) for name, server in servers.items()}

    @property
    def names(self) -> list[str]:
        """The configured servers."""
        return list(self._slots)

    def toolbox(self, agent: Agent) -> Toolbox:
        """The tools of an agent for one run. Nothing is connected before they are asked for."""
        return _AgentTools({name: self._slots.get(name) for name in agent.mcp_servers}, agent.tools)

    async def close(self) -> None:
        """End all connections and their processes; open calls end with an error. Takes at most about 10 s."""
        for slot in self._slots.values():
            slot.close()
        lives = [connection.life for slot in self._slots.values() for connection in slot.lives]
        if lives:
            _, late = await asyncio.wait(lives, timeout=CLOSE_SECONDS)
            for life in late:
                life.cancel()
            if late:
                _log.warning("%d MCP connections had to be cut off", len(late))
                await asyncio.wait(late, timeout=1)


# --- one agent's tools


class _Route(msgspec.Struct, frozen=True):
    """Where a tool is found: its slot, its own name there, and what was listed."""

    slot: _Slot
    name: str
    listed: _Listed


class _AgentTools:
    """The Toolbox of one agent: what its servers list, as far as the operator and the agent allow it."""

    def __init__(self, slots: Mapping[str, _Slot | None], allowed: Sequence[str] | None) -> None:
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
        return [Tool(name, route.listed.description, route.listed.parameters) for name, route in self._routes.items()]

    async def _found(self, slot: _Slot) -> list[_Route]:
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
        for use in uses:
            arguments = use.arguments if isinstance(use.arguments, dict) else {}
            yield ToolStarted(use.id, use.name, arguments, round)
        if self._routes is None:
            await self.available()
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
                result = await connection.call(route.name, use.arguments, progressed)
            return _completed(use.id, result)
        except Unreachable as error:
            why = f"The server {server} can't be reached. {error}"
        except TimeoutError:
            why = f"The tool did not answer within {route.slot.server.timeout:g} s."
        except MCPError as error:
            gone = error.code == CONNECTION_CLOSED
            why = f"The server {server} ended during the call." if gone else f"The server refused it: {error.message}"
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


def _completed(call_id: str, result: CallToolResult) -> ToolCompleted:
    """The result as it is kept: structured content as it is, else the blocks; past 64 KB of JSON what is left of it.

    A cut result is `{"truncated": true, "full_bytes": size of the whole as JSON, "text": the beginning}`; the text is
    that of the blocks, in which a picture or a file is only named (half of one is no use), else the JSON of the result.
    """
    text = "\n".join(block.text for block in result.content if isinstance(block, TextContent))
    structured = result.structured_content
    if result.is_error:
        plain = text or (msgspec.json.encode(structured).decode() if structured else "")
        return ToolCompleted(call_id, error=_cut(plain or "The tool failed without saying why."))
    blocks = [block.model_dump(mode="json", by_alias=True, exclude_none=True) for block in result.content]
    kept: JSONObject = structured if isinstance(structured, dict) else {"content": blocks}
    whole = msgspec.json.encode(kept)
    if len(whole) > RESULT_BYTES:
        named = "\n".join(_named(block) for block in blocks)
        kept = _shortened((text if structured else named) or whole.decode(), len(whole))
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
