"""The MongoDB that tests run against: the one that CHAT_TEST_MONGODB_URL names, else SecantusDB.

SecantusDB speaks MongoDB's wire protocol on WiredTiger. It is slow, so no throughput is measured on it; and a filter
with `$expr` and `$$NOW` finds anything in it (0.7.0b3), while `$$NOW` in a pipeline update is right.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from urllib.parse import urlsplit, urlunsplit

import pytest

from agent_chat.stores.models import new_id
from tests.support.services import START_SECONDS, free_port, missing


class MongoServer:
    """A SecantusDB in a process of its own, with the same port and folder after every restart.

    Args:
        durable: what it acknowledged survives a kill, as MongoDB's majority does; several times as slow.
    """

    def __init__(self, folder: str, *, durable: bool = False) -> None:
        if find_spec("secantus") is None:
            missing("no CHAT_TEST_MONGODB_URL, and no secantusdb installed")
        self._folder = folder
        self._durable = durable
        self.port = free_port()
        self.url = f"mongodb://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it responds. Raises: RuntimeError if it does not in time."""
        options = ["--port", str(self.port), "--storage-path", self._folder, "--log-level", "ERROR"]
        options += ["--sync-on-commit"] if self._durable else []
        command = [sys.executable, "-m", "secantus", *options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._answers():
                return
            time.sleep(0.02)
        self.stop()
        raise RuntimeError(f"SecantusDB did not start on port {self.port}")

    def stop(self, *, kill: bool = False) -> None:
        """Stop it, or kill it: then the last acknowledged writes are lost, unless it is durable."""
        if self._process is None:
            return
        self._process.kill() if kill else self._process.terminate()
        try:
            self._process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
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

    def _answers(self) -> bool:
        from pymongo import MongoClient
        from pymongo.errors import PyMongoError

        try:
            with MongoClient[dict[str, object]](self.url, serverSelectionTimeoutMS=200) as client:
                client.admin.command("ping")
        except PyMongoError:
            return False
        return True


@contextmanager
def mongo_process(*, durable: bool = False) -> Iterator[MongoServer]:
    """A MongoDB for a test that stops and starts it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = MongoServer(folder, durable=durable)
        server.start()
        try:
            yield server
        finally:
            server.stop(kill=True)


@pytest.fixture(scope="session")
def mongo_server() -> Iterator[str]:
    """One MongoDB for all tests that leave it running. Use a database of your own: `mongo_url`."""
    if given := os.environ.get("CHAT_TEST_MONGODB_URL"):
        yield given
        return
    with mongo_process() as server:
        yield server.url


@pytest.fixture
def mongo_url(mongo_server: str) -> Iterator[str]:
    """A database for one test, which is dropped afterwards."""
    from pymongo import MongoClient

    name = f"test-{new_id()}"
    yield urlunsplit(urlsplit(mongo_server)._replace(path=f"/{name}"))
    with MongoClient[dict[str, object]](mongo_server) as client:
        client.drop_database(name)
