"""What an uploaded file is, and the text in it: asked of worker processes, because files are hostile.

The service calls `extract` once for each upload, while the file still lies on the local disk. The reading itself is in
`reading.py`, which runs as a bare interpreter of its own, as `content_html` has it: frames on its stdin and stdout,
killed and replaced when anything goes wrong. A worker takes one file at a time, gives way to the server (nice), and
has limits that the kernel keeps: CPU time and wall time for each file, address space for the process. So a crash, a
bomb or a hang costs one worker and one file, and that file's status says why. It gets a small environment: a reader
that was taken over by a file finds no key in it.

A pool from `concurrent.futures` was refused: one dead worker breaks it whole, and it can't end a worker that hangs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import struct
import sys
from pathlib import Path
from typing import Literal

import msgspec

from server.settings import environment

logger = logging.getLogger(__name__)

TEXT_CHARS = 200_000
"""The most of a text that is kept, and that a model is given (agents/attached.py)."""
_READER = Path(__file__).with_name("reading.py")
_REPLY_BYTES = 8 * 2**20
"""Above any reply: a character takes twelve bytes at most."""
_START_SECONDS = 20.0
_END_SECONDS = 5.0
BINARY = "application/octet-stream"
_SIZE = struct.Struct("!Q")
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "LANG", "TMPDIR", "TZ", "SYSTEMROOT")


class Extracted(msgspec.Struct, frozen=True):
    """What was found. `content_type` is decided by the content, then by the name, then by what was declared.

    ready: `text` is what the file says, cut after 200,000 characters where `truncated`; an image has none, but if it is
    large a smaller copy for models lies beside the file (`small_of`). failed: a kind of file that is read, but this one
    could not be. unsupported: a kind that isn't. `error` tells a client why. An empty file is a ready and empty text,
    if its name isn't one of a kind (pdf, png, …) that can't be empty: then it has failed.
    """

    content_type: str
    status: Literal["ready", "failed", "unsupported"]
    text: str = ""
    truncated: bool = False
    error: str | None = None
    small: bool = False


def small_of(path: Path) -> Path:
    """Where the reader puts the smaller copy of a large picture."""
    return path.with_name(path.name + ".small")


class Limits(msgspec.Struct, frozen=True):
    """What one file may take. Seconds of CPU and in all; bytes of address space; characters of text.

    A worker ends after `files`, or once it has ever held more than `resident_bytes`, and the next file starts another.
    """

    cpu_seconds: float = 60.0
    wall_seconds: float = 90.0
    memory_bytes: int = 3 * 2**29
    text_chars: int = TEXT_CHARS
    files: int = 50
    resident_bytes: int = 300 * 2**20


class _Reply(msgspec.Struct):
    extracted: Extracted
    last: bool


class Extractor:
    """Reads uploaded files. Opened and closed in the lifespan; a worker starts with the first file that needs it."""

    def __init__(self, *, workers: int = 2, limits: Limits | None = None) -> None:
        self._workers = workers
        self._limits = limits or Limits()
        self._turns = asyncio.Semaphore(workers)
        self._idle: list[asyncio.subprocess.Process] = []
        self._alive: set[asyncio.subprocess.Process] = set()
        self._closed = False

    async def extract(self, path: Path, filename: str, declared: str | None) -> Extracted:
        """Read the file at `path`. `filename` and `declared` are what the client called it: hints, never paths.

        Waits for its turn and then at most as long as the limits have it. Never raises for a readable path.
        """
        async with self._turns:
            try:
                worker = await self._worker()
            except (OSError, EOFError) as error:
                logger.warning("no reader of files could be started: %r", error)
                return _failed(BINARY, _why(None, self._closed))
            return await self._ask(worker, [str(path), filename, declared])

    async def close(self) -> None:
        """End the workers and wait until they are gone. A file in progress has failed, and so has every later one."""
        self._closed = True
        for worker in self._alive:
            _kill(worker)
        for _ in range(self._workers):  # whoever was starting a worker has killed it by then
            await self._turns.acquire()
        for worker in self._alive:
            await _gone(worker)
        self._alive.clear()
        self._idle.clear()
        for _ in range(self._workers):
            self._turns.release()

    async def _ask(self, worker: asyncio.subprocess.Process, request: list[str | None]) -> Extracted:
        content_type, usable = BINARY, False
        try:
            async with asyncio.timeout(_START_SECONDS + self._limits.wall_seconds):
                await _send(worker, request)
                content_type = msgspec.json.decode(await _frame(worker), type=str)
                reply = msgspec.json.decode(await _frame(worker), type=_Reply)
            usable = not reply.last
            return reply.extracted
        except (OSError, EOFError, RuntimeError, TimeoutError, msgspec.MsgspecError) as error:
            # RuntimeError: uvloop, when the pipe is already closed
            ended = -signal.SIGALRM if isinstance(error, TimeoutError) else await _ended(worker)
            logger.warning("the reader of %s ended with %s: %r", request[0], ended, error)
            return _failed(content_type, _why(ended, self._closed))
        finally:  # after a cancellation too: the next file must not get this one's reply
            if usable:
                self._idle.append(worker)
            else:
                _kill(worker)

    async def _worker(self) -> asyncio.subprocess.Process:
        if self._closed:
            raise EOFError("the extractor is closed")
        dead = {worker for worker in self._alive if worker.returncode is not None}
        self._alive -= dead
        for worker in dead:
            await _gone(worker)
        while self._idle:
            worker = self._idle.pop()
            if worker.returncode is None:
                return worker
        env = {name: value for name, value in environment().items() if name in _ENVIRONMENT}
        # As in content_html: -P, for this directory's names must hide nobody's; a session of its own, for Ctrl-C is
        # the server's; a limit above any reply, so that the end of a dead worker is seen. Two arenas: each of glibc's
        # takes 64 MB of address space, which is what is limited.
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", str(_READER), msgspec.json.encode(self._limits).decode()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_REPLY_BYTES,
            start_new_session=True,
            env={**env, "MALLOC_ARENA_MAX": "2", "PYTHONUTF8": "1"},
        )
        self._alive.add(worker)
        if self._closed:
            _kill(worker)
        return worker


def _why(returncode: int | None, closed: bool) -> str:
    """Why a file was not read, for its client, by how its worker ended."""
    if closed:
        return "The server stopped before the file was read."
    match returncode:
        case None:
            return "The file could not be read: no reader could be started."
        case value if value in (-signal.SIGPROF, -signal.SIGALRM):
            return "Reading the file took too long."
        case value if value == -signal.SIGABRT:  # what Rust and C++ do when they get no memory
            return "Reading the file took too much memory."
        case _:
            return "The file could not be read: its reader crashed."


async def _send(worker: asyncio.subprocess.Process, request: list[str | None]) -> None:
    assert worker.stdin is not None
    data = json.dumps(request).encode()  # not msgspec: this one writes lone surrogates, which a name may have
    worker.stdin.write(_SIZE.pack(len(data)) + data)
    await worker.stdin.drain()


async def _frame(worker: asyncio.subprocess.Process) -> bytes:
    assert worker.stdout is not None
    (size,) = _SIZE.unpack(await worker.stdout.readexactly(_SIZE.size))
    if size > _REPLY_BYTES:
        raise EOFError(f"a reply of {size} bytes is none")
    return await worker.stdout.readexactly(size)


async def _ended(worker: asyncio.subprocess.Process) -> int:
    """How it ended. Its pipe did first, so it is about to; asyncio's watcher must be the one that reaps it."""
    try:
        async with asyncio.timeout(_END_SECONDS):
            return await worker.wait()
    except TimeoutError:
        return -signal.SIGKILL


async def _gone(worker: asyncio.subprocess.Process) -> None:
    """Wait for the end of a worker that was killed or is dead, and of its pipes."""
    assert worker.stdin is not None
    worker.stdin.close()
    await worker.communicate()


def _failed(content_type: str, reason: str) -> Extracted:
    return Extracted(content_type, "failed", error=reason)


def _kill(worker: asyncio.subprocess.Process) -> None:
    if worker.returncode is None:
        try:
            worker.kill()
        except ProcessLookupError:
            pass
