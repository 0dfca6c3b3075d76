"""Server processes that start in a blink: forks of one process that has imported everything.

Importing costs a second of CPU for each start. A forked server is a process like any other: it is killed and stopped
alone, and it ends with an exit code, which its warden, a fork between it and the nursery, waits for and tells.

`python -m tests.support.forks` takes requests from the socket that is its stdin: an environment, and two files, one
for the server's output and one for its fate, the process id and then the exit code, a line each. When the tests end,
however they do, the socket is closed, and the nursery ends with its whole process group.
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

    def send_signal(self, how: signal.Signals) -> None:
        os.kill(self.pid, how)

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
    told = await _reader(fate[0])
    return Fork(int(await told.readline()), await _reader(output[0]), told)


async def _reader(pipe: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(pipe, "rb"))
    return reader


class _Nursery:
    def __init__(self) -> None:
        self.requests, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with its:
            command = [sys.executable, "-m", "tests.support.forks"]
            self.process = subprocess.Popen(command, stdin=its.fileno(), start_new_session=True)


@cache
def _nursery() -> _Nursery:
    """The nursery of these tests: one, for as long as they run."""
    return _Nursery()


def main() -> None:
    from tests.support.serve import serve  # the tests themselves need nothing of it

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    requests = socket.socket(fileno=os.dup(0))
    while True:
        request, files, *_ = socket.recv_fds(requests, _REQUEST_BYTES, 2)
        while request[-1:] != b"\n":
            if not (more := requests.recv(_REQUEST_BYTES)):
                os.killpg(0, signal.SIGKILL)
            request += more
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
    _become(json.loads(request), output)
    serve()


def _watch(pid: int, fate: int) -> None:
    """Tell who the server is, and how it ended."""
    os.write(fate, b"%d\n" % pid)
    _, ended = os.waitpid(pid, 0)
    os.write(fate, b"%d\n" % os.waitstatus_to_exitcode(ended))
    os._exit(0)


def _become(environment: dict[str, str], output: int) -> None:
    """A server of its own: its settings, and its output."""
    os.environ.clear()
    os.environ.update(environment)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for file, stream in ((nothing, 0), (output, 1)):
        os.dup2(file, stream)
        os.close(file)


if __name__ == "__main__":
    main()
