"""The embedded log's files: segments of lines, written at the end of the newest and deleted from the oldest on.

    <position> <thread> <event as JSON>

No call waits for the disk (no fsync): what was written survives the process, whatever kills it, but not a power
failure. A segment's first line has the last position before it, which is still known when all others are deleted, and
the position of the line that it follows: where that line is missing, everything before the segment is discarded.

What is on disk never has a hole, or a reader would be resumed across it without a word. So lines that cannot be written
are never left out: the oldest segments are deleted to make room, and if that does not help, everything is.

SQLite was refused: it takes three to five times the CPU per event (the record of the measurements: 4.3 µs in the loop
and 21 in all with a thread of its own, 14 to 25 in the loop). So was a file per thread: opening it costs more than the
writing, and a server has more threads than it may open files.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path

from agent_chat.stores.buffer import RETAINED_SECONDS
from agent_chat.stores.embedded.files import Files
from agent_chat.stores.embedded.positions import LONGEST, milliseconds_of, text_of
from agent_chat.stores.embedded.thread_log import ThreadLog

logger = logging.getLogger(__name__)

DISK_BYTES = 128 * 2**20
HEAD_BYTES = 2 * len(LONGEST) + 40
"""The length of each segment's first line, which is overwritten in place on a full disk."""
VERSION = 1
"""Of the lines and the events in them. Segments of another version are discarded at the start."""

_SEGMENT_BYTES = 16 * 2**20
_SEGMENT_SECONDS = 600.0
_RETRY_ROTATION_BYTES = 2**20
_OFFSET_BITS = 32


class Segment:
    """One file.

    Attributes:
        size: of what was written whole.
        began: when its lines begin, in milliseconds.
        newest: the position of its last line.
        logs: those that have entries in it, once each.
    """

    __slots__ = ("began", "file", "logs", "newest", "number", "path", "size")

    def __init__(self, path: Path, number: int, file: int, began: int) -> None:
        self.path = path
        self.number = number
        self.file = file
        self.size = HEAD_BYTES
        self.began = began
        self.newest = 0
        self.logs: list[ThreadLog] = []

    def place(self, offset: int) -> int:
        """Return the place of a byte: it orders the bytes of all segments."""
        return self.number << _OFFSET_BITS | offset

    def add(self, log: ThreadLog, position: int, offset: int, size: int) -> None:
        """Index an entry whose data is here."""
        if log.newest_segment != self.number:
            log.newest_segment = self.number
            self.logs.append(log)
        log.add(position, self.number << _OFFSET_BITS | offset, size)


def segment_path(folder: Path, number: int) -> Path:
    """Return the path of the segment with that number."""
    return folder / f"{number:010}.log"


def head(last: int, follows: int) -> bytes:
    """Return a segment's first line.

    Args:
        last: the last position before the segment.
        follows: the position of the last line before it; 0 if it follows none.
    """
    facts = f'{{"version":{VERSION},"follows":"{text_of(follows)}"}}'
    return f"{text_of(last)} - {facts}".encode().ljust(HEAD_BYTES - 1) + b"\n"


