"""The WebSocket `…/ws?after=<position>`: the same events as SSE, and commands.

One task writes the viewer's entries. Another receives commands and runs each in a task of its own, so that a slow
command (an interrupt) delays neither events nor pings nor cancellations. Messages are stored one at a time, in the
order of their commands. While 16 commands are in progress no further frame is read. An invalid frame gets an error
frame and the socket stays open; so does a frame above the organization's rate, followed by a pause, and many of those
in a row close the socket with 1013. The socket is accepted before it is refused: without a handshake the client would
get an HTTP 403 without the close code.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Annotated, cast

import msgspec
from msgspec import Meta, Struct
from starlette.websockets import WebSocket, WebSocketDisconnect

from agent_chat.server.ai_chat_service import AIChatService
from agent_chat.server.errors import AuthRateLimited, InvalidRequest, MalformedBody, RateLimited, Unauthenticated
from agent_chat.server.http.auth import authenticator_of, credential_of, same_origin
from agent_chat.server.http.bodies import decode_body
from agent_chat.server.http.problems import problem_of
from agent_chat.server.http.query import read_query
from agent_chat.server.inputs import IfBusy, MessageCreate
from agent_chat.server.limits import RequestRate, Slot
from agent_chat.server.loop_share import LoopShares, begin_streaming, measured, pause
from agent_chat.server.principals import Credential
from agent_chat.server.reading.dialects.native import websocket_frame
from agent_chat.server.reading.streams import Stream, Streams
from agent_chat.server.reading.viewer import Viewer
from agent_chat.server.timing import Timing
from agent_chat.stores.errors import AgentNotFound, StoreUnavailable, ThreadNotFound
from agent_chat.stores.models import JSONObject

NO_KEY = 4401
FOREIGN_ORIGIN = 4403
NO_THREAD = 4404
DELETED = 4410
RESTART = 1012
FAILED = 1011
TRY_LATER = 1013

_PROTOCOL = "chat"
_BEARER = "bearer."
_MAX_COMMANDS = 16
_FRAMES_PER_TURN = 8
"""How many frames are processed before other tasks run: `receive` does not suspend while frames are queued."""
_MAX_BEYOND_RATE = 20
"""How many frames in a row above the rate, each followed by a pause, close the socket."""
_DISCONNECTED = (WebSocketDisconnect, RuntimeError, OSError)
"""What writing to a disconnected client raises."""


class SocketQuery(Struct, frozen=True):
    """The query of a WebSocket."""

    after: Annotated[str, Meta(description="The position to resume after.")] | None = None


class CreateMessage(Struct, tag="message.create", forbid_unknown_fields=True, frozen=True):
    """A command: post a message."""

    request_id: str
    message: MessageCreate
    idempotency_key: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    if_busy: IfBusy = "reject"


class CancelRun(Struct, tag="run.cancel", forbid_unknown_fields=True, frozen=True):
    """A command: cancel a run."""

    request_id: str
    message_id: str


class Ping(Struct, tag="ping", forbid_unknown_fields=True, frozen=True):
    """A command that is acknowledged with a pong."""


Command = CreateMessage | CancelRun | Ping


async def serve_thread(websocket: WebSocket) -> None:
    """Send a thread's events and run commands until either side closes."""
    offered = websocket.scope.get("subprotocols", [])
    with suppress(*_DISCONNECTED):
        # never select `bearer.<key>`: the response would contain the key
        await websocket.accept(subprotocol=_PROTOCOL if _PROTOCOL in offered else None)
    bearer = next((name.removeprefix(_BEARER) for name in offered if name.startswith(_BEARER)), None)
    if bearer is None and not same_origin(websocket):
        await _close(websocket, FOREIGN_ORIGIN, "foreign origin")
        return
    credential = credential_of(websocket) if bearer is None else Credential("key", bearer)
    try:
        viewer, slot = await _open_viewer(websocket, credential)
    except Exception as error:
        await _close(websocket, *_close_code(error))
        return
    with cast(Streams, websocket.state.streams).open(viewer, credential, slot) as stream:
        share = cast(LoopShares, websocket.state.shares).of(viewer.principal.organization_id)
        code = await share.serve_socket(_Socket(websocket, stream).serve())
        if code is not None:
            await _close(websocket, code)


async def _close(websocket: WebSocket, code: int, reason: str = "") -> None:
    with suppress(*_DISCONNECTED):
        await websocket.close(code, reason)


async def _open_viewer(websocket: WebSocket, credential: Credential) -> tuple[Viewer, Slot]:
    """Open the viewer. Returns it with the slot of its stream.

    Raises: Unauthenticated, AuthRateLimited, RateLimited, AgentNotFound, ThreadNotFound, StoreUnavailable.
    """
    service, path = cast(AIChatService, websocket.state.service), websocket.path_params
    principal = await authenticator_of(websocket).authenticate(websocket, credential)
    cast(RequestRate, websocket.state.rate).count(principal.organization_id)
    after = read_query(websocket, SocketQuery).after or None
    with cast(Streams, websocket.state.streams).starting(principal) as slot:
        return await service.watch(principal, path["agent_id"], path["thread_id"], after), slot


def _close_code(error: Exception) -> tuple[int, str]:
    """Return the close code and its reason."""
    match error:
        case Unauthenticated() | AuthRateLimited():
            return NO_KEY, "no valid key"
        case AgentNotFound() | ThreadNotFound():
            return NO_THREAD, "no such thread"
        case RateLimited():
            return TRY_LATER, "rate limited"
        case _:
            return FAILED, problem_of(error).code


