"""`python -m tests.bench.relays sdk|aiohttp|raw URL`: the least that a server in front of a model can do.

It listens on a free port. A POST of `{"content": …}` is answered with SSE, `data: {"text": …}` for each token; nothing
is stored, checked or shared. `sdk`: the official SDK's typed events; `aiohttp`: an HTTP client whose lines are decoded;
`raw`: two sockets.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import cast
from urllib.parse import urlsplit

import msgspec
import uvicorn
import uvloop

from agent_chat.server.serving import listening_socket
from tests.bench.http import Connection, post, serve

_HEADERS = {"x_api_key": "a-key", "anthropic_version": "2023-06-01"}
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class _Content(msgspec.Struct):
    content: str


class _Delta(msgspec.Struct, frozen=True):
    text: str = ""


class _Event(msgspec.Struct):
    type: str
    delta: _Delta = _Delta()


_decode = msgspec.json.Decoder(_Event).decode
_decode_content = msgspec.json.Decoder(_Content).decode
_encode = msgspec.json.Encoder().encode


def _request(content: str) -> dict[str, object]:
    return {
        "model": "bench-1",
        "max_tokens": 100,
        "stream": True,
        "messages": [{"role": "user", "content": [{"type": "text", "text": content}]}],
    }


def _frame(text: str) -> bytes:
    return b"data: %s\n\n" % _encode({"text": text})


def sdk(url: str) -> None:
    """The SDK under starlette and uvicorn."""
    import anthropic
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    http = anthropic.DefaultAioHttpClient(timeout=600)
    client = anthropic.AsyncAnthropic(api_key="a-key", base_url=url, http_client=http, max_retries=0)

    async def relay(request: Request) -> StreamingResponse:
        content = _decode_content(await request.body()).content

        async def frames() -> AsyncIterator[bytes]:
            stream = await client.messages.create(**_request(content))  # type: ignore[call-overload]
            async for event in stream:
                if event.type == "content_block_delta" and event.delta.type == "text_delta":
                    yield _frame(event.delta.text)

        return StreamingResponse(frames(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/", relay, methods=["POST"])])
    config = uvicorn.Config(app, log_level="critical", access_log=False, loop="uvloop")
    sock = listening_socket("127.0.0.1", 0)
    sock.listen(2048)
    print(sock.getsockname()[1], flush=True)  # noqa: T201
    uvicorn.Server(config).run([sock])


async def aiohttp_relay(url: str) -> None:
    """aiohttp on both sides."""
    import aiohttp
    from aiohttp import web

    headers = {name.replace("_", "-"): value for name, value in _HEADERS.items()}
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0), headers=headers) as client:

        async def relay(request: web.Request) -> web.StreamResponse:
            content = _decode_content(await request.read()).content
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            async with client.post("/v1/messages", json=_request(content)) as stream:
                async for line in stream.content:
                    if line.startswith(b"data:") and (event := _decode(line[5:])).type == "content_block_delta":
                        await response.write(_frame(event.delta.text))
            return response

        app = web.Application()
        app.router.add_post("/", relay)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(runner.addresses[0][1], flush=True)  # noqa: T201
        await asyncio.Event().wait()


class _Source(asyncio.Protocol):
    """The model's side of one request, on a connection that is used again."""

    def __init__(self, pool: list[_Source]) -> None:
        self.client: RawRelay | None = None
        self._pool = pool
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.send = cast(asyncio.Transport, transport).write

    def data_received(self, data: bytes) -> None:
        assert self.client is not None
        *lines, self._rest = (self._rest + data).split(b"\n")
        frames = b""
        for line in lines:
            if line.startswith(b"data:") and (event := _decode(line[5:])).type == "content_block_delta":
                frames += _frame(event.delta.text)
        if frames:
            self.client.write(b"%x\r\n%s\r\n" % (len(frames), frames))
        if self._rest == b"" and data.endswith(b"0\r\n\r\n"):
            self.client.write(b"0\r\n\r\n")
            self._pool.append(self)


class RawRelay(Connection):
    """One client."""

    url = ""
    pool: list[_Source] = []  # noqa: RUF012

    def request_received(self, head: bytes, body: bytes) -> None:
        self._task = self.loop.create_task(self._begin(_decode_content(body).content))

    async def _begin(self, content: str) -> None:
        netloc = urlsplit(self.url).netloc
        if self.pool:
            source = self.pool.pop()
        else:
            _, source = await self.loop.create_connection(
                lambda: _Source(self.pool), "127.0.0.1", int(netloc.rpartition(":")[2])
            )
        source.client = self
        self.write(_HEAD)
        source.send(post(netloc, "/v1/messages", _encode(_request(content)), **_HEADERS))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["sdk", url]:
            sdk(url)
        case ["aiohttp", url]:
            uvloop.run(aiohttp_relay(url))
        case ["raw", url]:
            RawRelay.url = url
            uvloop.run(serve(RawRelay))
