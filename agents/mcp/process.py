"""MCP over stdio: a server as a child process, its messages as the SDK's streams, its stderr as log lines.

In place of the SDK's `stdio_client`, which buffers a line without an end (and copies the buffer for every piece that
arrives), hands stderr through without the server's name, and leaves the process behind when this one is killed.
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
"""How long a server may take to end once its stdin is closed, and again once it got SIGTERM."""
STDERR_CHARACTERS = 2_000
STDERR_LINES_PER_SECOND = 50
_FLUSH_SECONDS = 0.5
_EDGE = 256
_LAUNCHER = str(Path(__file__).with_name("launcher.py"))
_FIRST_ID = re.compile(rb'\s*\{\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?"id"\s*:\s*(\d+)\s*,')
_LAST_ID = re.compile(rb',\s*"id"\s*:\s*(\d+)\s*(?:,\s*"jsonrpc"\s*:\s*"2\.0"\s*)?\}\s*$')
_SERVERS_LOG = logging.getLogger("agent_chat.agents.mcp.stderr")
_log = logging.getLogger(__name__)


class OversizedLine(msgspec.Struct, frozen=True):
    """What is known of a line that was longer than the limit: its first and its last bytes."""

    start: bytes
    end: bytes

    @property
    def response_id(self) -> int | None:
        """The JSON-RPC id, if the line is a response that has it first or last, as all SDKs write it."""
        found = _FIRST_ID.match(self.start) or _LAST_ID.search(self.end)
        return int(found[1]) if found else None


@asynccontextmanager
async def stdio_streams(name: str, server: Server) -> AsyncIterator[TransportStreams]:
    """Start the server's process and end it afterwards, with all processes of its group.

    Raises: FileNotFoundError, PermissionError or another OSError if the command cannot be started.
    """
    process = await _start(server)
    incoming_send, incoming = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    outgoing, outgoing_receive = anyio.create_memory_object_stream[SessionMessage](0)
    written = anyio.Event()
    try:
        async with anyio.create_task_group() as pipes:
            pipes.start_soon(_read_messages, name, process, incoming_send)
            pipes.start_soon(_write_messages, process, outgoing_receive, incoming_send, written)
            pipes.start_soon(_log_stderr, name, process)
            try:
                yield incoming, outgoing
            finally:
                with anyio.CancelScope(shield=True):  # every wait inside is bounded
                    incoming.close()
                    outgoing.close()
                    with anyio.move_on_after(_FLUSH_SECONDS):
                        await written.wait()
                    await _stop(process)
                pipes.cancel_scope.cancel()
    finally:
        for stream in (incoming_send, incoming, outgoing, outgoing_receive):
            stream.close()


async def _start(server: Server) -> Process:
    environment = get_default_environment() | server.env
    command = [_found(server, environment), *server.args]
    if sys.platform == "linux" and sys.executable:
        command = [sys.executable, "-I", "-S", _LAUNCHER, str(os.getpid()), *command]
    return await anyio.open_process(
        command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment, cwd=server.cwd, start_new_session=True
    )


def _found(server: Server, environment: dict[str, str]) -> str:
    """The command's file: the launcher could report a missing one only by its exit code."""
    command = server.command or ""
    path = str(Path(server.cwd or ".", command)) if os.sep in command else command
    found = shutil.which(path, path=environment.get("PATH"))
    if found is None:
        raise PermissionError(command) if Path(path).exists() and os.sep in command else FileNotFoundError(command)
    return str(Path(found).absolute())


async def _stop(process: Process) -> None:
    """Close stdin, wait, then kill the group: https://modelcontextprotocol.io/specification/draft/basic/transports"""
    assert process.stdin is not None
    with suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
        await process.stdin.aclose()
    await _ended(process)
    await terminate_posix_process_tree(process, EXIT_SECONDS)  # what it started, too: it may have left that behind
    if not await _ended(process):
        _log.warning("MCP server process %d is still there after SIGKILL", process.pid)
    transport = getattr(getattr(process, "_process", None), "_transport", None)
    if transport is not None:  # a descendant that holds a pipe would keep it open
        with suppress(PermissionError):
            transport.close()


