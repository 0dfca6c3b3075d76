"""Reading one thread's log: a page forwards for a reader that is behind, and everything backwards."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from agent_chat.stores.buffer import Buffer, Entry
from agent_chat.stores.embedded.positions import parse, text_of
from agent_chat.stores.embedded.segments import Segments
from agent_chat.stores.embedded.thread_log import ThreadLog
from agent_chat.stores.errors import Gap

_PAGE_EVENTS = 100
_FIRST_EVENTS = 16
"""How many entries the first page backwards has; most queries need few."""
_PAGE_BYTES = 2**18


def read_page(segments: Segments | None, log: ThreadLog, buffer: Buffer, position: str) -> list[Entry]:
    """Return what follows the position on disk, up to what the buffer has; as `Buffer.pages`. Raises: Gap."""
    if buffer.lost or buffer.index_after(position) is not None:
        return []
    begin = parse(position)
    index = None if begin is None else log.index(begin)
    if index is None or segments is None:
        raise Gap(position)
    start = index + 1
    end = min(start + _PAGE_EVENTS, len(log.positions))
    if buffer.before is not None and (before := parse(buffer.before)) is not None:
        end = min(end, max(start, bisect_right(log.positions, before)))  # what follows is shared with other cursors
    size = 0
    for number in range(start, end):
        size += log.sizes[number]
        if size > _PAGE_BYTES and number > start:
            end = number
            break
    if start >= end:
        raise Gap(position)
    return _read(segments, log, start, end)


def newest_first(segments: Segments | None, log: ThreadLog, begin: int) -> Iterator[Entry]:
    """Yield the retained entries from a position to the oldest; the log may change meanwhile. Raises: Gap."""
    if segments is None or log.index(begin) is None:
        buffer = log.buffer
        after = buffer.index_after(text_of(begin)) if buffer is not None else None
        if buffer is not None and after is not None:
            yield from buffer.entries[: after - buffer.first][::-1]
        elif begin != log.last:
            raise Gap(text_of(begin))
        return
    count = _FIRST_EVENTS
    while True:
        end = bisect_right(log.positions, begin, log.first)
        start = max(log.first, end - count)
        size = 0
        for number in range(end - 1, start - 1, -1):
            size += log.sizes[number]
            if size > _PAGE_BYTES and number < end - 1:
                start = number + 1
                break
        if start >= end:
            return
        begin = log.positions[start] - 1
        yield from reversed(_read(segments, log, start, end))
        count = _PAGE_EVENTS


def _read(segments: Segments, log: ThreadLog, start: int, end: int) -> list[Entry]:
    """Read the entries with these indexes, in one call if they are close to each other. Raises: Gap."""
    places, sizes = log.places[start:end], log.sizes[start:end]
    span = places[-1] + sizes[-1] - places[0]
    try:
        if span <= _PAGE_BYTES:
            data = segments.read(places[0], span)
            offsets = [place - places[0] for place in places]
            parts = [data[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
        else:
            parts = [segments.read(place, size) for place, size in zip(places, sizes, strict=True)]
    except OSError as error:
        raise Gap(text_of(log.positions[start])) from error
    positions = map(text_of, log.positions[start:end])
    return [Entry(position, part) for position, part in zip(positions, parts, strict=True)]
