"""One connection to an MCP server, made with the SDK. The only file of the pool that imports `mcp`.

Above it stands the slot (agents/mcp_slot.py), which makes another connection after a death; below it is the SDK, whose
results and errors are turned into this file's own.

The SDK's contexts must be left by the task that entered them, so **a connection is a task**: it connects, lists the
tools, waits until it is over, and leaves. Everybody else only sets flags, wakes it, and makes calls. A connection lives
once. Restarting it in place was refused: every await would have to ask which life it is in.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio
import httpx2
import msgspec
from jsonschema.exceptions import SchemaError  # type: ignore[import-untyped]
from jsonschema.validators import Draft202012Validator, validator_for  # type: ignore[import-untyped]
from mcp import Client, MCPError, StdioServerParameters
from mcp.client import IncomingMessage
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.client.subscriptions import ListenNotSupportedError, SubscriptionLost
from mcp.types import CONNECTION_CLOSED, INVALID_REQUEST, CallToolResult, TextContent, ToolListChangedNotification
from referencing import Registry

from agents.mcp_config import Server
from stores.models import JSONObject

if TYPE_CHECKING:
    from mcp.client._transport import ReadStream, TransportStreams
    from mcp.shared.message import SessionMessage

CONNECT_SECONDS = 10.0
BRIEF_SECONDS = 5.0
"""A connection that ends before this, and before it answered a call, failed like one that never came to be."""
PROBE_SECONDS = 5.0
"""How long a server may take to show that it is still there, once a call was given up."""
IDLE_SECONDS = 900.0
"""How long a connection that nobody uses stays."""
LISTEN_AGAIN_SECONDS = 30.0

_AT_ONCE = "It ended as soon as it was connected."
_PAGES = 100
_log = logging.getLogger(__name__)


class Unreachable(Exception):
    """A server can't be used now; the message says why, in words that a client may read."""


class Refused(Exception):
    """A server answered a call with an error, which is the message."""


class Gone(Exception):
    """A server ended during a call."""


class Answer(msgspec.Struct, frozen=True):
    """What a tool answered: its blocks as JSON, those of text joined by lines, and the structured content if any."""

    is_error: bool
    text: str
    structured: object
    blocks: list[JSONObject]


class Listed(msgspec.Struct, frozen=True):
    """A tool as its server lists it."""

    description: str
    parameters: JSONObject
    check: Any  # a jsonschema validator: the package has no types
    repeatable: bool


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
        # A call that waits for a free connection in vain would end all the others: the SDK lets the error through.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
        async with (
            httpx2.AsyncClient(headers=server.headers, timeout=timeout, limits=limits) as http,
            streamable_http_client(server.url, http_client=http) as streams,
        ):
            yield streams
        return
    command = StdioServerParameters(command=server.command or "", args=server.args, env=server.env, cwd=server.cwd)
    async with stdio_client(command, errlog=sys.__stderr__ or sys.stderr) as (incoming, outgoing):
        yield _Incoming(incoming, ended), outgoing


