"""What runs inside a worker process: its limits, its clocks, and the loop that serves requests.

`worker.py` starts it as a bare interpreter with a module's `main`, which calls `serve`. Requests come as frames on
stdin, replies go as frames to stdout. Everything that ends a request early is the kernel's: CPU time, wall time and
memory. Imports only the standard library: this is paid at each start of a worker.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

REQUEST = struct.Struct("!Q")
"""Before every request: its length."""
REPLY = struct.Struct("!BQ")
"""Before every frame of the worker: its kind and its length."""
NOTE, DONE, LAST, NO_MEMORY, ERROR = range(5)
"""Kinds: something known early, the reply, the reply of a process that ends now, and two reasons for having none."""

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38


class _Channel:
    """The frames' way out. What a library prints to stdout is dropped, so that it is not taken for a frame."""

    def __init__(self) -> None:
        self._out: BinaryIO = os.fdopen(os.dup(1), "wb")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)

    def send(self, kind: int, data: bytes) -> None:
        self._out.write(REPLY.pack(kind, len(data)) + data)
        self._out.flush()


class Job:
    """The request in progress."""

    def __init__(self, channel: _Channel, wall_seconds: float) -> None:
        self._channel = channel
        self._wall_seconds = wall_seconds

    def note(self, data: bytes) -> None:
        """Report something now, so that it survives the end of this process."""
        self._channel.send(NOTE, data)

    def allow(self, cpu_seconds: float) -> None:
        """Give the request so much CPU time from now on, in place of what it had."""
        _set_clocks(cpu_seconds, self._wall_seconds)


def serve(handle: Callable[[bytes, Job], bytes]) -> None:
    """Reply to requests until stdin ends, or until it is time for a fresh process."""
    limits = json.loads(sys.argv[3])
    try:
        _serve(handle, limits, _Channel())
    except (BrokenPipeError, struct.error):  # the server died in the middle of a frame
        os._exit(1)  # an ordinary exit would flush into the broken pipe and complain


def _serve(handle: Callable[[bytes, Job], bytes], limits: dict[str, float], channel: _Channel) -> None:
    _confine(limits)
    gc.disable()  # garbage is collected between requests
    job = Job(channel, limits["wall_seconds"])
    served = 0
    while header := sys.stdin.buffer.read(REQUEST.size):
        (size,) = REQUEST.unpack(header)
        if len(request := sys.stdin.buffer.read(size)) < size:
            return
        served += 1
        _set_clocks(limits["cpu_seconds"], limits["wall_seconds"])
        kind, reply = _attempt(handle, request, job)
        _set_clocks(0, 0)
        worn_out = served >= limits["requests"] or _peak_bytes() > limits["resident_bytes"]
        kind = LAST if kind == DONE and worn_out else kind
        channel.send(kind, reply)
        if kind != DONE:
            return
        del request, reply
        gc.collect()


def _attempt(handle: Callable[[bytes, Job], bytes], request: bytes, job: Job) -> tuple[int, bytes]:
    try:
        return DONE, handle(request, job)
    except MemoryError:
        return NO_MEMORY, b""
    except BaseException as error:  # a panic in Rust is not an Exception
        return ERROR, _place(error).encode()


def _place(error: BaseException) -> str:
    """The kind of an error and where it was raised. Not its text, which may hold some of the request."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "?"
    return f"{type(error).__name__[:100]} at {where[:100]}"


def _confine(limits: dict[str, float]) -> None:
    """Apply the limits of this process. What must hold even where it was taken over: see the README, *Workers*."""
    os.nice(int(limits["nice"]))
    try:  # where the kernel groups processes by session, the group's priority counts
        Path("/proc/self/autogroup").write_text(str(int(limits["nice"])))
    except OSError:
        pass
    for name, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
    ):
        hard = resource.getrlimit(name)[1]
        most = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
        try:
            resource.setrlimit(name, (most, most))
        except (ValueError, OSError):  # macOS has no RLIMIT_AS
            pass
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != limits["parent"]:  # the server died before the line above
        os._exit(1)


def hide_process() -> None:
    """Make this process's memory and environment unreadable to other processes of its user, its workers above all.

    Core dumps, and debuggers and profilers that attach (gdb, strace, py-spy), need root from then on.
    """
    _prctl(_PR_SET_DUMPABLE, 0)


def _prctl(option: int, value: int) -> None:
    """https://man7.org/linux/man-pages/man2/prctl.2.html"""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _set_clocks(cpu_seconds: float, wall_seconds: float) -> None:
    """Have the kernel end this process after so much time; 0 stops the clocks."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)


def _peak_bytes() -> int:
    """The most memory that this process ever held. On Linux ru_maxrss counts what its parent held at the fork."""
    if sys.platform == "linux":
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(peak[1]) * 1024 if peak else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
