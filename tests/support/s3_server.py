"""An S3 server for tests: moto's, in a process of its own. Each test creates its bucket."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.support.services import free_port, missing

START_SECONDS = 30.0


class S3Server:
    """Its endpoint, and the operations of S3 that obstore lacks."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"

    def answers(self) -> bool:
        try:
            self._ask("GET", "moto-api/")
            return True
        except OSError:
            return False

    def create(self, bucket: str) -> None:
        self._ask("PUT", bucket)

    def unfinished(self, bucket: str) -> int:
        """How many multipart uploads were begun and neither completed nor aborted."""
        return self._ask("GET", f"{bucket}?uploads").count(b"<UploadId>")

    def keys(self, bucket: str) -> int:
        return self._ask("GET", f"{bucket}?list-type=2").count(b"<Key>")

    def _ask(self, method: str, path: str) -> bytes:
        request = urllib.request.Request(f"{self.endpoint}/{path}", method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            body: bytes = answer.read()
        return body


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    if find_spec("moto") is None or find_spec("flask") is None:
        missing("moto[server] is not installed")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        server = S3Server(port)
        deadline = time.monotonic() + START_SECONDS
        while not server.answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("moto's server did not start")
            time.sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait()
