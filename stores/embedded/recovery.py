"""Reads the embedded log's files at the start: the index of every thread's log, from the lines that are whole.

A process that was killed leaves at most one line that is not: the last. A power failure can leave anything, so every
line is checked, and every segment must begin where the one before it ends.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import msgspec

from agent_chat.stores.buffer import RETAINED_SECONDS
from agent_chat.stores.embedded.files import Files
from agent_chat.stores.embedded.positions import at_milliseconds, milliseconds_of, parse
from agent_chat.stores.embedded.segments import HEAD_BYTES, VERSION, Segment, Segments
from agent_chat.stores.embedded.thread_log import ThreadLog
from agent_chat.stores.errors import DataFolderUnusable
from agent_chat.stores.events import LogOpened, ThreadDeleted, type_name

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(\d{10})\.log", re.ASCII)
_LINE = re.compile(rb"(\d{1,15})-(\d{1,7}) (\S+) ([^\x00-\x1f]*)\n")
_OPENED = f'{{"type":"{type_name(LogOpened)}"'.encode()
_DELETED = f'{{"type":"{type_name(ThreadDeleted)}"'.encode()
_SKIPPED_MILLISECONDS = 10_000
"""Positions that are not used after a start: a power failure may have removed lines that readers had received."""


class _Head(msgspec.Struct, frozen=True):
    """What a segment's first line has after its position."""

    version: int
    follows: str


class Recovered(msgspec.Struct, frozen=True):
    """The log as it was left. `last`: no position up to it may be used again."""

    segments: Segments
    logs: dict[str, ThreadLog]
    last: int


class _Recovery:
    def __init__(self, folder: Path, files: Files) -> None:
        self.folder = folder
        self.files = files
        self.segments: list[Segment] = []
        self.logs: dict[bytes, ThreadLog] = {}
        self.last = 0
        self.follows = 0
        """The position of the last line that was read."""
        self.next_number = 1

    def find(self) -> list[tuple[Segment, int, int]]:
        """Open the segments, oldest first; return each with the two positions of its first line.

        A file without a valid first line is deleted: whatever follows it will not find what it follows.
        """
        found: list[tuple[Segment, int, int]] = []
        for name in sorted(self.files.names(self.folder)):
            if match := _NAME.fullmatch(name):
                number = int(match[1])
                self.next_number = number + 1
                segment = Segment(self.folder / name, number, self.files.open(self.folder / name), 0)
                positions = _parse_head(self.files.read(segment.file, HEAD_BYTES, 0))
                if positions is None:
                    self.delete(segment)
                else:
                    segment.began = milliseconds_of(positions[0])
                    found.append((segment, *positions))
        return found

    def delete(self, segment: Segment) -> None:
        self.files.close(segment.file)
        self.files.delete(segment.path)

    def read(self, segment: Segment, last: int, follows: int) -> None:
        """Index the lines of a segment. What is before it is discarded, unless the segment continues it."""
        if self.segments and follows != self.follows:
            logger.warning("the event log has a gap before %s: what is before it is discarded", segment.path.name)
            for earlier in self.segments:
                self.delete(earlier)
            self.segments.clear()
            self.logs.clear()
        self.last = max(self.last, last)
        self.follows = follows
        self.segments.append(segment)
        size = self.files.size(segment.file)
        segment.size = self.index(segment, self.files.read(segment.file, size, 0))
        segment.newest = self.last
        if segment.size < size:
            logger.info("%d bytes of an unfinished line are removed from %s", size - segment.size, segment.path.name)
            self.files.truncate(segment.file, segment.size)

    def index(self, segment: Segment, data: bytes) -> int:
        """Index the lines up to the first one that is damaged; return where it begins."""
        end, last, logs = HEAD_BYTES, self.last, self.logs
        for match in _LINE.finditer(data, HEAD_BYTES):
            begin, next_begin = match.span()
            milliseconds, sequence, thread_id = match.group(1, 2, 3)
            position = at_milliseconds(int(milliseconds)) + int(sequence)
            if begin != end or position <= last:
                break
            last, end, offset = position, next_begin, match.start(4)
            if data.startswith(b"{", offset):  # else it was overwritten
                log = logs.get(thread_id)
                if log is None:
                    log = logs[thread_id] = ThreadLog(thread_id.decode())
                if data.startswith(_OPENED, offset):
                    log.restart()
                    log.deleted = False
                elif data.startswith(_DELETED, offset):
                    log.deleted = True
                segment.add(log, position, offset, next_begin - 1 - offset)
                log.last = position
            self.follows = position
        self.last = last
        return end


def _parse_head(line: bytes) -> tuple[int, int] | None:
    match = _LINE.fullmatch(line)
    if match is None or match[3] != b"-":
        return None
    try:
        facts = msgspec.json.decode(match[4], type=_Head)
    except msgspec.DecodeError:
        return None
    last, follows = parse(f"{int(match[1])}-{int(match[2])}"), parse(facts.follows)
    return None if last is None or follows is None or facts.version != VERSION else (last, follows)


def recover(folder: Path, files: Files, limit: int, now: int) -> Recovered:
    """Read what a process left in the folder, which is created if it is missing.

    Args:
        limit: how many bytes the segments may take.
        now: in milliseconds.

    Raises: DataFolderUnusable.
    """
    recovery = _Recovery(folder, files)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = recovery.find()
        for number, (segment, last, follows) in enumerate(found, 1):
            next_last = found[number][1] if number < len(found) else None
            if next_last is not None and now - milliseconds_of(next_last) >= RETAINED_SECONDS * 1000:
                recovery.delete(segment)
            else:
                recovery.read(segment, last, follows)
    except OSError as error:
        raise DataFolderUnusable(str(error.filename or folder), str(error.strerror)) from error
    last = recovery.last + at_milliseconds(_SKIPPED_MILLISECONDS) if recovery.last else 0
    logs = {log.thread_id: log for log in recovery.logs.values()}
    return Recovered(Segments(folder, files, limit, recovery.segments, recovery.next_number), logs, last)