class Segments:
    """All segments of a folder.

    Args:
        limit: how many bytes they may take together.
        segments: those that exist, oldest first.

    Attributes:
        bytes: what they take.
        _next_number: greater than that of any segment that ever existed.
        _rotation_bytes: the size at which the newest segment is followed by another one.
    """

    def __init__(self, folder: Path, files: Files, limit: int, segments: list[Segment], next_number: int) -> None:
        self._folder = folder
        self._files = files
        self._limit = limit
        self._segments = {segment.number: segment for segment in segments}
        self._newest = segments[-1] if segments else None
        self._next_number = next_number
        self._rotation_bytes = self._segment_bytes = min(_SEGMENT_BYTES, limit // 8)
        self.bytes = sum(segment.size for segment in segments)
        while self.bytes > limit and self._delete_oldest():
            pass

    def append(self, lines: bytes, before: int, last: int, now: int) -> tuple[Segment, int]:
        """Write lines; return where they are: the segment, and the offset of their first byte.

        Args:
            before: the last position before these lines, `last` the last one in them.
            now: in milliseconds.

        Raises: OSError if they cannot be written though everything before them was deleted.
        """
        if self._newest is not None and self._newest.size >= self._rotation_bytes:
            self._rotate(now)
        while self.bytes + len(lines) > self._limit and self._delete_oldest():
            pass
        while True:
            try:
                segment = self._newest or self._create(before, 0, now)
                offset = segment.size
                self._write(segment, lines)
            except OSError:
                if self._delete_oldest():
                    continue
                self._wipe(before)
                raise
            segment.newest = last
            return segment, offset

    def _write(self, segment: Segment, lines: bytes) -> None:
        try:
            if self._files.write(segment.file, lines, segment.size) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):  # the rest of a short write would follow a shorter line that is next
                self._files.truncate(segment.file, segment.size)
            raise
        segment.size += len(lines)
        self.bytes += len(lines)

    def read(self, place: int, size: int) -> bytes:
        """Read bytes. Raises: OSError."""
        data = self._files.read(self._segments[place >> _OFFSET_BITS].file, size, place & (1 << _OFFSET_BITS) - 1)
        if len(data) != size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return data

    def erase(self, place: int, size: int) -> None:
        """Overwrite an event with spaces. Raises: OSError."""
        segment = self._segments[place >> _OFFSET_BITS]
        self._files.write(segment.file, b" " * size, place & (1 << _OFFSET_BITS) - 1)

    def age(self, now: int) -> None:
        """Delete the segments whose last line is too old; a segment takes lines for ten minutes."""
        newest = self._newest
        if newest is not None and newest.size > HEAD_BYTES and now - newest.began >= _SEGMENT_SECONDS * 1000:
            self._rotate(now)
        for segment in list(self._segments.values()):
            if segment is self._newest or now - milliseconds_of(segment.newest) < RETAINED_SECONDS * 1000:
                return
            self._delete_oldest()

    def close(self) -> None:
        """Close all files; nothing can be written or read any more."""
        for segment in self._segments.values():
            self._files.close(segment.file)
        self._segments.clear()
        self._newest = None

    def _rotate(self, now: int) -> None:
        """Begin a new segment; if that fails, the present one takes further lines."""
        assert self._newest is not None
        try:
            self._create(self._newest.newest, self._newest.newest, now)
        except OSError as error:
            logger.warning("no new segment of the event log could be created: %s", error)
            self._rotation_bytes = self._newest.size + _RETRY_ROTATION_BYTES

    def _create(self, last: int, follows: int, now: int) -> Segment:
        path = segment_path(self._folder, self._next_number)
        self._next_number += 1
        file = self._files.create(path)
        segment = Segment(path, self._next_number - 1, file, now)
        segment.size = 0
        try:
            self._write(segment, head(last, follows))
        except OSError:
            self._delete_file(segment)
            raise
        segment.newest = last
        self._segments[segment.number] = self._newest = segment
        self._rotation_bytes = self._segment_bytes
        return segment

    def _delete_oldest(self) -> bool:
        """Delete the oldest segment, unless it is the only one. Returns False if it is."""
        if len(self._segments) <= 1:
            return False
        oldest = self._segments.pop(next(iter(self._segments)))
        self.bytes -= oldest.size
        self._delete_file(oldest)
        for log in oldest.logs:
            log.cut(oldest.place(oldest.size))
        return True

    def _delete_file(self, segment: Segment) -> None:
        try:
            self._files.close(segment.file)
            self._files.delete(segment.path)
        except OSError as error:
            logger.warning("a segment of the event log could not be deleted: %s", error)

    def _wipe(self, last: int) -> None:
        """Delete all lines of the only segment. Its first line is overwritten: a full disk has no room for another."""
        segment = self._newest
        if segment is None:
            return
        for log in segment.logs:
            log.cut(segment.place(segment.size))
            log.newest_segment = 0
        segment.logs.clear()
        with contextlib.suppress(OSError):
            self._files.write(segment.file, head(last, 0), 0)
        with contextlib.suppress(OSError):
            self._files.truncate(segment.file, HEAD_BYTES)
        self.bytes -= segment.size - HEAD_BYTES
        segment.size = HEAD_BYTES
        segment.newest = last
