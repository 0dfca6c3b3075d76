"""A stand-in for the Anthropic Messages API, live on a port, speaking the real wire format.

It answers each request with the next reply of `replies`, else with `otherwise`. It keeps every request that it got,
in its bytes too, and refuses the wrong ones as the API does. A reply can go wrong in every way that is known.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import msgspec
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from agent_chat.server.serving import listening_socket
from tests.support.anthropic_rules import faults

JSON = dict[str, Any]
USAGE = {"input_tokens": 10, "cache_creation_input_tokens": 5, "cache_read_input_tokens": 3, "output_tokens": 1}
OUTPUT_TOKENS = 7


class Gate:
    """Where a reply waits: the test sees that it got there, and lets it go on."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.go = asyncio.Event()


class Refusal(msgspec.Struct, frozen=True):
    """An error instead of an answer."""

    status: int
    kind: str
    message: str = "secret words of the service"
    headers: dict[str, str] = {}


class Stream(msgspec.Struct, frozen=True):
    """A streamed answer. `ending` comes after so many `events`; null: after all of them.

    stop: nothing more is done to it. end: the body ends, properly. cut: the connection breaks. stall: nothing more
    comes. garbage: a line that is no JSON. Anything else is the type of an `error` event. `joined`: all in one write;
    `pace`: seconds between two events.
    """

    events: list[JSON]
    ending: str = "stop"
    after: int | None = None
    gate: tuple[int, Gate] | None = None
    joined: bool = False
    pace: float = 0.0

    def ends(self, ending: str, after: int | None = None) -> Stream:
        return msgspec.structs.replace(self, ending=ending, after=after)

    def waits(self, at: int, gate: Gate) -> Stream:
        return msgspec.structs.replace(self, gate=(at, gate))


Reply = Refusal | Stream


def text(*pieces: str) -> list[JSON]:
    """A text block's events, without their index."""
    deltas = [{"type": "text_delta", "text": piece} for piece in pieces]
    return _block({"type": "text", "text": ""}, deltas)


def thinking(*pieces: str) -> list[JSON]:
    deltas: list[JSON] = [{"type": "thinking_delta", "thinking": piece} for piece in pieces]
    deltas.append({"type": "signature_delta", "signature": "signed " + "".join(pieces)})
    return _block({"type": "thinking", "thinking": "", "signature": ""}, deltas)


def redacted(data: str) -> list[JSON]:
    return _block({"type": "redacted_thinking", "data": data}, [])


