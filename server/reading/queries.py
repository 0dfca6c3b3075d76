"""What a thread's log contains of its runs: which run an entry belongs to, where a run begins and ends.

Each query reads the log's entries from a position backwards, and no further than it needs.
"""

from __future__ import annotations

from contextlib import aclosing

from agent_chat.stores.contracts import EventLog
from agent_chat.stores.errors import Gap
from agent_chat.stores.events import (
    RUN_TYPES,
    TURN_TYPES,
    Event,
    MessageCreated,
    RunStarted,
    TerminalEvent,
    decode,
    message_id_of,
    run_id_of,
)


async def find_turn(log: EventLog, thread_id: str, message_id: str, run_id: str | None) -> str | None:
    """Return the position after which the turn of a message is read, or None if the log does not contain it.

    Args:
        message_id: the message that was posted.
        run_id: the run that it started: its turn begins with the last `message.created` before `run.started`. None for
            a message that started no run: its turn begins with its first `message.created`.

    Raises: LogUnavailable.
    """
    found: str | None = None
    started, created = run_id is None, False
    async with aclosing(log.backwards(thread_id)) as entries:
        async for entry in entries:
            if created:
                found, created = entry.position, False
                if run_id is not None:
                    break
            if entry.type in TURN_TYPES:
                match decode(entry.data):
                    case RunStarted(message=message) if message.id == run_id:
                        started = True
                    case MessageCreated(message=message) if started and message.id == message_id:
                        found, created = None, True
    return found


async def is_in_run(log: EventLog, thread_id: str, position: str) -> bool:
    """Return True if `position` is inside a run: more of it follows, now or later.

    Decided by ids, not by the order of events: a terminal event may be published after the next user message, and a
    paused worker's deltas, or an orphan's user message once more, around the terminal event of their own run.

    Raises: Gap if the position is not in the log; LogUnavailable.
    """
    ended: set[str] = set()
    newest: str | None = None
    read = False
    async with aclosing(log.backwards(thread_id, position)) as entries:
        try:
            async for entry in entries:
                read = True
                if entry.type not in TURN_TYPES and (newest is not None or entry.type not in RUN_TYPES):
                    continue
                match decode(entry.data):
                    case TerminalEvent(message=message):
                        ended |= {message.id, (message.run or {}).get("in_reply_to", message.id)}
                    case RunStarted(message=message):
                        return message.id not in ended
                    case MessageCreated(message=message):
                        if message.role == "user" and message.id not in ended:
                            return True
                    case event:
                        newest = message_id_of(event)
        except Gap:
            if not read:
                raise
    return newest is not None and newest not in ended


async def read_run_events(log: EventLog, thread_id: str, run_id: str, upto: str) -> list[Event]:
    """Return the run's events up to and including `upto`, from its newest event that contains the whole message.

    That is run.started, message.snapshot or the terminal event; else they begin where the log does.

    Raises: Gap if `upto` is not in the log, or if a reader that continues after it from the last checkpoint would miss
        events that were evicted; LogUnavailable.
    """
    events: list[Event] = []
    async with aclosing(log.backwards(thread_id, upto)) as entries:
        async for entry in entries:
            if entry.type in RUN_TYPES and run_id_of(event := decode(entry.data)) == run_id:
                events.append(event)
                if event.whole_message:
                    break
    return events[::-1]
