"""A uvicorn server that drains: after SIGTERM or Ctrl-C it still listens while runs end and streams are closed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import signal
import socket
import sys
from collections.abc import Callable, Collection
from functools import partial
from types import FrameType
from typing import cast

import uvicorn
from starlette.applications import Starlette

from agent_chat.server.http.bodies import BODY_BYTES
from agent_chat.server.http.connections import Connection, ConnectionLimits, Connections
from agent_chat.server.http.protocol import HTTPProtocol
from agent_chat.server.http.websocket_protocol import WebSocketProtocol

_SEND_BUFFER = 64 * 1024
_CLOSE_SECONDS = 5
_FORCED_SECONDS = 1.0
_SWITCH_SECONDS = 0.0005
_GC_THRESHOLDS = (10_000, 20, 20)


class Server(uvicorn.Server):
    """Serves one application on one socket. A second signal stops it immediately.

    Args:
        announce: called once it listens.
        announce_stop: called with the number of running answers when it begins to wait for them.
        limits: the limits on connections.
        forwarded_allow_ips: the proxies whose X-Forwarded headers are trusted, separated by commas; None for loopback.
    """

    def __init__(
        self,
        app: Starlette,
        announce: Callable[[], None] = lambda: None,
        announce_stop: Callable[[int], None] = lambda running: None,
        limits: ConnectionLimits = ConnectionLimits(),
        forwarded_allow_ips: str | None = None,
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="critical",  # the command line reports a start that fails, in one line
            access_log=False,
            server_header=False,
            forwarded_allow_ips=forwarded_allow_ips,
            # the default is to wait for ever
            timeout_graceful_shutdown=_CLOSE_SECONDS,
            lifespan="on",
            timeout_keep_alive=math.ceil(limits.idle_seconds),
            ws=WebSocketProtocol,
            ws_max_size=BODY_BYTES,
            # on by default; costs memory and CPU per socket and frame
            ws_per_message_deflate=False,
        )
        super().__init__(config)
        opened = cast(Collection[Connection], self.server_state.connections)
        self.connections = app.state.connections = Connections(limits, opened)
        config.http = partial(HTTPProtocol, connections=self.connections)  # type: ignore[assignment]
        self.listening = asyncio.Event()
        self._app = app
        self._announce = announce
        self._announce_stop = announce_stop
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, then announce it."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        if self.started:
            self._announce()
            self.listening.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal; stop immediately at the second."""
        if self._loop is None:
            super().handle_exit(sig, frame)
            return
        if not self.started:
            signal.signal(sig, signal.SIG_DFL)  # the next signal ends a start that hangs
        self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Stop the runs, then the streams, then the server. A second call stops immediately."""
        if self._draining is not None:
            self.force_exit = True
            self._draining.cancel()
        elif self.started:
            self._announce_stop(self._app.state.running())
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self.should_exit = True

    async def _drain(self) -> None:
        try:
            await self._app.state.drain()
        finally:
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections and end the application."""
        stalled = asyncio.get_running_loop().call_later(_FORCED_SECONDS, self.connections.abort_stalled)
        await super().shutdown(sockets)
        stalled.cancel()
        if self.force_exit:  # uvicorn skips the lifespan then, which stores runs as interrupted
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FORCED_SECONDS):
                    await self.lifespan.shutdown()


def freeze_startup_objects() -> None:
    """Exclude the present objects from garbage collection, and collect less often.

    For a process that only serves, once it listens. A full collection over the 220,000 objects of the imported modules
    takes 0.2 s, during which no stream gets a token.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def share_interpreter() -> None:
    """Have Python's threads take turns every half millisecond, not every five: each hop to a thread waits for one.

    For a process that only serves. Its threads compete with the event loop only under load, and then what waits is a
    stream's next token, or an upload, which makes a dozen hops.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)


def listening_socket(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """Open a listening socket whose connections buffer little in the kernel: a stopped reader is noticed early.

    With default buffers about 4 MB are taken before a write blocks; with these, 0.1 to 0.3 MB.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # the protocol is given because asyncio sets TCP_NODELAY on connections only where it is
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _SEND_BUFFER)
    if reuse_port:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, port))
    sock.setblocking(False)
    return sock
