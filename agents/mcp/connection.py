"""One connection to an MCP server, made with the SDK's client. The only module of the pool that uses that client.

The slot (agents/mcp/slot.py) opens a new connection after one was lost. The SDK's results and errors are converted here
to the types of this module.

The SDK's contexts must be left by the task that entered them, so **a connection is a task**: it connects, lists the
tools, waits until the connection is to be closed, and leaves the contexts. Other tasks only set flags, wake it, and
make calls. A Connection object connects once. Reconnecting in place was refused: after every await the code would have
to check whether it still has the same connection.
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
from agent_chat.agents.mcp.tools import ListedTool, list_tools
from agent_chat.agents.mcp.transport import open_transport
from agent_chat.stores.models import JSONObject

CONNECT_SECONDS = 10.0
"""The time limit for connecting, which includes listing the tools."""
STABLE_SECONDS = 5.0
"""A connection lost sooner than this, before the server responded to a call, counts as a failure to connect."""
PROBE_SECONDS = 5.0
"""How long a server may take to respond to the probe after a call was cancelled."""
IDLE_SECONDS = 900.0
"""An unused connection is closed after this."""
LISTEN_RETRY_SECONDS = 30.0
"""The pause before the stream of tool changes is opened again."""
RELIST_SECONDS = 1.0
"""The shortest interval between two requests for the tools because the server reports that they have changed."""

_DISCONNECTED_IMMEDIATELY = "It disconnected immediately after connecting."
_POLL_SECONDS = 0.25
_NO_ELICITATION = "The tool asks the user for input (elicitation), which this chat server does not support yet."
_NO_SAMPLING = "The tool asks the client's model for a text (sampling), which this chat server does not support."
_UNSUPPORTED = {
    "elicitation/create": _NO_ELICITATION,
    "Elicitation not supported": _NO_ELICITATION,
    "sampling/createMessage": _NO_SAMPLING,
    "Sampling not supported": _NO_SAMPLING,
}
"""The error for a tool whose error contains the key: a method, or what the SDK responds to a server that calls it."""
_log = logging.getLogger(__name__)


class ServerUnavailable(Exception):
    """A server cannot be used now. The message is a sentence that clients may read."""


class CallRejected(Exception):
    """A server responded to a call with a JSON-RPC error, whose message this is."""


class CallFailed(Exception):
    """A call failed because of a limit of the chat server. The message is a sentence for the record."""


class ConnectionLost(Exception):
    """The connection was lost during a call."""


class ToolResult(msgspec.Struct, frozen=True):
    """A tool's result, or its error if `is_error`.

    Attributes:
        text: the text blocks, joined by newlines.
        structured: the structured content, or None.
        blocks: all content blocks as JSON.
    """

    is_error: bool
    text: str
    structured: object
    blocks: list[JSONObject]


class Connection:
    """One connection to a server. It begins to connect when it is created, and connects once.

    A cancelled call starts a probe, because a server that hangs looks like a slow one while its process exists: the
    task requests the list of tools again. A server that responds gets further calls; one that does not respond within
    PROBE_SECONDS is retired.

    Attributes:
        attempt_done: set once connecting succeeded (then `client` is set) or failed (then `failure` is set).
        accepts_calls: whether new calls may be made. Becomes False once and stays so; open calls continue.
        failure: why connecting failed, or that the server closed the connection right after. A sentence for clients.
        client: the SDK's client. None until connecting succeeded.
        tools: the tools by name, as listed last.
        task: the task that owns the SDK's contexts. It ends when the connection is closed.

    Private attributes:
        _open_calls: the number of calls in progress. A retired connection is closed when it becomes 0.
        _has_responded: whether the server has responded to a call.
        _connected_at: the time of the event loop when connecting succeeded; before that, when it began.
        _probe_done: cleared by a cancelled call, set when the server responded or the connection is retired.
        _must_relist: the task shall list the tools again: for a probe, or because the server reports a change.
        _is_closing: set by `close`: the task leaves without waiting for open calls.
        _wake: wakes the task to check the flags above.
        _scope: the cancel scope of the whole task, cancelled when connecting fails.
        _relist_scope: the cancel scope of the current request for the tools.
        _relisted_at: when the tools were last listed because of a reported change.
        _relist_timer: the timer of the next such request, if one is due.
    """

    def __init__(self, name: str, server: Server) -> None:
        self._name = name
        self._server = server
        self.attempt_done = asyncio.Event()
        self.accepts_calls = True
        self.failure: str | None = None
        self.client: Client | None = None
        self.tools: dict[str, ListedTool] = {}
        self._open_calls = 0
        self._has_responded = False
        self._connected_at = asyncio.get_running_loop().time()
        self._probe_done = asyncio.Event()
        self._probe_done.set()
        self._must_relist = False
        self._is_closing = False
        self._wake = asyncio.Event()
        self._scope = anyio.CancelScope()
        self._relist_scope = anyio.CancelScope()
        self._relisted_at = -RELIST_SECONDS
        self._relist_timer: asyncio.TimerHandle | None = None
        # An empty context: the task outlives the run that needed the connection first, and must not hold its variables.
        self.task = asyncio.create_task(self._run(), name=f"mcp {name}", context=contextvars.Context())

    @property
    def is_stable(self) -> bool:
        """Whether the server has responded to a call, or the connection has lasted STABLE_SECONDS."""
        return self._has_responded or asyncio.get_running_loop().time() - self._connected_at >= STABLE_SECONDS

    async def wait_until_checked(self) -> None:
        """Wait until the attempt to connect and a probe in progress are done."""
        await self.attempt_done.wait()
        await self._probe_done.wait()

    async def call(
        self, tool: str, arguments: JSONObject, meta: JSONObject, progress: Callable[..., Any]
    ) -> ToolResult:
        """Call a tool, with `meta` as the request's `_meta`. Cancelling this cancels the call on the server.

        Raises:
            CallRejected: the server responded with a JSON-RPC error.
            CallFailed: the tool needs an unsupported feature, or its result is too large.
            ConnectionLost: the connection was lost before the server responded.
        """
        if self.client is None:
            raise ServerUnavailable("It is not connected.")
        self._open_calls += 1
        try:
            result = _convert_result(await self._call_until_complete(self.client, tool, arguments, meta, progress))
        except MCPError as error:
            raise self._convert_error(error) from error
        except asyncio.CancelledError:
            self._start_probe()
            raise
        finally:
            self._open_calls -= 1
            self._wake.set()
        self._has_responded = True
        if result.is_error and (sentence := _unsupported_feature(result.text)):
            raise CallFailed(sentence)
        return result

    async def _call_until_complete(
        self, client: Client, tool: str, arguments: JSONObject, meta: JSONObject, progress: Callable[..., Any]
    ) -> CallToolResult:
        """Return the result; repeat the call while the server only asks for that. Raises: MCPError, CallFailed."""
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
            self._has_responded = True
            if result.input_requests:
                methods = " ".join(request.method for request in result.input_requests.values())
                raise CallFailed(_unsupported_feature(methods) or _NO_ELICITATION)
            state = result.request_state
            await asyncio.sleep(_POLL_SECONDS)

    def _convert_error(self, error: MCPError) -> Exception:
        """Return the exception that `call` raises for an error of the SDK."""
        if error.code == TOO_LARGE_CODE or TOO_LARGE_MESSAGE in error.message or "event exceeded the" in error.message:
            self._has_responded = True
            return CallFailed(f"The server's response was larger than {MESSAGE_BYTES // 2**20} MB and was dropped.")
        if error.code == CONNECTION_CLOSED:
            self._on_stream_end()
            return ConnectionLost()
        self._has_responded = True
        if sentence := _unsupported_feature(error.message):
            return CallFailed(sentence)
        if error.code == INVALID_REQUEST:  # the SDK's error for an HTTP session that has ended
            self.retire()
        return CallRejected(error.message)

    def touch(self) -> None:
        """Restart the idle time: a call is about to be made."""
        self._wake.set()

    def _start_probe(self) -> None:
        if self.accepts_calls:
            self._probe_done.clear()
            self._must_relist = True
            self._wake.set()

    def retire(self) -> None:
        """Accept no new calls, and close the connection when the open calls are done."""
        self.accepts_calls = False
        self._probe_done.set()
        self._wake.set()

    def close(self) -> None:
        """Close the connection immediately. Open calls fail."""
        self._is_closing = True
        self.retire()
        self._relist_scope.cancel()
        if not self.attempt_done.is_set():
            self._fail_connecting("The chat server is shutting down.")

    async def _run(self) -> None:
        timer = asyncio.get_running_loop().call_later(
            CONNECT_SECONDS, self._fail_connecting, f"It did not respond within {CONNECT_SECONDS:g} s."
        )
        try:
            with self._scope:
                transport = open_transport(
                    self._name, self._server, self._on_stream_end, connect_seconds=CONNECT_SECONDS
                )
                async with (
                    Client(transport, message_handler=self._on_message, cache=None) as client,
                    anyio.create_task_group() as listeners,
                ):
                    self.tools = await list_tools(client)
                    if not self.accepts_calls:  # the stream ended right behind the list of tools
                        self._fail_connecting(_DISCONNECTED_IMMEDIATELY)
                        return
                    timer.cancel()
                    self.client = client
                    self._connected_at = asyncio.get_running_loop().time()
                    self.attempt_done.set()
                    listeners.start_soon(self._listen_for_changes, client)
                    await self._wait_until_retired(client)
                    listeners.cancel_scope.cancel()
        except Exception as error:
            _log.warning("MCP server %s: connection failed: %.500r", self._name, _first_cause(error))
            self._fail_connecting(_describe_failure(_first_cause(error)))
        finally:
            timer.cancel()
            self._fail_connecting("The connection was closed before it was ready.")
            self._on_stream_end()

    def _fail_connecting(self, reason: str) -> None:
        """End the attempt to connect, if it is not done. Called before the SDK cleans up, which may take seconds."""
        if not self.attempt_done.is_set():
            self.failure = reason
            self.retire()
            self.attempt_done.set()
            self._scope.cancel()

    def _on_stream_end(self) -> None:
        """Retire the connection. While it connects, the reason comes from the error that the SDK raises."""
        if self.accepts_calls and self.attempt_done.is_set() and not self.is_stable and not self._open_calls:
            self.failure = _DISCONNECTED_IMMEDIATELY  # during a call the caller may be the cause: Slot.record_lost_call
        self.retire()

    async def _wait_until_retired(self, client: Client) -> None:
        """List the tools again when necessary, until the connection is closed or retired without open calls."""
        while not self._is_closing and (self.accepts_calls or self._open_calls):
            with anyio.move_on_after(IDLE_SECONDS) as idle:
                await self._wake.wait()
            if idle.cancelled_caught and not self._open_calls:
                self.retire()
            self._wake.clear()
            if self._must_relist and self.accepts_calls:
                await self._relist_tools(client)

    async def _relist_tools(self, client: Client) -> None:
        """List the tools again. An error also passes the probe, since the server responded; the earlier tools stay."""
        self._must_relist = False
        # A timer, not a timeout: cancelling a request takes the SDK seconds if the server does not read its stdin.
        timer = asyncio.get_running_loop().call_later(PROBE_SECONDS, self._retire_unresponsive)
        try:
            with anyio.CancelScope() as self._relist_scope:
                self.tools = await list_tools(client)
        except Exception as error:
            _log.warning("MCP server %s: listing the tools again failed: %.500r", self._name, error)
        finally:
            timer.cancel()
        self._probe_done.set()

    def _retire_unresponsive(self) -> None:
        _log.warning("MCP server %s: no response within %g s, it gets no more calls", self._name, PROBE_SECONDS)
        self.retire()
        self._relist_scope.cancel()

    async def _on_message(self, message: IncomingMessage) -> None:
        if isinstance(message, ToolListChangedNotification):
            self._schedule_relist()

    def _schedule_relist(self) -> None:
        if self._relist_timer is None:
            due = self._relisted_at + RELIST_SECONDS
            self._relist_timer = asyncio.get_running_loop().call_at(due, self._request_relist)

    def _request_relist(self) -> None:
        self._relist_timer = None
        self._relisted_at = asyncio.get_running_loop().time()
        self._must_relist = True
        self._wake.set()

    async def _listen_for_changes(self, client: Client) -> None:
        """Hold open the stream on which servers since 2026-07-28 report changes; `_on_message` receives them."""
        capability = client.server_capabilities.tools
        while capability is not None and capability.list_changed:
            try:
                async with client.listen(tools_list_changed=True) as changes:
                    async for _ in changes:
                        pass
            except ListenNotSupportedError:
                return  # an earlier protocol version: the server sends notifications without a subscription
            except (MCPError, SubscriptionLost) as error:
                _log.debug("MCP server %s: the stream of tool changes was lost: %r", self._name, error)
            await asyncio.sleep(LISTEN_RETRY_SECONDS)
            self._schedule_relist()


def _convert_result(result: CallToolResult) -> ToolResult:
    text = "\n".join(block.text for block in result.content if isinstance(block, TextContent))
    blocks = [block.model_dump(mode="json", by_alias=True, exclude_none=True) for block in result.content]
    return ToolResult(bool(result.is_error), text, result.structured_content, blocks)


def _unsupported_feature(error: str) -> str | None:
    """Return the sentence for the unsupported feature that a tool's error names, or None.

    The server's own requests are not used for this: over stdio they do not identify the call that caused them.
    """
    return next((sentence for phrase, sentence in _UNSUPPORTED.items() if phrase in error), None)


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _describe_failure(error: BaseException) -> str:
    match error:
        case FileNotFoundError():
            return "Its command was not found."
        case PermissionError():
            return "Its command is not executable."
        case MCPError(code=code) if code == CONNECTION_CLOSED:
            return "It disconnected before it responded."
        case MCPError():  # its message is only logged: a server's text must not reach the model's instructions
            return "It refused the connection."
        case httpx2.TransportError() | OSError():
            return "It is unreachable at its address."
    return "The connection failed."
