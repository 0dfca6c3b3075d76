"""The inside of a worker process: its limits, its timers, and the loop that serves requests.

`worker.py` starts it as a bare interpreter with a module's `main`, which calls `serve`. Requests come as frames on
stdin, replies go as frames to stdout. Only the kernel ends a request early: by CPU time, wall time or memory. This
module imports only the standard library, because every start of a worker pays for its imports.
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
"""The header of a request: its length."""
REPLY = struct.Struct("!BQ")
"""The header of a frame from the worker: its kind and its length."""
NOTE, DONE, LAST, NO_MEMORY, ERROR = range(5)
"""Kinds of frames: an early note, the reply, the reply of a process that ends after it, and two kinds of failure."""

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38


class _FrameWriter:
    """Writes frames to the original stdout. What libraries print to stdout is discarded: it would corrupt them."""

    def __init__(self) -> None:
        self._out: BinaryIO = os.fdopen(os.dup(1), "wb")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)

    def send(self, kind: int, data: bytes) -> None:
        self._out.write(REPLY.pack(kind, len(data)) + data)
        self._out.flush()


class RequestContext:
    """What a handler may do about the request in progress."""

    def __init__(self, channel: _FrameWriter, wall_seconds: float) -> None:
        self._channel = channel
        self._wall_seconds = wall_seconds

    def note(self, data: bytes) -> None:
        """Send `data` immediately, so that it is known even if this process does not survive the request."""
        self._channel.send(NOTE, data)

    def set_cpu_seconds(self, cpu_seconds: float) -> None:
        """Replace the request's remaining CPU time, counted from now."""
        _set_clocks(cpu_seconds, self._wall_seconds)


def serve(handle: Callable[[bytes, RequestContext], bytes]) -> None:
    """Reply to requests until stdin ends or this process has reached one of its limits for renewal."""
    limits = json.loads(sys.argv[3])
    try:
        _serve(handle, limits, _FrameWriter())
    except (BrokenPipeError, struct.error):  # the server died in the middle of a frame
        os._exit(1)  # an ordinary exit would flush to the broken pipe and print a traceback


def _serve(handle: Callable[[bytes, RequestContext], bytes], limits: dict[str, float], channel: _FrameWriter) -> None:
    _confine(limits)
    gc.disable()  # garbage is collected between requests
    context = RequestContext(channel, limits["wall_seconds"])
    served = 0
    while header := sys.stdin.buffer.read(REQUEST.size):
        (size,) = REQUEST.unpack(header)
        if len(request := sys.stdin.buffer.read(size)) < size:
            return
        served += 1
        _set_clocks(limits["cpu_seconds"], limits["wall_seconds"])
        kind, reply = _run_handler(handle, request, context)
        _set_clocks(0, 0)
        worn_out = served >= limits["requests"] or _peak_bytes() > limits["resident_bytes"]
        kind = LAST if kind == DONE and worn_out else kind
        channel.send(kind, reply)
        if kind != DONE:
            return
        del request, reply
        gc.collect()


def _run_handler(
    handle: Callable[[bytes, RequestContext], bytes], request: bytes, context: RequestContext
) -> tuple[int, bytes]:
    try:
        return DONE, handle(request, context)
    except MemoryError:
        return NO_MEMORY, b""
    except BaseException as error:  # pyo3 raises a panic as a BaseException
        return ERROR, _error_location(error).encode()


def _error_location(error: BaseException) -> str:
    """Return the type of an error and where it was raised, without its text, which may contain parts of the request."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "?"
    return f"{type(error).__name__[:100]} at {where[:100]}"


def _confine(limits: dict[str, float]) -> None:
    """Apply the limits of this process. README, *Workers*, says what they guarantee if a file controls the process."""
    os.nice(int(limits["nice"]))
    try:  # with autogroup scheduling the priority of the session counts, not that of the process
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
    if os.getppid() != limits["parent"]:  # the server died before PDEATHSIG was set
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
    """Have the kernel kill this process after this much time; 0 stops the timers."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)


def _peak_bytes() -> int:
    """Return this process's peak memory. On Linux ru_maxrss includes the parent's size at the fork, VmHWM does not."""
    if sys.platform == "linux":
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(peak[1]) * 1024 if peak else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
