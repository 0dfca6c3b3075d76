"""One connection to an MCP server, made with the SDK. The only file of the pool that imports `mcp`.

Above it stands the slot (agents/mcp/slot.py), which makes another connection after a death; below it is the SDK, whose
results and errors are turned into this file's own.

The SDK's contexts must be left by the task that entered them, so **a connection is a task**: it connects, lists the
tools, waits until it is over, and leaves. Everybody else only sets flags, wakes it, and makes calls. A connection lives
once. Restarting it in place was refused: every await would have to ask which life it is in.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from typing import Any, cast

import anyio
import httpx2
import msgspec
from mcp import Client, MCPError
from mcp.client import IncomingMessage
from mcp.client.subscriptions import ListenNotSupportedError, SubscriptionLost
from mcp.types import (
    CONNECTION_CLOSED,
    INVALID_REQUEST,
    CallToolResult,
    InputRequiredResult,
    RequestParamsMeta,
    TextContent,
    ToolListChangedNotification,
)

from agent_chat.agents.mcp.bounds import MESSAGE_BYTES, TOO_LARGE_CODE, TOO_LARGE_MESSAGE
from agent_chat.agents.mcp.config import Server
from agent_chat.agents.mcp.tools import Listed, list_tools
from agent_chat.agents.mcp.transport import open_transport
from agent_chat.stores.models import JSONObject

CONNECT_SECONDS = 10.0
BRIEF_SECONDS = 5.0
"""A connection that ends before this, and before it answered a call, failed like one that never came to be."""
PROBE_SECONDS = 5.0
"""How long a server may take to show that it is still there, once a call was given up."""
IDLE_SECONDS = 900.0
"""How long a connection that nobody uses stays."""
LISTEN_AGAIN_SECONDS = 30.0

RELIST_SECONDS = 1.0
"""How often the tools are listed again at most because the server reports that they have changed."""

ENDED_AT_ONCE = "It ended as soon as it was connected."
_POLL_SECONDS = 0.25
_ASKS_USER = "The tool asks the user for input (elicitation), which this chat server does not support yet."
_ASKS_MODEL = "The tool asks the client's model for a text (sampling), which this chat server does not support."
_ASKS = {
    "elicitation/create": _ASKS_USER,
    "Elicitation not supported": _ASKS_USER,
    "sampling/createMessage": _ASKS_MODEL,
    "Sampling not supported": _ASKS_MODEL,
}
"""The methods, and what the SDK responds to a server that calls them."""
_log = logging.getLogger(__name__)


class Unreachable(Exception):
    """A server can't be used now; the message says why, in words that a client may read."""


class Refused(Exception):
    """A server responded to a call with an error, which is the message."""


class CallFailed(Exception):
    """A call failed for a reason that is this server's; the message is a sentence for the record."""


class Gone(Exception):
    """A server ended during a call."""