async def _ended(process: Process) -> bool:
    """Whether it ends in time. Not `wait()`: that waits for the pipes too, which descendants may hold."""
    with anyio.move_on_after(EXIT_SECONDS):
        while process.returncode is None:  # noqa: ASYNC110
            await anyio.sleep(0.01)
    return process.returncode is not None


async def _read_messages(
    name: str, process: Process, messages: MemoryObjectSendStream[SessionMessage | Exception]
) -> None:
    assert process.stdout is not None
    with messages, suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
        receiver_is_there = True
        async for line in split_lines(process.stdout, MESSAGE_BYTES):
            if receiver_is_there and (message := _parsed(name, line)) is not None:
                try:
                    await messages.send(message)
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    receiver_is_there = False  # read on: a server that cannot write would not end by itself


def _parsed(name: str, line: bytes | OversizedLine) -> SessionMessage | None:
    """The message, or an error in place of a response that is too large. Anything else on stdout is dropped."""
    if isinstance(line, OversizedLine):
        _log.warning("MCP server %s: a message of more than %d bytes was dropped", name, MESSAGE_BYTES)
        if (call := line.response_id) is None:
            return None
        return SessionMessage(JSONRPCError(jsonrpc="2.0", id=call, error=ErrorData(code=TOO_LARGE_CODE, message="")))
    try:
        return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValueError:
        if line.strip():
            _log.debug("MCP server %s: a line on stdout is not a JSON-RPC message", name)
        return None


async def _write_messages(
    process: Process,
    messages: MemoryObjectReceiveStream[SessionMessage],
    incoming: MemoryObjectSendStream[SessionMessage | Exception],
    written: anyio.Event,
) -> None:
    assert process.stdin is not None
    try:
        async with messages:
            async for each in messages:
                await _write(process.stdin, each.message.model_dump_json(by_alias=True, exclude_unset=True))
    except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
        incoming.close()  # it may live on without its stdin: whoever waits for it learns that nothing comes
    finally:
        written.set()


async def _write(stdin: ByteSendStream, line: str) -> None:
    await stdin.send(line.encode() + b"\n")


async def _log_stderr(name: str, process: Process) -> None:
    """Log each line with the server's name; a flood is counted and not logged."""
    assert process.stderr is not None
    rate, dropped = TokenBucket(STDERR_LINES_PER_SECOND), 0
    with suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
        async for line in split_lines(process.stderr, STDERR_CHARACTERS):
            if not rate.take():
                dropped += 1
                continue
            if dropped:
                _SERVERS_LOG.warning("MCP server %s: %d lines of its stderr were dropped", name, dropped)
                dropped = 0
            cut = isinstance(line, OversizedLine)
            text = (line.start if isinstance(line, OversizedLine) else line).decode(errors="replace").rstrip()
            if text:
                _SERVERS_LOG.info("MCP server %s: %s%s", name, text, "…" if cut else "")


async def split_lines(stream: ByteReceiveStream, limit: int) -> AsyncIterator[bytes | OversizedLine]:
    """The lines of a stream without their ends; of one that is longer than `limit` bytes only its edges are kept."""
    pending, start = bytearray(), b""
    async for piece in stream:
        *ended, rest = piece.split(b"\n")
        for part in ended:
            pending += part
            start = start or _start_of_oversized(pending, limit)
            yield OversizedLine(start, bytes(pending[-_EDGE:])) if start else bytes(pending)
            pending.clear()
            start = b""
        pending += rest
        start = start or _start_of_oversized(pending, limit)
        if start:
            del pending[:-_EDGE]


def _start_of_oversized(line: bytearray, limit: int) -> bytes:
    return bytes(line[:STDERR_CHARACTERS]) if len(line) > limit else b""