def use(name: str, arguments: object, *, pieces: int = 3, **more: object) -> list[JSON]:
    """A call, its arguments' JSON (or the text as it is) in pieces; `more` replaces fields of its block."""
    whole = arguments if isinstance(arguments, str) else json.dumps(arguments)
    step = -(-len(whole) // pieces) or 1
    parts = ["", *(whole[start : start + step] for start in range(0, len(whole), step))]
    deltas = [{"type": "input_json_delta", "partial_json": part} for part in parts]
    return _block({"type": "tool_use", "id": f"toolu_{name}", "name": name, "input": {}, **more}, deltas)


def _block(start: JSON, deltas: list[JSON]) -> list[JSON]:
    return [
        {"type": "content_block_start", "content_block": start},
        *({"type": "content_block_delta", "delta": delta} for delta in deltas),
        {"type": "content_block_stop"},
    ]


def says(*blocks: list[JSON], stop: str | None = None) -> Stream:
    """A whole answer of these blocks."""
    called = any(block[0]["content_block"]["type"] == "tool_use" for block in blocks)
    reason = stop or ("tool_use" if called else "end_turn")
    message: JSON = {
        "id": "msg_1", "type": "message", "role": "assistant", "content": [], "model": "stand-in-1",
        "stop_reason": None, "stop_sequence": None, "usage": USAGE,
    }  # fmt: skip
    events: list[JSON] = [{"type": "message_start", "message": message}, {"type": "ping"}]
    for index, block in enumerate(blocks):
        events += [{**event, "index": index} for event in block]
        events.append({"type": "ping"})
    delta = {"stop_reason": reason, "stop_sequence": None}
    events.append({"type": "message_delta", "delta": delta, "usage": {"output_tokens": OUTPUT_TOKENS}})
    events.append({"type": "message_stop"})
    return Stream(events)


def frame(event: JSON) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


class StandIn:
    """The service. `overlong` is how many bytes of messages are too many for the model."""

    def __init__(self) -> None:
        self.url = ""
        self.key = "a-key"
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.overlong = 10**9
        self.replies: deque[Reply] = deque()
        self.otherwise: Callable[[JSON], Reply] = lambda request: says(text("Fine."))
        self.title: Reply | str = '"A Fine Title."'
        self.requests: list[JSON] = []
        self.bodies: list[bytes] = []
        self.titles: list[JSON] = []
        self.refused: list[str] = []
        self.abandoned = asyncio.Semaphore(0)
        self.connections: set[object] = set()

    def will(self, *replies: Reply) -> None:
        self.replies.extend(replies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        self.connections.add(scope["client"])
        raw = await request.body()
        body = json.loads(raw)
        reply = self._reply(request, body, raw)
        match reply:
            case Stream():
                await self._stream(reply, receive, send)
            case str():
                message = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"]}
                content = [{"type": "text", "text": reply}] if reply else []
                rest = {"stop_reason": "end_turn", "stop_sequence": None, "usage": USAGE}
                data = json.dumps({**message, "content": content, **rest})  # a lone surrogate stays as it is
                await Response(data, media_type="application/json")(scope, receive, send)
            case Refusal():
                error = {"type": "error", "error": {"type": reply.kind, "message": reply.message}}
                await JSONResponse(error, reply.status, reply.headers)(scope, receive, send)

    def _reply(self, request: Request, body: JSON, raw: bytes) -> Reply | str:
        if request.url.path != "/v1/messages":
            return Refusal(404, "not_found_error")
        headers = request.headers
        if self.key not in (headers.get("x-api-key"), headers.get("authorization", "").removeprefix("Bearer ")):
            return Refusal(401, "authentication_error", "invalid x-api-key")
        if not body.get("stream"):
            self.titles.append(body)
            return self.title
        self.requests.append(body)
        self.bodies.append(raw)
        if wrong := faults(body):
            self.refused += wrong
            return Refusal(400, "invalid_request_error", wrong[0])
        if (size := len(json.dumps(body["messages"]))) > self.overlong:
            return Refusal(400, "invalid_request_error", f"prompt is too long: {size} tokens > {self.overlong} maximum")
        return self.replies.popleft() if self.replies else self.otherwise(body)

    async def _stream(self, stream: Stream, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await write(b"")
        leaving = asyncio.create_task(self._leaving(receive))
        try:
            events = stream.events[: stream.after]
            if stream.joined:
                await write(b"".join(map(frame, events)))
            for index, event in enumerate([] if stream.joined else events):
                if stream.gate and stream.gate[0] == index:
                    stream.gate[1].reached.set()
                    waiting = asyncio.create_task(stream.gate[1].go.wait())
                    await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
                    waiting.cancel()
                data = frame(event)
                await write(data)
                if stream.pace:
                    await asyncio.sleep(stream.pace)
            match stream.ending:
                case "stop" | "end":
                    pass
                case "cut":
                    raise ConnectionAbortedError  # uvicorn then closes the connection in mid-body
                case "stall":
                    await leaving
                case "garbage":
                    await write(b'event: content_block_delta\ndata: {"type": "content_blo\n\n')
                case kind:
                    await write(frame({"type": "error", "error": {"type": kind, "message": "secret words"}}))
            await write(b"", more=False)
        finally:
            leaving.cancel()

    async def _leaving(self, receive: Receive) -> None:
        """Wait until the client closes the connection before the end."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.abandoned.release()


class _Server(uvicorn.Server):
    """Tells when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@asynccontextmanager
async def serving(
    app: Any, *, lifespan: Literal["on", "off"] = "off", keep_alive_seconds: int = 5
) -> AsyncIterator[str]:
    """A uvicorn on port 0 in this event loop; its URL."""
    sock = listening_socket("127.0.0.1", 0)
    config = uvicorn.Config(
        app,
        log_level="critical",
        access_log=False,
        lifespan=lifespan,
        timeout_graceful_shutdown=1,
        timeout_keep_alive=keep_alive_seconds,
    )
    server = _Server(config)
    running = asyncio.create_task(server._serve([sock]))
    try:
        async with asyncio.timeout(10):
            await server.listening.wait()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        async with asyncio.timeout(10):
            await running


@asynccontextmanager
async def stand_in(*, keep_alive_seconds: int = 5) -> AsyncIterator[StandIn]:
    service = StandIn()
    async with serving(service, keep_alive_seconds=keep_alive_seconds) as service.url:
        yield service


def parts(body: bytes) -> dict[str, bytes]:
    """The members of a request as they came over the wire, to be compared byte for byte."""
    return {name: bytes(raw) for name, raw in msgspec.json.decode(body, type=dict[str, msgspec.Raw]).items()}
