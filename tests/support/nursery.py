"""Server processes that start within milliseconds: forks of one process that has imported everything.

Importing costs a second of CPU for each start. A forked server is a process like any other: it can be killed and
stopped alone. Its warden, a fork between it and the nursery, waits for it and reports its exit code.

`python -m tests.support.nursery` receives requests over the socket that is its stdin. A request is an environment and
two files: the server's stdout, and a pipe to which the process id and then the exit code are written, a line each. When
the tests end, for whatever reason, the socket is closed, and the nursery kills its whole process group.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from functools import cache

_REQUEST_BYTES = 2**18


class Fork:
    """A server process, with what tests use of `asyncio.subprocess.Process`."""

    def __init__(self, pid: int, stdout: asyncio.StreamReader, fate: asyncio.StreamReader) -> None:
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None
        self._fate = fate

    async def wait(self) -> int:
        """Wait for its end; the exit code, or the signal's number below zero."""
        if self.returncode is None:
            self.returncode = int(await self._fate.readline())
        return self.returncode


async def fork(environment: dict[str, str]) -> Fork:
    """Start a server in this environment."""
    output, fate = os.pipe(), os.pipe()
    socket.send_fds(_nursery().requests, [json.dumps(environment).encode() + b"\n"], [output[1], fate[1]])
    os.close(output[1])
    os.close(fate[1])
    fate_reader = await _reader(fate[0])
    return Fork(int(await fate_reader.readline()), await _reader(output[0]), fate_reader)


async def _reader(pipe: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(pipe, "rb"))
    return reader


class _Nursery:
    def __init__(self) -> None:
        self.requests, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with its:
            command = [sys.executable, "-m", "tests.support.nursery"]
            self.process = subprocess.Popen(command, stdin=its.fileno(), start_new_session=True)


@cache
def _nursery() -> _Nursery:
    """The one nursery of this test process."""
    return _Nursery()


def main() -> None:
    from tests.support.server_main import preload, serve  # not needed by the process that runs the tests

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    requests = socket.socket(fileno=os.dup(0))
    while True:
        request, files, *_ = socket.recv_fds(requests, _REQUEST_BYTES, 2)
        while request[-1:] != b"\n":
            if not (more := requests.recv(_REQUEST_BYTES)):
                os.killpg(0, signal.SIGKILL)
            request += more
        environment = json.loads(request)
        preload(environment)
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    requests.close()
    output, fate = files
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        os.close(output)
        _watch(pid, fate)
    os.close(fate)
    _become(environment, output)
    serve()


def _watch(pid: int, fate: int) -> None:
    """Report the server's process id, then its exit code."""
    os.write(fate, b"%d\n" % pid)
    _, ended = os.waitpid(pid, 0)
    os.write(fate, b"%d\n" % os.waitstatus_to_exitcode(ended))
    os._exit(0)


def _become(environment: dict[str, str], output: int) -> None:
    """Take the environment and the stdout of the new server."""
    os.environ.clear()
    os.environ.update(environment)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for file, stream in ((nothing, 0), (output, 1)):
        os.dup2(file, stream)
        os.close(file)


if __name__ == "__main__":
    main()