class _Socket:
    """One accepted socket: writes the stream's entries and runs the client's commands."""

    def __init__(self, websocket: WebSocket, stream: Stream) -> None:
        self._websocket = websocket
        self._stream = stream
        self._service = cast(AIChatService, websocket.state.service)
        self._streams = cast(Streams, websocket.state.streams)
        self._rate = cast(RequestRate, websocket.state.rate)
        self._timing = cast(Timing, websocket.state.timing)
        self._who = stream.viewer.principal
        self._agent_id = websocket.path_params["agent_id"]
        self._thread_id = websocket.path_params["thread_id"]
        self._commands: set[asyncio.Task[None]] = set()
        self._beyond_rate = 0
        self._creating = asyncio.Lock()  # fair: it is acquired in the order of the frames

    async def serve(self) -> int | None:
        """Serve until either side closes. Returns the code to close with; None if the client disconnected.

        Commands that the client sent before it disconnected are run nevertheless.
        """
        receiving = asyncio.create_task(measured(self._receive))
        try:
            code = await self._pump()
            if code is None:
                await asyncio.wait({receiving})  # its frames are queued, and after them its disconnect
            return code
        finally:
            receiving.cancel()
            await asyncio.wait({receiving, *self._commands})

    async def _pump(self) -> int | None:
        """Write entries until there are no more. Returns as `serve` does."""
        begin_streaming()
        while True:
            try:
                entries = await self._stream.viewer.next()
            except StoreUnavailable:
                return TRY_LATER
            if self._stream.gone:
                return None
            if self._stream.revoked:
                return NO_KEY
            if entries is None:
                return DELETED
            entries.reverse()
            while entries:  # release each one: a snapshot has megabytes, and its client may have stopped reading
                await self._write(entries.pop().encoded(websocket_frame))
            if self._streams.closing:
                return RESTART
            if self._beyond_rate >= _MAX_BEYOND_RATE:
                return TRY_LATER

    async def _receive(self) -> None:
        try:
            while self._beyond_rate < _MAX_BEYOND_RATE:
                for _ in range(_FRAMES_PER_TURN):
                    frame = await self._websocket.receive()
                    if frame["type"] == "websocket.disconnect":
                        self._stream.leave()
                        return
                    await self._handle_frame(frame.get("text"))
                await pause()
            self._stream.viewer.wake()
        except BaseException:
            self._stream.leave()
            raise

    async def _handle_frame(self, text: str | None) -> None:
        try:
            self._rate.count(self._who.organization_id)
            self._beyond_rate = 0
            if text is None:
                raise MalformedBody("Send text frames, not binary ones.")
            command = decode_body(text.encode(), cast(type[Struct], Command))
        except Exception as error:
            await self._refuse(error, _request_id(text))
            if isinstance(error, RateLimited):
                self._beyond_rate += 1
                await asyncio.sleep(self._timing.rate_pause)
            return
        match command:
            case Ping():
                await self._send({"type": "pong"})
            case CreateMessage() | CancelRun():
                await self._start_command(command)

    async def _start_command(self, command: CreateMessage | CancelRun) -> None:
        while len(self._commands) >= _MAX_COMMANDS:
            await asyncio.wait(self._commands, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(measured(self._run_command, command))
        self._commands.add(task)
        task.add_done_callback(self._commands.discard)

    async def _run_command(self, command: CreateMessage | CancelRun) -> None:
        try:
            if isinstance(command, CreateMessage):
                async with self._creating:
                    await self._create(command)
            else:
                await self._cancel(command)
        except Exception as error:
            await self._refuse(error, command.request_id)

    async def _check_key(self) -> None:
        """Check that the credential is still valid.

        Raises:
            Unauthenticated: it is not; the socket is closed.
            StoreUnavailable: it could not be checked.
        """
        if await authenticator_of(self._websocket).principals.find(self._stream.credential) != self._who:
            self._stream.revoke()
            raise Unauthenticated

    async def _create(self, command: CreateMessage) -> None:
        await self._check_key()
        try:
            posted = await self._service.post_message(
                self._who,
                self._agent_id,
                self._thread_id,
                command.message,
                idempotency_key=command.idempotency_key,
                if_busy=command.if_busy,
            )
        except InvalidRequest as error:  # the POST's body is the member `message` of the frame
            raise InvalidRequest(f"message.{error.field}", str(error)) from error
        if posted.answer is not None:
            await self._acknowledge(command.request_id, posted.answer.id, posted.message.id)
        else:
            await self._acknowledge(command.request_id, posted.message.id, None)

    async def _cancel(self, command: CancelRun) -> None:
        await self._check_key()
        message = await self._service.cancel(self._who, self._agent_id, self._thread_id, command.message_id)
        await self._acknowledge(command.request_id, message.id, (message.run or {}).get("in_reply_to"))

    async def _acknowledge(self, request_id: str, message_id: str, in_reply_to: str | None) -> None:
        await self._send(
            {"type": "ack", "request_id": request_id, "message_id": message_id, "in_reply_to": in_reply_to}
        )

    async def _refuse(self, error: Exception, request_id: str | None) -> None:
        frame: JSONObject = {"type": "error", "error": problem_of(error).body()}
        if request_id is not None:
            frame["request_id"] = request_id
        await self._send(frame)

    async def _send(self, frame: JSONObject) -> None:
        await self._write(msgspec.json.encode(frame).decode())

    async def _write(self, text: str) -> None:
        """Send a frame, unless the client has disconnected."""
        if not self._stream.gone:
            try:
                await self._websocket.send_text(text)
            except _DISCONNECTED:
                self._stream.leave()


def _request_id(text: str | None) -> str | None:
    """Return the request_id of an invalid frame; None if it has none."""
    try:
        frame = msgspec.json.decode(text or "")
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    found = frame.get("request_id") if isinstance(frame, dict) else None
    return found if isinstance(found, str) else None
