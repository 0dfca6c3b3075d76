"""Data for the contract suites: principals, threads, messages, and clocks that a test sets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import msgspec
from msgspec.structs import replace

from agent_chat.stores.buffer import Cursor, Entry
from agent_chat.stores.contracts import EventLog, Store
from agent_chat.stores.events import Event, MessageDelta, ReasoningDelta
from agent_chat.stores.models import (
    Agent,
    Attachment,
    Idempotency,
    JSONObject,
    Message,
    Principal,
    Role,
    StoredFile,
    Thread,
    ToolCall,
    new_answer,
    new_id,
    timestamp,
    utcnow,
)

DAY = timedelta(hours=24)
WORKER = "worker-1"

AWKWARD: JSONObject = {
    "big": [2**53 + 1, 2**63, 2**64, -(2**64), 2**200],
    "floats": [0.1, 1.0, -0.0, 1e308, 5e-324, 1 / 3],
    "alike": [1, 1.0, True, "1"],
    "nulls": {"a": None, "b": [None, {"c": None}, []], "d": {}},
    "$set": {"$a.b": {"a.b.c": 1}},
    "": {"": [""]},
    "nul\x00key": "nul\x00value",
    "ключ 🗝": '\u2028 \u0007 \\ " 😀 e\u0301',
    "time": "2026-01-31T12:00:00.123456+02:00",
    "_id": 1,
    "__proto__": {"length": 0},
}
"""JSON that a database with types, keys or numbers of its own would change."""


class HandClock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 31, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def move(self, **by: float) -> None:
        self.now += timedelta(**by)


def new_principal(organization_id: str | None = None) -> Principal:
    """A new user, of a new organization if none is given."""
    return Principal(organization_id or new_id(), new_id())


def new_thread(principal: Principal, agent_id: str = "agent", *, metadata: JSONObject | None = None) -> Thread:
    now = timestamp(utcnow())
    return Thread(new_id(), agent_id, principal.user_id, principal.organization_id, "", metadata or {}, now, now, False)


def new_message(thread_id: str, content: str = "Hello?", role: Role = "user", at: datetime | None = None) -> Message:
    return Message(new_id(), thread_id, content, "", role, [], [], {}, timestamp(at or utcnow()))


def turn(thread_id: str, content: str = "Hello?", at: datetime | None = None) -> tuple[Message, Message]:
    """A question and the empty answer to it."""
    question = new_message(thread_id, content, at=at)
    return question, new_answer(thread_id, question.id, "model", question.created_at)


def completed(message: Message, content: str = "Done.") -> Message:
    return replace(message, content=content, content_html=f"<p>{content}</p>").with_run(status="completed")


def cancelled(message: Message) -> Message:
    return replace(message, content="Hal").with_run(status="cancelled")


def failed(message: Message, *, retryable: bool) -> Message:
    error = {"code": "agent_failed", "detail": "It broke.", "retryable": retryable}
    return message.with_run(status="failed", error=error)


def new_agent(principal: Principal, name: str = "Ada", *, is_default: bool = False) -> Agent:
    now = timestamp(utcnow())
    return Agent(
        new_id(),
        principal.organization_id,
        name,
        "demo",
        None,
        "Be kind.",
        ["time"],
        None,
        100,
        is_default,
        {},
        now,
        now,
    )


def idempotent(key: str = "key", fingerprint: str = "body") -> Idempotency:
    return Idempotency(key, fingerprint)


def awkward_call() -> ToolCall:
    return ToolCall("look", AWKWARD, AWKWARD, None, "2026-01-31T12:00:00.000Z", "2026-01-31T12:00:01.000Z")


def exactly(value: object) -> str:
    """A value as text in which 1, 1.0 and True differ, and so do 0.0 and -0.0: `==` is too kind."""
    return repr(msgspec.to_builtins(value))


def ids(messages: list[Message]) -> list[str]:
    return [message.id for message in messages]


async def started_thread(store: Store, principal: Principal, agent_id: str = "agent") -> Thread:
    """A new thread, stored."""
    return (await store.create(principal, new_thread(principal, agent_id))).thread


async def started_run(store: Store, principal: Principal, thread_id: str, content: str = "Hello?") -> Message:
    """A run that has the thread; its message."""
    question, answer = turn(thread_id, content)
    posted = await store.claim(principal, question, answer, worker=WORKER)
    assert posted.answer is not None
    return posted.answer


async def finished_run(store: Store, principal: Principal, thread_id: str, content: str = "Hello?") -> Message:
    """A whole turn, asked and answered; the answer."""
    answer = await started_run(store, principal, thread_id, content)
    finished = await store.finish(principal, completed(answer))
    await store.delete_record(principal, answer.id)
    return finished.message


async def publish(log: EventLog, thread_id: str, *events: Event) -> None:
    """Append the events with a writer of their own and wait until they are in the log; deltas one by one, unjoined."""
    writer = log.writer(thread_id)
    for event in events:
        writer.write(event)
        if isinstance(event, MessageDelta | ReasoningDelta):
            await writer.flush()
    await writer.flush()


async def read(cursor: Cursor, upto: str) -> list[Entry]:
    """Everything from the cursor to the entry at `upto`."""
    entries: list[Entry] = []
    while cursor.position != upto:
        entries += await cursor.next()
    return entries


async def rest(log: EventLog, thread_id: str, after: str) -> list[Entry]:
    """Everything that the log holds after a position, read by a cursor of its own."""
    upto = await log.tail(thread_id)
    cursor = log.cursor(thread_id, after)
    try:
        return await read(cursor, upto)
    finally:
        cursor.close()


Lose = Callable[[], Awaitable[None]]
"""Make every log disappear, as an hour's silence or an empty restart of Redis would."""


def new_file(thread_id: str, *, filename: str = 'a "file".txt', size: int = 5, text: str = "héllo") -> StoredFile:
    attachment = Attachment(
        id=new_id(),
        filename=filename,
        content_type="text/plain",
        size=size,
        sha256="0" * 64,
        status="ready",
        text_chars=len(text),
        truncated=False,
        error=None,
        created_at=timestamp(utcnow()),
    )
    return StoredFile(attachment, thread_id, text)


def an_attachment() -> JSONObject:
    """An attachment as clients see it."""
    attachment: JSONObject = msgspec.to_builtins(new_file(new_id()).attachment)
    return attachment
