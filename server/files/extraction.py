"""What an uploaded file is, and the text in it.

The service calls `extract` once for each upload, while the file still lies on the local disk. UTF-8 texts are read
here, in a thread, and wait for nobody. Everything else is read by worker processes (`reading.py`), because files are
hostile: one that crashes, blows up or hangs its reader costs one worker, and its status says why.
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
"""The most of a text that is stored, and that a model is given (agents/claude/attachments.py)."""
LIMITS = WorkerLimits(
    cpu_seconds=10.0,
    wall_seconds=90.0,
    memory_bytes=3 * 2**29,
    file_bytes=8 * 2**20,  # the smaller copy of a picture
    reply_bytes=4 * 2**20,  # a character takes twelve bytes at most
    processes=4096,  # kreuzberg has threads, and those of all processes of this user count
    requests=50,
    resident_bytes=300 * 2**20,
    nice=10,
)
DOCUMENT_SECONDS = 60.0
"""The CPU time for pdf, office formats and epub; other files have `cpu_seconds`."""
WORKERS = 3
WAITING_FILES = 50
"""How many files of one organization may wait for a worker."""
_RETRY_SECONDS = 10
_ERROR_CHARS = 500
_TYPE = re.compile(r"[a-z]+/[\w.+-]{1,100}")


class Extracted(msgspec.Struct, frozen=True):
    """What was found. `content_type` is decided by the content, then by the name, then by what was declared.

    ready: `text` is the file's text, cut after 200,000 characters where `truncated`; an image has none, but if it is
    large a smaller copy for models lies beside the file (`small_of`). failed: a kind of file that is read, but this one
    could not be, or has no text. unsupported: another kind. `error` tells a client why.
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


class Extractor:
    """Reads uploaded files. Opened and closed in the lifespan; a worker starts when one is first needed.

    Args:
        document_seconds: CPU time for a document; other files have the limits'.

    Attributes:
        turns: its `waiting`, `running` and `refused` are numbers for metrics.
    """

    def __init__(
        self,
        *,
        workers: int = WORKERS,
        limits: WorkerLimits = LIMITS,
        document_seconds: float = DOCUMENT_SECONDS,
        text_chars: int = TEXT_CHARS,
    ) -> None:
        self.turns = Turns(workers, most_waiting=WAITING_FILES)
        self._workers = Workers("agent_chat.server.files.reader", limits, self.turns)
        self._document_seconds = document_seconds
        self._text_chars = text_chars

    async def extract(self, organization_id: str, path: Path, filename: str, declared: str | None) -> Extracted:
        """Read the file at `path`. `filename` and `declared` are what the client called it: hints, never paths.

        Raises: RateLimited, if the organization has too many files waiting. Nothing else for a readable path.
        """
        try:
            found = await asyncio.to_thread(plain_text, path, filename, declared, self._text_chars)
        except OSError:
            found = None  # the worker's failure says so
        if found is not None:
            return msgspec.convert(found, Extracted)
        request = [str(path), filename, declared, self._text_chars, self._document_seconds]
        try:
            # json, not msgspec: it writes lone surrogates, which a name may have
            reply = await self._workers.call(organization_id, json.dumps(request).encode())
            return self._checked(msgspec.json.decode(reply, type=Extracted), path)
        except QueueFull as error:
            raise RateLimited("files waiting to be read", WAITING_FILES, _RETRY_SECONDS) from error
        except WorkerFailed as error:
            logger.warning("an uploaded file could not be read: %s", error)
            return Extracted(_noted_type(error.note), "failed", error=_sentence(error.reason))
        except msgspec.MsgspecError as error:
            logger.warning("an uploaded file could not be read, its reader sent: %s", error)
            return Extracted(BINARY, "failed", error=_sentence("error"))

    async def close(self) -> None:
        """End the workers and wait until they are gone. A file in progress has failed, and so has every later one."""
        await self._workers.close()

    def _checked(self, found: Extracted, path: Path) -> Extracted:
        """What a worker sent, within its bounds even if a file has taken the worker over."""
        small = small_of(path)
        return Extracted(
            found.content_type if _TYPE.fullmatch(found.content_type) else BINARY,
            found.status,
            found.text[: self._text_chars],
            found.truncated or len(found.text) > self._text_chars,
            found.error and found.error[:_ERROR_CHARS],
            found.small and small.is_file() and not small.is_symlink(),
        )


def _noted_type(note: bytes | None) -> str:
    noted = (note or b"").decode("ascii", "replace")
    return noted if _TYPE.fullmatch(noted) else BINARY


def _sentence(reason: Reason) -> str:
    """Why a file was not read, for its client."""
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
