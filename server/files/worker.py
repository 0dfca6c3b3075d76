"""Worker processes for code that hostile input can crash, exhaust or keep busy.

`content_html` and `extraction` have a pool each. A worker is a bare interpreter (`worker_process.py`) that serves one
request at a time within limits that the kernel enforces. It is killed and replaced whenever something goes wrong, so
that a crash, a decompression bomb or a hang costs one worker and one request. Of the server's environment it inherits
only what the interpreter needs to start. Organizations share the workers fairly (`turns.py`).

Refused: a thread (the libraries cannot be interrupted, and it would share the GIL); `multiprocessing`, which imports
the server's `__main__` again; `concurrent.futures`, where one dead worker breaks the pool and a hanging one never ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import msgspec

from agent_chat.server.files.turns import Turns
from agent_chat.server.files.worker_process import DONE, ERROR, LAST, NO_MEMORY, NOTE, REPLY, REQUEST
from agent_chat.server.settings import environment

logger = logging.getLogger(__name__)

Reason = Literal["time", "memory", "crash", "error", "start", "closed"]

_BOOT = "import sys, importlib; sys.path.append(sys.argv[1]); importlib.import_module(sys.argv[2]).main()"
"""The folder is appended to the module path and -P leaves out the working directory, so that no file of ours hides a
module of the standard library."""
_ENVIRONMENT = ("LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR")
_START_SECONDS = 20.0
_END_SECONDS = 5.0
_NOTES = 4
_NOTE_BYTES = 1024


class WorkerLimits(msgspec.Struct, frozen=True):
    """The resources of one worker. CPU and wall time apply to each request, the others to the process.

    `processes` counts all processes and threads of the server's user (RLIMIT_NPROC), so only 0 or a large number makes
    sense. A worker ends after `requests` requests, or after one that raised its peak memory above `resident_bytes`; the
    next request starts another.
    """

    cpu_seconds: float
    wall_seconds: float
    memory_bytes: int
    file_bytes: int
    reply_bytes: int
    processes: int
    requests: int
    resident_bytes: int
    nice: int
    open_files: int = 64


class WorkerFailed(Exception):
    """A request failed without a reply. `reason` is why, `note` the last note that the worker sent before it."""

    def __init__(self, reason: Reason, detail: str = "", note: bytes | None = None) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason: Reason = reason
        self.note = note


class Workers:
    """A pool of workers that run one module. Opened and closed in the lifespan; each starts when it is first needed.

    Args:
        module: its dotted name; its `main` runs in the worker and calls `worker_process.serve`.
        turns: the queue for a worker.
    """

    def __init__(self, module: str, limits: WorkerLimits, turns: Turns) -> None:
        self.turns = turns
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        self._folder = str(Path(spec.origin).parents[module.count(".")])
        self._module = module
        self._limits = limits
        self._idle: list[asyncio.subprocess.Process] = []
        self._alive: set[asyncio.subprocess.Process] = set()
        self._closed = False

    @property
    def processes(self) -> int:
        """How many worker processes are alive."""
        return sum(worker.returncode is None for worker in self._alive)

    async def call(self, organization_id: str, request: bytes, *, weight: int = 1, bounded: bool = True) -> bytes:
        """Send a request and return the reply.

        Args:
            weight, bounded: see `Turns.turn`.

        Raises: WorkerFailed, QueueFull.
        """
        async with self.turns.turn(organization_id, weight, bounded=bounded):
            try:
                worker = await self._get()
            except OSError as error:
                raise WorkerFailed("start", str(error)) from error
            return await self._call(worker, request)

    async def close(self) -> None:
        """Kill the workers and wait until they have ended. Requests in progress and later ones fail with `closed`."""
        self._closed = True
        for worker in self._alive:
            _kill(worker)
        await self.turns.wait_until_idle()
        for worker in list(self._alive):
            await self._end(worker)
        self._idle.clear()

    async def _call(self, worker: asyncio.subprocess.Process, request: bytes) -> bytes:
        notes: list[bytes] = []
        kind = -1
        try:
            async with asyncio.timeout(_START_SECONDS + self._limits.wall_seconds):
                await _send(worker, request)
                kind, data = await self._receive(worker, notes)
        except (OSError, EOFError, RuntimeError, TimeoutError) as error:
            # RuntimeError: uvloop, when the pipe is already closed
            reason: Reason = (
                "time" if isinstance(error, TimeoutError) else _failure_reason(await _wait_for_exit(worker))
            )
            reason = "closed" if self._closed else reason
            raise WorkerFailed(reason, repr(error), notes[-1] if notes else None) from error
        finally:  # also after a cancellation: the next request must not receive this one's reply
            if kind == DONE and not self._closed:
                self._idle.append(worker)
            else:
                await self._end(worker)
        match kind:
            case k if k == NO_MEMORY:
                raise WorkerFailed("memory", "MemoryError", notes[-1] if notes else None)
            case k if k == ERROR:
                raise WorkerFailed("error", data.decode(errors="replace"), notes[-1] if notes else None)
        return data

    async def _receive(self, worker: asyncio.subprocess.Process, notes: list[bytes]) -> tuple[int, bytes]:
        """Return the final frame's kind and content. All sizes are bounded: a hostile file may control the worker."""
        assert worker.stdout is not None
        while True:
            kind, size = REPLY.unpack(await worker.stdout.readexactly(REPLY.size))
            most = _NOTE_BYTES if kind == NOTE else self._limits.reply_bytes
            if kind not in (NOTE, DONE, LAST, NO_MEMORY, ERROR) or size > most or len(notes) > _NOTES:
                raise WorkerFailed("error", f"invalid frame: kind {kind}, {size} bytes")
            data = await worker.stdout.readexactly(size)
            if kind != NOTE:
                return kind, data
            notes.append(data)

    async def _get(self) -> asyncio.subprocess.Process:
        for dead in [worker for worker in self._idle if worker.returncode is not None]:
            self._idle.remove(dead)
            await self._end(dead)
        if self._closed:
            raise WorkerFailed("closed")
        return self._idle.pop() if self._idle else await self._start()

    async def _start(self) -> asyncio.subprocess.Process:
        env = {name: value for name, value in environment().items() if name in _ENVIRONMENT}
        limits = {**msgspec.to_builtins(self._limits), "parent": os.getpid()}
        # A session of its own: Ctrl-C is the server's to handle. The stream's limit is above any reply, so that reading
        # never pauses and the end of a dead worker is noticed. Two arenas: each of glibc's takes 64 MB of the address
        # space that is limited.
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", _BOOT, self._folder, self._module, msgspec.json.encode(limits).decode()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=2 * self._limits.reply_bytes,
            start_new_session=True,
            env={**env, "MALLOC_ARENA_MAX": "2", "PYTHONUTF8": "1"},
        )
        self._alive.add(worker)
        if self._closed:
            _kill(worker)
        return worker

    async def _end(self, worker: asyncio.subprocess.Process) -> None:
        """Kill the worker and wait until it has ended and its pipes are closed."""
        _kill(worker)
        assert worker.stdin is not None
        worker.stdin.close()
        await worker.communicate()
        self._alive.discard(worker)


async def _send(worker: asyncio.subprocess.Process, request: bytes) -> None:
    assert worker.stdin is not None
    worker.stdin.write(REQUEST.pack(len(request)))
    worker.stdin.write(request)
    await worker.stdin.drain()


async def _wait_for_exit(worker: asyncio.subprocess.Process) -> int:
    """Return the exit status of a worker whose pipe is closed. asyncio's child watcher must reap it, hence no kill."""
    try:
        async with asyncio.timeout(_END_SECONDS):
            return await worker.wait()
    except TimeoutError:
        return -signal.SIGKILL


def _failure_reason(returncode: int) -> Reason:
    match -returncode:
        case signal.SIGPROF | signal.SIGALRM:
            return "time"
        case signal.SIGABRT:  # Rust and C++ abort when an allocation fails
            return "memory"
        case _:
            return "crash"


def _kill(worker: asyncio.subprocess.Process) -> None:
    if worker.returncode is None:
        try:
            worker.kill()
        except ProcessLookupError:
            pass
