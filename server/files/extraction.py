"""The type of an uploaded file, and its text.

`Attachments` calls `extract` once per upload, while the file is on the local disk. UTF-8 texts are read here, in a
thread, without a queue. All other files are read by worker processes (`reader.py`), because files are hostile: one that
crashes, exhausts or hangs its reader costs one worker, and the attachment's status says why.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path
from typing import Literal

import msgspec

from agent_chat.server.errors import RateLimited
from agent_chat.server.files.file_types import BINARY
from agent_chat.server.files.text_files import plain_text
from agent_chat.server.files.turns import QueueFull, Turns
from agent_chat.server.files.worker import Reason, WorkerFailed, WorkerLimits, Workers

logger = logging.getLogger(__name__)

TEXT_CHARS = 200_000
"""Longer texts are truncated to this, in the store and for the model (`agents/claude/attachments.py`)."""
LIMITS = WorkerLimits(
    cpu_seconds=10.0,
    wall_seconds=90.0,
    memory_bytes=3 * 2**29,
    file_bytes=8 * 2**20,  # the smaller copy of an image
    reply_bytes=4 * 2**20,  # a character takes at most twelve bytes as JSON
    processes=4096,  # kreuzberg starts threads, and the limit counts the threads of all processes of this user
    requests=50,
    resident_bytes=300 * 2**20,
    nice=10,
)
DOCUMENT_SECONDS = 60.0
"""CPU time for pdf, office formats and epub; other files have `LIMITS.cpu_seconds`."""
WORKERS = 3
WAITING_FILES = 50
"""The largest number of files in one organization's queue."""
_RETRY_SECONDS = 10
_ERROR_CHARS = 500
_TYPE = re.compile(r"[a-z]+/[\w.+-]{1,100}")


class Extracted(msgspec.Struct, frozen=True):
    """The result of an extraction. `content_type` follows from the content, else the name, else the declared type.

    ready: `text` is the file's text, if `truncated` its first 200,000 characters; an image has none, but `small` says
    that a smaller copy for models lies beside it (`small_copy_path`). failed: a supported kind of file that could not
    be read or has no text. unsupported: another kind of file. `error` is a sentence for the client.
    """

    content_type: str
    status: Literal["ready", "failed", "unsupported"]
    text: str = ""
    truncated: bool = False
    error: str | None = None
    small: bool = False


def small_copy_path(path: Path) -> Path:
    """Return where the reader writes the smaller copy of a large image."""
    return path.with_name(path.name + ".small")


class Extractor:
    """Reads uploaded files. Opened and closed in the lifespan; a worker starts when one is first needed.

    Args:
        document_seconds: CPU time for a document; other files have `limits.cpu_seconds`.

    Attributes:
        turns: the queue for the workers; its `waiting`, `running` and `refused` are read by the metrics.
    """

    def __init__(
        self,
        *,
        workers: int = WORKERS,
        limits: WorkerLimits = LIMITS,
        document_seconds: float = DOCUMENT_SECONDS,
        text_chars: int = TEXT_CHARS,
    ) -> None:
        self.turns = Turns(workers, max_waiting=WAITING_FILES)
        self._workers = Workers("agent_chat.server.files.reader", limits, self.turns)
        self._document_seconds = document_seconds
        self._text_chars = text_chars

    async def extract(self, organization_id: str, path: Path, filename: str, declared: str | None) -> Extracted:
        """Read the file at `path`. `filename` and `declared`, the media type, are the client's: hints, never paths.

        A file that cannot be read is a result too.

        Raises:
            RateLimited: the organization's queue is full.
        """
        try:
            found = await asyncio.to_thread(plain_text, path, filename, declared, self._text_chars)
        except OSError:
            found = None  # the worker will fail in the same way and report it
        if found is not None:
            return msgspec.convert(found, Extracted)
        request = [str(path), filename, declared, self._text_chars, self._document_seconds]
        try:
            # json, not msgspec, because it encodes lone surrogates, which a file name may contain
            reply = await self._workers.call(organization_id, json.dumps(request).encode())
            return self._validate(msgspec.json.decode(reply, type=Extracted), path)
        except QueueFull as error:
            raise RateLimited("files waiting to be read", WAITING_FILES, _RETRY_SECONDS) from error
        except WorkerFailed as error:
            logger.warning("Uploaded file could not be read: %s", error)
            return Extracted(_type_from_note(error.note), "failed", error=_client_sentence(error.reason))
        except msgspec.MsgspecError as error:
            logger.warning("Uploaded file could not be read: invalid reply of the worker: %s", error)
            return Extracted(BINARY, "failed", error=_client_sentence("error"))

    async def close(self) -> None:
        """Kill the workers and wait until they have ended. Files in progress and later ones fail."""
        await self._workers.close()

    def _validate(self, found: Extracted, path: Path) -> Extracted:
        """Apply the bounds to a worker's reply again: a hostile file may control the worker."""
        small = small_copy_path(path)
        return Extracted(
            found.content_type if _TYPE.fullmatch(found.content_type) else BINARY,
            found.status,
            found.text[: self._text_chars],
            found.truncated or len(found.text) > self._text_chars,
            found.error and found.error[:_ERROR_CHARS],
            found.small and small.is_file() and not small.is_symlink(),
        )


def _type_from_note(note: bytes | None) -> str:
    noted = (note or b"").decode("ascii", "replace")
    return noted if _TYPE.fullmatch(noted) else BINARY


def _client_sentence(reason: Reason) -> str:
    """Return the sentence that tells the client why a file was not read."""
    match reason:
        case "closed":
            return "The server stopped before the file was read."
        case "start":
            return "The file could not be read: no reader could be started."
        case "time":
            return "Reading the file took too long."
        case "memory":
            return "Reading the file took too much memory."
        case "crash":
            return "The file could not be read: its reader crashed."
        case "error":
            return "The file could not be read."
