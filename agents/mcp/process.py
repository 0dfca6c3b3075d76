"""MCP over stdio: a server as a child process, its messages as the SDK's streams, its stderr as log lines.

Replaces the SDK's `stdio_client`, which buffers a line of any length (and copies the buffer for every chunk), passes
stderr on without the server's name, and leaves the child process running when this process is killed.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING

import anyio
import msgspec
from anyio.abc import ByteReceiveStream, ByteSendStream, Process
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.client.stdio import get_default_environment
from mcp.os.posix.utilities import terminate_posix_process_tree
from mcp.shared.message import SessionMessage
from mcp.types import ErrorData, JSONRPCError, jsonrpc_message_adapter

from agent_chat.agents.mcp.bounds import MESSAGE_BYTES, TOO_LARGE_CODE, TokenBucket
from agent_chat.agents.mcp.config import Server

if TYPE_CHECKING:
    from mcp.client._transport import TransportStreams

EXIT_SECONDS = 2.0
"""How long a server's process may take to exit after its stdin is closed, and again after SIGTERM."""
STDERR_CHARACTERS = 2_000
"""Longer lines of stderr are truncated in the log."""
STDERR_LINES_PER_SECOND = 50
_FLUSH_SECONDS = 0.5
_EDGE_BYTES = 256
_LAUNCHER = str(Path(__file__).with_name("launcher.py"))
_FIRST_ID = re.compile(rb'\s*\{\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?"id"\s*:\s*(\d+)\s*,')
_LAST_ID = re.compile(rb',\s*"id"\s*:\s*(\d+)\s*(?:,\s*"jsonrpc"\s*:\s*"2\.0"\s*)?\}\s*$')
_stderr_log = logging.getLogger("agent_chat.agents.mcp.stderr")
_log = logging.getLogger(__name__)


class OversizedLine(msgspec.Struct, frozen=True):
    """The first and the last bytes of a line that exceeds the limit."""

    start: bytes
    end: bytes

    @property
    def response_id(self) -> int | None:
        """The JSON-RPC id if the line is a response with the id first or last, as all SDKs write it, else None."""
        match = _FIRST_ID.match(self.start) or _LAST_ID.search(self.end)
        return int(match[1]) if match else None


@asynccontextmanager
async def stdio_streams(name: str, server: Server) -> AsyncIterator[TransportStreams]:
    """Start the server's process, and stop it and its process group on exit.

    Raises: FileNotFoundError, PermissionError or another OSError if the command cannot be started.
    """
    process = await _start_process(server)
    incoming_send, incoming = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    outgoing, outgoing_receive = anyio.create_memory_object_stream[SessionMessage](0)
    writes_done = anyio.Event()
    try:
        async with anyio.create_task_group() as pipes:
            pipes.start_soon(_read_messages, name, process, incoming_send)
            pipes.start_soon(_write_messages, process, outgoing_receive, incoming_send, writes_done)
            pipes.start_soon(_log_stderr, name, process)
            try:
                yield incoming, outgoing
            finally:
                with anyio.CancelScope(shield=True):  # every wait inside is bounded
                    incoming.close()
                    outgoing.close()
                    with anyio.move_on_after(_FLUSH_SECONDS):
                        await writes_done.wait()
                    await _stop_process(process)
                pipes.cancel_scope.cancel()
    finally:
        for stream in (incoming_send, incoming, outgoing, outgoing_receive):
            stream.close()


async def _start_process(server: Server) -> Process:
    environment = get_default_environment() | server.env
    command = [_resolve_command(server, environment), *server.args]
    if sys.platform == "linux" and sys.executable:
        command = [sys.executable, "-I", "-S", _LAUNCHER, str(os.getpid()), *command]
    return await anyio.open_process(
        command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment, cwd=server.cwd, start_new_session=True
    )


def _resolve_command(server: Server, environment: dict[str, str]) -> str:
    """Return the path of the command's file. The launcher could report a missing file only by its exit code."""
    command = server.command or ""
    path = str(Path(server.cwd or ".", command)) if os.sep in command else command
    executable = shutil.which(path, path=environment.get("PATH"))
    if executable is None:
        raise PermissionError(command) if Path(path).exists() and os.sep in command else FileNotFoundError(command)
    return str(Path(executable).absolute())