class Answer(msgspec.Struct, frozen=True):
    """A tool's result: its blocks as JSON, those of text joined by lines, and the structured content or None."""

    is_error: bool
    text: str
    structured: object
    blocks: list[JSONObject]


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
        self._relisted_at = -RELIST_SECONDS
        self._relist_due: asyncio.TimerHandle | None = None
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

    async def call(self, tool: str, arguments: JSONObject, meta: JSONObject, progress: Callable[..., Any]) -> Answer:
        """Make one call, with `meta` as its `_meta`; cancelling it cancels it on the server.

        Raises:
            Refused: the server responded with an error that is not the tool's.
            CallFailed: the tool wants what is not supported, or its result is too large.
            Gone: the server ended before it responded.
        """
        if self.client is None:
            raise Unreachable("It is not connected.")
        self._calls += 1
        try:
            answer = _answer(await self._result(self.client, tool, arguments, meta, progress))
        except MCPError as error:
            raise self._failure_of(error) from error
        except asyncio.CancelledError:
            self._doubt()
            raise
        finally:
            self._calls -= 1
            self._wake.set()
        self._answered = True
        if answer.is_error and (sentence := _unsupported(answer.text)):
            raise CallFailed(sentence)
        return answer

    async def _result(
        self, client: Client, tool: str, arguments: JSONObject, meta: JSONObject, progress: Callable[..., Any]
    ) -> CallToolResult:
        """The result; a tool that only wants to be asked again is asked again. Raises: MCPError, CallFailed."""
        state: str | None = None
        while True:
            result = await client.session.call_tool(
                tool,
                arguments,
                progress_callback=progress,
                request_state=state,
                meta=cast(RequestParamsMeta, meta),
                allow_input_required=True,
            )
            if isinstance(result, CallToolResult):
                return result
            assert isinstance(result, InputRequiredResult)
            self._answered = True
            if result.input_requests:
                methods = " ".join(request.method for request in result.input_requests.values())
                raise CallFailed(_unsupported(methods) or _ASKS_USER)
            state = result.request_state
            await asyncio.sleep(_POLL_SECONDS)

    def _failure_of(self, error: MCPError) -> Exception:
        """What a call that failed with the SDK's error raises."""
        if error.code == TOO_LARGE_CODE or TOO_LARGE_MESSAGE in error.message or "event exceeded the" in error.message:
            self._answered = True
            return CallFailed(f"The server's response was larger than {MESSAGE_BYTES // 2**20} MB and was dropped.")
        if error.code == CONNECTION_CLOSED:
            self._ended()
            return Gone()
        self._answered = True
        if sentence := _unsupported(error.message):
            return CallFailed(sentence)
        if error.code == INVALID_REQUEST:  # what the SDK says of an HTTP session that has ended
            self.retire()
        return Refused(error.message)

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
                transport = open_transport(self._name, self._server, self._ended, connect_seconds=CONNECT_SECONDS)
                async with (
                    Client(transport, message_handler=self._heard, cache=None) as client,
                    anyio.create_task_group() as beside,
                ):
                    self.tools = await list_tools(client)
                    if not self.usable:  # the end of its output came together with the list
                        self._fail(ENDED_AT_ONCE)
                        return
                    limit.cancel()
                    self.client = client
                    self._since = asyncio.get_running_loop().time()
                    self.decided.set()
                    beside.start_soon(self._listen, client)
                    await self._stay(client)
                    beside.cancel_scope.cancel()
        except Exception as error:
            _log.warning("MCP server %s: the connection ended: %.500r", self._name, _root(error))
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
        if self.usable and self.decided.is_set() and not self.proven and not self._calls:
            self.failure = ENDED_AT_ONCE  # during a call it is the callers' failure: see Slot.blame
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
                self.tools = await list_tools(client)
        except Exception as error:
            _log.warning("MCP server %s: its tools could not be listed again: %.500r", self._name, error)
        finally:
            late.cancel()
        self._trusted.set()

    def _hung(self) -> None:
        _log.warning("MCP server %s: it does not answer, and gets no more calls", self._name)
        self.retire()
        self._asking.cancel()

    async def _heard(self, message: IncomingMessage) -> None:
        if isinstance(message, ToolListChangedNotification):
            self._relist_soon()

    def _relist_soon(self) -> None:
        loop = asyncio.get_running_loop()
        if self._relist_due is None:
            self._relist_due = loop.call_at(self._relisted_at + RELIST_SECONDS, self._relist)

    def _relist(self) -> None:
        self._relist_due = None
        self._relisted_at = asyncio.get_running_loop().time()
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
            self._relist_soon()


def _answer(result: CallToolResult) -> Answer:
    text = "\n".join(block.text for block in result.content if isinstance(block, TextContent))
    blocks = [block.model_dump(mode="json", by_alias=True, exclude_none=True) for block in result.content]
    return Answer(bool(result.is_error), text, result.structured_content, blocks)


def _unsupported(words: str) -> str | None:
    """What a failed tool wanted that is not supported, by the words of its error.

    The server's own requests are not looked at: over stdio nothing tells which of the open calls caused one.
    """
    return next((sentence for asked, sentence in _ASKS.items() if asked in words), None)


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
        case MCPError():  # its words are in the log: what a server says has no place in a model's instructions
            return "It refused the connection."
        case httpx2.TransportError() | OSError():
            return "It does not answer at its address."
    return "The connection failed."