class Connection:
    """One life of the connection to a server, all in the task `life`.

    `decided` is set when it is known whether it came to be: then `client` is there, or `failure` says why not.
    `usable` turns false once, for good. `failure` also tells of one that came to be and ended at once.

    A call that was given up puts the connection in doubt: a hung server looks like a slow one, and its process is still
    there. The owner asks for the tools again; who answers is trusted again, who doesn't gets no new calls.
    """

    def __init__(self, name: str, server: Server) -> None:
        self._name = name
        self._server = server
        self.decided = asyncio.Event()
        self.usable = True
        self.failure: str | None = None
        self.client: Client | None = None
        self.tools: dict[str, Listed] = {}
        self._calls = 0
        self._answered = False
        self._since = asyncio.get_running_loop().time()
        self._trusted = asyncio.Event()
        self._trusted.set()
        self._stale = False
        self._closing = False
        self._wake = asyncio.Event()
        self._scope = anyio.CancelScope()
        self._asking = anyio.CancelScope()
        # A context of its own: it outlives the run that happened to need it first.
        self.life = asyncio.create_task(self._live(), name=f"mcp {name}", context=contextvars.Context())

    @property
    def proven(self) -> bool:
        """True once it answered a call, or has lasted."""
        return self._answered or asyncio.get_running_loop().time() - self._since >= BRIEF_SECONDS

    async def known(self) -> None:
        """Wait until it is known whether it can be used: while it is made, and while it is in doubt."""
        await self.decided.wait()
        await self._trusted.wait()

    async def call(self, tool: str, arguments: JSONObject, progress: Callable[..., Any]) -> Answer:
        """Make one call; cancelling it cancels it on the server.

        Raises:
            Refused: the server answered with an error that is not the tool's.
            Gone: it ended before it answered.
        """
        if self.client is None:
            raise Unreachable("It is not connected.")
        self._calls += 1
        try:
            result = await self.client.call_tool(tool, arguments, progress_callback=progress)
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                self._ended()
                raise Gone from error
            self._answered = True
            if error.code == INVALID_REQUEST:  # what the SDK says of an HTTP session that has ended
                self.retire()
            raise Refused(error.message) from error
        except asyncio.CancelledError:
            self._doubt()
            raise
        finally:
            self._calls -= 1
            self._wake.set()
        self._answered = True
        return _answer(result)

    def touch(self) -> None:
        """Somebody is about to use it: it isn't idle."""
        self._wake.set()

    def _doubt(self) -> None:
        if self.usable:
            self._trusted.clear()
            self._stale = True
            self._wake.set()

    def retire(self) -> None:
        """No new calls: it leaves when the ones it has are through."""
        self.usable = False
        self._trusted.set()
        self._wake.set()

    def close(self) -> None:
        """Leave now; open calls end with an error."""
        self._closing = True
        self.retire()
        self._asking.cancel()
        if not self.decided.is_set():
            self._fail("It is being shut down.")

    async def _live(self) -> None:
        limit = asyncio.get_running_loop().call_later(
            CONNECT_SECONDS, self._fail, f"It did not answer within {CONNECT_SECONDS:g} s."
        )
        try:
            with self._scope:
                transport = _transport(self._server, self._ended)
                async with (
                    Client(transport, message_handler=self._heard, cache=None) as client,
                    anyio.create_task_group() as beside,
                ):
                    self.tools = await _list_tools(client)
                    if not self.usable:  # the end of its output came together with the list
                        self._fail(_AT_ONCE)
                        return
                    limit.cancel()
                    self.client = client
                    self._since = asyncio.get_running_loop().time()
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
            self._ended()

    def _fail(self, why: str) -> None:
        """It will not come to be, if it hasn't yet. Runs before the SDK cleans up, which may take seconds."""
        if not self.decided.is_set():
            self.failure = why
            self.retire()
            self.decided.set()
            self._scope.cancel()

    def _ended(self) -> None:
        """The server went, by itself. One that does so while connecting lets the SDK's error say why."""
        if self.usable and self.decided.is_set() and not self.proven:
            self.failure = _AT_ONCE
        self.retire()

    async def _stay(self, client: Client) -> None:
        while not self._closing and (self.usable or self._calls):
            with anyio.move_on_after(IDLE_SECONDS) as idle:
                await self._wake.wait()
            if idle.cancelled_caught and not self._calls:
                self.retire()
            self._wake.clear()
            if self._stale and self.usable:
                await self._list_again(client)

    async def _list_again(self, client: Client) -> None:
        """An error is an answer too: the server is there, and keeps the tools that it had."""
        self._stale = False
        # Leaving a request can take the SDK seconds more if the server reads nothing: the verdict doesn't wait for it.
        late = asyncio.get_running_loop().call_later(PROBE_SECONDS, self._hung)
        try:
            with anyio.CancelScope() as self._asking:
                self.tools = await _list_tools(client)
        except Exception as error:
            _log.warning("MCP server %s: its tools could not be listed again: %r", self._name, error)
        finally:
            late.cancel()
        self._trusted.set()

    def _hung(self) -> None:
        _log.warning("MCP server %s: it does not answer, and gets no more calls", self._name)
        self.retire()
        self._asking.cancel()

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
            await asyncio.sleep(LISTEN_AGAIN_SECONDS)
            self._stale = True
            self._wake.set()


async def _list_tools(client: Client) -> dict[str, Listed]:
    """All pages of the server's tools. One whose schema is none by its own dialect is left out: it checks nothing.

    What a model's API accepts is less; that is seen to by the kind of agent that calls it.
    """
    tools: dict[str, Listed] = {}
    cursor: str | None = None
    for _ in range(_PAGES):
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            try:
                check = _check(tool.input_schema)
            except Exception as error:  # not only SchemaError: one nested too deep is a RecursionError
                why = error.message if isinstance(error, SchemaError) else error
                _log.warning("The schema of the MCP tool %s is none, it is left out: %s", tool.name, why)
                continue
            hints = tool.annotations
            repeatable = hints is not None and bool(hints.read_only_hint or hints.idempotent_hint)
            tools[tool.name] = Listed(tool.description or "", tool.input_schema, check, repeatable)
        cursor = page.next_cursor
        if cursor is None:
            break
    return tools


def _check(schema: JSONObject) -> Any:
    """Its validator. The empty registry keeps a $ref from being fetched over the network."""
    kind = validator_for(schema, default=Draft202012Validator)
    kind.check_schema(schema)
    return kind(schema, registry=Registry())


def _answer(result: CallToolResult) -> Answer:
    text = "\n".join(block.text for block in result.content if isinstance(block, TextContent))
    blocks = [block.model_dump(mode="json", by_alias=True, exclude_none=True) for block in result.content]
    return Answer(bool(result.is_error), text, result.structured_content, blocks)


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