async def _stop_process(process: Process) -> None:
    """Close stdin, wait, then kill the group: https://modelcontextprotocol.io/specification/draft/basic/transports"""
    assert process.stdin is not None
    with suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
        await process.stdin.aclose()
    await _wait_for_exit(process)
    await terminate_posix_process_tree(process, EXIT_SECONDS)  # also after an exit: its children may still run
    if not await _wait_for_exit(process):
        _log.warning("MCP server process %d still runs after SIGKILL", process.pid)
    transport = getattr(getattr(process, "_process", None), "_transport", None)
    if transport is not None:  # it stays open while a descendant has a pipe open
        with suppress(PermissionError):
            transport.close()


async def _wait_for_exit(process: Process) -> bool:
    """Return whether the process exits within EXIT_SECONDS."""
    # Not `process.wait()`: it also waits for the pipes, which descendants may hold open.
    with anyio.move_on_after(EXIT_SECONDS):
        while process.returncode is None:  # noqa: ASYNC110
            await anyio.sleep(0.01)
    return process.returncode is not None


async def _read_messages(
    name: str, process: Process, messages: MemoryObjectSendStream[SessionMessage | Exception]
) -> None:
    assert process.stdout is not None
    with messages, suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
        has_receiver = True
        async for line in split_lines(process.stdout, MESSAGE_BYTES):
            if has_receiver and (message := _parse_line(name, line)) is not None:
                try:
                    await messages.send(message)
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    has_receiver = False  # read on: a server that blocks on writing would not exit


def _parse_line(name: str, line: bytes | OversizedLine) -> SessionMessage | None:
    """Return the message, or an error in place of a response that is too large. Other lines are dropped (None)."""
    if isinstance(line, OversizedLine):
        _log.warning("MCP server %s: dropped a message of more than %d bytes", name, MESSAGE_BYTES)
        if (request_id := line.response_id) is None:
            return None
        return SessionMessage(
            JSONRPCError(jsonrpc="2.0", id=request_id, error=ErrorData(code=TOO_LARGE_CODE, message=""))
        )
    try:
        return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValueError:
        if line.strip():
            _log.debug("MCP server %s: dropped a line on stdout that is not a JSON-RPC message", name)
        return None


async def _write_messages(
    process: Process,
    messages: MemoryObjectReceiveStream[SessionMessage],
    incoming: MemoryObjectSendStream[SessionMessage | Exception],
    writes_done: anyio.Event,
) -> None:
    assert process.stdin is not None
    try:
        async with messages:
            async for item in messages:
                await _write(process.stdin, item.message.model_dump_json(by_alias=True, exclude_unset=True))
    except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
        incoming.close()  # the process may still run: requests in progress must fail, not wait
    finally:
        writes_done.set()


async def _write(stdin: ByteSendStream, line: str) -> None:
    await stdin.send(line.encode() + b"\n")


async def _log_stderr(name: str, process: Process) -> None:
    """Log each line with the server's name. Lines above STDERR_LINES_PER_SECOND are only counted."""
    assert process.stderr is not None
    rate, dropped = TokenBucket(STDERR_LINES_PER_SECOND), 0
    with suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
        async for line in split_lines(process.stderr, STDERR_CHARACTERS):
            if not rate.take():
                dropped += 1
                continue
            if dropped:
                _stderr_log.warning("MCP server %s: dropped %d lines of its stderr", name, dropped)
                dropped = 0
            is_truncated = isinstance(line, OversizedLine)
            text = (line.start if isinstance(line, OversizedLine) else line).decode(errors="replace").rstrip()
            if text:
                _stderr_log.info("MCP server %s: %s%s", name, text, "…" if is_truncated else "")


async def split_lines(stream: ByteReceiveStream, limit: int) -> AsyncIterator[bytes | OversizedLine]:
    """Split a stream into lines without their newlines. Lines of more than `limit` bytes become an OversizedLine."""
    pending, start = bytearray(), b""
    async for chunk in stream:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            pending += end
            start = start or _oversized_start(pending, limit)
            yield OversizedLine(start, bytes(pending[-_EDGE_BYTES:])) if start else bytes(pending)
            pending.clear()
            start = b""
        pending += rest
        start = start or _oversized_start(pending, limit)
        if start:
            del pending[:-_EDGE_BYTES]


def _oversized_start(line: bytearray, limit: int) -> bytes:
    return bytes(line[:STDERR_CHARACTERS]) if len(line) > limit else b""
