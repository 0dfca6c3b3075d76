"""The ThreadStore contract on SQLite: threads, messages, runs in progress, idempotency keys.

Messages are rows with the whole message as JSON, ordered by `seq`; the message of a run in progress is read from the
run's record, where checkpoints go.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from agent_chat.stores.contracts import (
    OUTBOX_LEASE,
    Created,
    Finished,
    Lease,
    MessagePage,
    Outbox,
    Page,
    Posted,
    ThreadPart,
)
from agent_chat.stores.errors import (
    AttachmentNotFound,
    IdempotencyMismatch,
    MessageNotFound,
    StoreUnavailable,
    ThreadArchived,
    ThreadBusy,
    ThreadNotFound,
)
from agent_chat.stores.events import Fact, MessageCreated, ThreadDeleted, ThreadUpdated
from agent_chat.stores.fitting import READ_BYTES, fitting, latest_fitting
from agent_chat.stores.models import Idempotency, KeptFile, Message, Principal, RunRecord, Thread, later, timestamp
from agent_chat.stores.sqlite.database import NOW, Database, reading, writing
from agent_chat.stores.sqlite.outbox import add_fact, has_fact, remove_facts, take_outboxes
from agent_chat.stores.sqlite.storage import add_bytes, add_removal, cancel_removal, thread_bytes
from agent_chat.stores.storage import REMOVAL_SECONDS, BlobRemoval

logger = logging.getLogger(__name__)

KEY_SECONDS = 24 * 3600

_JOINED = """
FROM messages m JOIN threads t ON t.id = m.thread_id LEFT JOIN runs r ON r.id = m.id AND r.id = t.running
"""
_MESSAGES = f"SELECT m.seq, COALESCE(r.partial, m.body) AS body {_JOINED}"
_SIZES = f"SELECT m.seq, COALESCE(length(r.partial), length(m.body)) AS size, r.id IS NOT NULL AS running {_JOINED}"
"""Without the bodies: SQLite takes a blob's length from its row's header."""


def _message(body: bytes) -> Message:
    return msgspec.json.decode(body, type=Message)


def _thread(row: sqlite3.Row, messages: list[Message] | None = None) -> Thread:
    return Thread(
        id=row["id"],
        agent_id=row["agent_id"],
        user_id=row["user_id"],
        organization_id=row["organization_id"],
        title=row["title"],
        metadata=msgspec.json.decode(row["metadata"]),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        archived=bool(row["archived"]),
        messages=messages or [],
    )


def _record(row: sqlite3.Row) -> RunRecord:
    return RunRecord(
        id=row["id"],
        thread_id=row["thread_id"],
        organization_id=row["organization_id"],
        user_id=row["user_id"],
        worker=row["worker"],
        partial=_message(row["partial"]),
        cancelled=bool(row["cancelled"]),
    )


def _readable(row: sqlite3.Row) -> RunRecord | None:
    try:
        return _record(row)
    except Exception:
        logger.exception("the record of run %s can't be read", row["id"])
        return None


def _row(db: sqlite3.Connection, who: Principal, thread_id: str) -> sqlite3.Row:
    row: sqlite3.Row | None = db.execute(
        "SELECT * FROM threads WHERE id = ? AND organization_id = ?", (thread_id, who.organization_id)
    ).fetchone()
    if row is None:
        raise ThreadNotFound(thread_id)
    return row


def _sizes(db: sqlite3.Connection, thread_id: str, limit: int, before: int = 2**62) -> list[sqlite3.Row]:
    """The place and the size of the latest messages before that place, latest first."""
    sized = f"{_SIZES} WHERE m.thread_id = ? AND m.seq < ? ORDER BY m.seq DESC LIMIT ?"
    return db.execute(sized, (thread_id, before, limit)).fetchall()


def _bodies(db: sqlite3.Connection, rows: Iterable[sqlite3.Row]) -> list[Message]:
    """The messages at the places of `rows`, oldest first."""
    places = sorted(row["seq"] for row in rows)
    return [_message(db.execute(f"{_MESSAGES} WHERE m.seq = ?", (place,)).fetchone()["body"]) for place in places]


def _latest(db: sqlite3.Connection, thread_id: str, limit: int, max_bytes: int) -> tuple[list[Message], bool]:
    """The latest messages that fit and a running one, oldest first, and whether any was left out for its size."""
    rows = _sizes(db, thread_id, limit)
    running = next((index for index, row in enumerate(rows) if row["running"]), None)
    chosen = latest_fitting([row["size"] for row in rows], max_bytes, running)
    return _bodies(db, (rows[index] for index in chosen)), len(chosen) < len(rows)


def _read(db: sqlite3.Connection, thread_id: str, message_id: str) -> tuple[int, Message]:
    row = db.execute(f"{_MESSAGES} WHERE m.id = ? AND m.thread_id = ?", (message_id, thread_id)).fetchone()
    if row is None:
        raise MessageNotFound(message_id)
    return row["seq"], _message(row["body"])


def _place(db: sqlite3.Connection, thread_id: str, message_id: str) -> int:
    row = db.execute("SELECT seq FROM messages WHERE id = ? AND thread_id = ?", (message_id, thread_id)).fetchone()
    if row is None:
        raise MessageNotFound(message_id)
    return int(row[0])


def _append(db: sqlite3.Connection, message: Message) -> Message:
    """Insert it, its time moved past the last message's."""
    last = db.execute(
        "SELECT created_at FROM messages WHERE thread_id = ? ORDER BY seq DESC LIMIT 1", (message.thread_id,)
    ).fetchone()
    message = replace(message, created_at=later(message.created_at, last[0] if last else None))
    db.execute(
        "INSERT INTO messages (id, thread_id, created_at, body) VALUES (?, ?, ?, ?)",
        (message.id, message.thread_id, message.created_at, msgspec.json.encode(message)),
    )
    return message


class SQLiteThreads(Database):
    @writing
    def create(
        self, db: sqlite3.Connection, who: Principal, thread: Thread, idempotency: Idempotency | None = None
    ) -> Created:
        now = self.clock().timestamp()
        key = idempotency.key if idempotency else None
        if idempotency:
            made = db.execute(
                "SELECT * FROM threads WHERE organization_id = ? AND user_id = ? AND agent_id = ? AND key = ?",
                (who.organization_id, who.user_id, thread.agent_id, key),
            ).fetchone()
            if made and made["key_at"] > now - KEY_SECONDS:
                if made["fingerprint"] != idempotency.fingerprint:
                    raise IdempotencyMismatch(idempotency.key)
                return Created(_thread(made), replayed=True)
            if made:
                db.execute("UPDATE threads SET key = NULL WHERE id = ?", (made["id"],))
        db.execute(
            "INSERT INTO threads VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, ?, ?, ?)",
            (
                thread.id,
                who.organization_id,
                thread.agent_id,
                who.user_id,
                thread.title,
                msgspec.json.encode(thread.metadata),
                thread.created_at,
                thread.updated_at,
                thread.archived,
                key,
                idempotency.fingerprint if idempotency else None,
                now,
            ),
        )
        return Created(_thread(_row(db, who, thread.id)), replayed=False)

    @reading
    def get(self, db: sqlite3.Connection, who: Principal, thread_id: str, *, message_limit: int = 50) -> Thread:
        row = _row(db, who, thread_id)
        return _thread(row, _latest(db, thread_id, message_limit, READ_BYTES)[0])

    @reading
    def read(
        self,
        db: sqlite3.Connection,
        who: Principal,
        thread_id: str,
        *,
        message_limit: int,
        max_bytes: int = READ_BYTES,
    ) -> ThreadPart:
        row = _row(db, who, thread_id)
        messages, cut = _latest(db, thread_id, message_limit, max_bytes)
        return ThreadPart(_thread(row, messages), cut)

    @reading
    def page(
        self,
        db: sqlite3.Connection,
        who: Principal,
        agent_id: str,
        *,
        limit: int,
        offset: int,
        archived: bool | None,
        message_limit: int,
        max_bytes: int,
    ) -> Page:
        rows = db.execute(
            "SELECT * FROM threads WHERE organization_id = ? AND agent_id = ? AND (?3 IS NULL OR archived = ?3)"
            " ORDER BY updated_at DESC, id DESC LIMIT ?4 OFFSET ?5",
            (who.organization_id, agent_id, archived, limit + 1, offset),
        ).fetchall()
        threads = rows[:limit]
        sized = [_sizes(db, row["id"], message_limit) for row in threads]
        counts = fitting([[each["size"] for each in of_thread] for of_thread in sized], max_bytes)
        wanted = [of_thread[:count] for of_thread, count in zip(sized, counts, strict=True)]
        return Page(
            threads=[_thread(row, _bodies(db, places)) for row, places in zip(threads, wanted, strict=True)],
            more=len(rows) > limit,
            cut=any(len(places) < len(of_thread) for places, of_thread in zip(wanted, sized, strict=True)),
        )

    @writing
    def update(
        self,
        db: sqlite3.Connection,
        who: Principal,
        thread_id: str,
        *,
        title: str | None = None,
        archived: bool | None = None,
    ) -> Thread:
        row = _row(db, who, thread_id)
        db.execute(
            "UPDATE threads SET title = COALESCE(?, title), archived = COALESCE(?, archived) WHERE id = ?",
            (title, archived, thread_id),
        )
        self._touch(db, row)
        thread = _thread(_row(db, who, thread_id))
        self._add_fact(db, who, thread_id, ThreadUpdated(thread))
        return thread

    @writing
    def delete(self, db: sqlite3.Connection, who: Principal, thread_id: str) -> str | None:
        row = _row(db, who, thread_id)
        add_bytes(db, who.organization_id, -thread_bytes(db, thread_id))
        if db.execute("SELECT 1 FROM attachments WHERE thread_id = ?", (thread_id,)).fetchone():
            add_removal(db, BlobRemoval(thread_id, who.organization_id, thread_id, None, 0), REMOVAL_SECONDS)
        db.execute("DELETE FROM threads WHERE id = ?", (thread_id,))
        self._add_fact(db, who, thread_id, ThreadDeleted(thread_id))
        running: str | None = row["running"]
        return running

    @reading
    def messages(
        self,
        db: sqlite3.Connection,
        who: Principal,
        thread_id: str,
        *,
        before: str | None,
        limit: int,
        max_bytes: int = READ_BYTES,
    ) -> MessagePage:
        _row(db, who, thread_id)
        place = _place(db, thread_id, before) if before is not None else 2**62
        rows = _sizes(db, thread_id, limit, place)
        chosen = latest_fitting([row["size"] for row in rows], max_bytes)
        return MessagePage(_bodies(db, rows[: len(chosen)]), cut=len(chosen) < len(rows))

    @reading
    def message(self, db: sqlite3.Connection, who: Principal, thread_id: str, message_id: str) -> Message:
        _row(db, who, thread_id)
        return _read(db, thread_id, message_id)[1]

    @writing
    def append_message(
        self, db: sqlite3.Connection, who: Principal, message: Message, idempotency: Idempotency | None = None
    ) -> Posted:
        row = _row(db, who, message.thread_id)
        if replayed := self._replayed(db, who, message.thread_id, idempotency):
            return replayed
        if row["archived"]:
            raise ThreadArchived(message.thread_id)
        stored = _append(db, message)
        self._touch(db, row)
        self._add_fact(db, who, message.thread_id, MessageCreated(stored))
        self._keep_key(db, who, Posted(stored, None, replayed=False), idempotency)
        return Posted(stored, None, replayed=False)

    @writing
    def add_file(self, db: sqlite3.Connection, who: Principal, file: KeptFile) -> None:
        _row(db, who, file.thread_id)
        if not cancel_removal(db, file.attachment.id):
            raise StoreUnavailable(f"storing attachment {file.attachment.id} took too long")
        db.execute(
            "INSERT INTO attachments (id, organization_id, size, body, thread_id) VALUES (?, ?, ?, ?, ?)",
            (
                file.attachment.id,
                who.organization_id,
                file.attachment.size,
                msgspec.json.encode(file),
                file.thread_id,
            ),
        )

    @reading
    def file(self, db: sqlite3.Connection, who: Principal, thread_id: str, attachment_id: str) -> KeptFile:
        _row(db, who, thread_id)
        row = db.execute(
            "SELECT body FROM attachments WHERE id = ? AND thread_id = ?", (attachment_id, thread_id)
        ).fetchone()
        if row is None:
            raise AttachmentNotFound(attachment_id)
        return msgspec.json.decode(row["body"], type=KeptFile)

    @writing
    def remove_file(self, db: sqlite3.Connection, who: Principal, thread_id: str, attachment_id: str) -> None:
        _row(db, who, thread_id)
        row = db.execute(
            "DELETE FROM attachments WHERE id = ? AND thread_id = ? RETURNING size", (attachment_id, thread_id)
        ).fetchone()
        if row:
            removal = BlobRemoval(attachment_id, who.organization_id, thread_id, attachment_id, row["size"])
            add_removal(db, removal, REMOVAL_SECONDS)

    @reading
    def replay(self, db: sqlite3.Connection, who: Principal, thread_id: str, idempotency: Idempotency) -> Posted | None:
        _row(db, who, thread_id)
        return self._replayed(db, who, thread_id, idempotency)

    @writing
    def claim(
        self,
        db: sqlite3.Connection,
        who: Principal,
        question: Message,
        answer: Message,
        *,
        worker: str,
        idempotency: Idempotency | None = None,
    ) -> Posted:
        thread_id = question.thread_id
        row = _row(db, who, thread_id)
        if replayed := self._replayed(db, who, thread_id, idempotency):
            return replayed
        if row["archived"]:
            raise ThreadArchived(thread_id)
        if row["running"]:
            raise ThreadBusy(row["running"])
        again = self._key(db, who, thread_id, idempotency)
        if again is not None:
            question = _read(db, thread_id, again["message_id"])[1]
            answer = answer.with_run(in_reply_to=question.id)
        else:
            question = _append(db, question)
        answer = _append(db, answer)
        db.execute("UPDATE threads SET running = ? WHERE id = ?", (answer.id, thread_id))
        self._touch(db, row)
        db.execute(
            "INSERT INTO runs (id, thread_id, organization_id, user_id, worker, lease, partial)"
            f" VALUES (?, ?, ?, ?, ?, {NOW} + ?, ?)",
            (
                answer.id,
                thread_id,
                who.organization_id,
                who.user_id,
                worker,
                self.lease,
                msgspec.json.encode(answer),
            ),
        )
        posted = Posted(question, answer, replayed=False, again=again is not None)
        self._keep_key(db, who, posted, idempotency)
        return posted

    @writing
    def checkpoint(
        self, db: sqlite3.Connection, who: Principal, run_id: str, *, worker: str, partial: Message | None
    ) -> Lease:
        if partial is not None:
            times = db.execute("SELECT created_at FROM messages WHERE id = ?", (run_id,)).fetchone()
            partial = replace(partial, created_at=times[0]) if times else partial
        row = db.execute(
            f"UPDATE runs SET lease = {NOW} + ?, partial = COALESCE(?, partial)"
            " WHERE id = ? AND organization_id = ? AND worker = ? RETURNING cancelled",
            (self.lease, msgspec.json.encode(partial) if partial else None, run_id, who.organization_id, worker),
        ).fetchone()
        if row is None:
            return "lost"
        return "cancelled" if row["cancelled"] else "held"

    @writing
    def cancel(self, db: sqlite3.Connection, who: Principal, thread_id: str, run_id: str) -> None:
        db.execute(
            "UPDATE runs SET cancelled = 1 WHERE id = ?1 AND thread_id = ?2 AND organization_id = ?3"
            " AND EXISTS (SELECT 1 FROM threads WHERE id = ?2 AND running = ?1)",
            (run_id, thread_id, who.organization_id),
        )

    @writing
    def finish(self, db: sqlite3.Connection, who: Principal, message: Message) -> Finished:
        row = _row(db, who, message.thread_id)
        stored = _read(db, message.thread_id, message.id)[1]
        if row["running"] != message.id:
            return Finished(stored, won=False)
        message = replace(message, created_at=stored.created_at)
        db.execute("UPDATE messages SET body = ? WHERE id = ?", (msgspec.json.encode(message), message.id))
        db.execute("UPDATE threads SET running = NULL WHERE id = ?", (message.thread_id,))
        self._touch(db, row)
        error = (message.run or {}).get("error")
        if error and error["retryable"]:
            db.execute(
                "UPDATE idempotency SET free = 1 WHERE thread_id = ? AND run_id = ?", (message.thread_id, message.id)
            )
        return Finished(message, won=True)

    @writing
    def orphans(self, db: sqlite3.Connection, worker: str) -> list[RunRecord]:
        rows = db.execute(
            f"UPDATE runs SET worker = ?, lease = {NOW} + ? WHERE lease <= {NOW} RETURNING *", (worker, self.lease)
        ).fetchall()
        return [record for row in rows if (record := _readable(row))]

    @writing
    def orphan(self, db: sqlite3.Connection, who: Principal, run_id: str, worker: str) -> RunRecord | None:
        row = db.execute(
            f"UPDATE runs SET worker = ?, lease = {NOW} + ?"
            f" WHERE id = ? AND organization_id = ? AND lease <= {NOW} RETURNING *",
            (worker, self.lease, run_id, who.organization_id),
        ).fetchone()
        return _record(row) if row else None

    @reading
    def record(self, db: sqlite3.Connection, who: Principal, run_id: str) -> RunRecord | None:
        row = db.execute(
            "SELECT * FROM runs WHERE id = ? AND organization_id = ?", (run_id, who.organization_id)
        ).fetchone()
        return _record(row) if row else None

    @writing
    def forget(self, db: sqlite3.Connection, who: Principal, run_id: str) -> None:
        db.execute("DELETE FROM runs WHERE id = ? AND organization_id = ?", (run_id, who.organization_id))

    @writing
    def unpublished(self, db: sqlite3.Connection, thread_id: str | None = None) -> list[Outbox]:
        return take_outboxes(
            db,
            thread_id,
            self.lease * OUTBOX_LEASE,
            lambda organization_id, thread_id: _thread(_row(db, Principal(organization_id, ""), thread_id)),
            lambda thread_id, message_id: _read(db, thread_id, message_id)[1],
        )

    @writing
    def mark_published(self, db: sqlite3.Connection, who: Principal, thread_id: str, facts: Sequence[Fact]) -> None:
        remove_facts(db, who.organization_id, thread_id, facts)

    def _add_fact(self, db: sqlite3.Connection, who: Principal, thread_id: str, fact: Fact) -> None:
        add_fact(db, who.organization_id, thread_id, fact, self.lease * OUTBOX_LEASE)

    def _touch(self, db: sqlite3.Connection, row: sqlite3.Row) -> None:
        stamp = later(timestamp(self.clock()), row["updated_at"])
        db.execute("UPDATE threads SET updated_at = ? WHERE id = ?", (stamp, row["id"]))

    def _key(
        self, db: sqlite3.Connection, who: Principal, thread_id: str, idempotency: Idempotency | None
    ) -> sqlite3.Row | None:
        """The key's row, if it is not too old. Raises: IdempotencyMismatch."""
        if idempotency is None:
            return None
        row: sqlite3.Row | None = db.execute(
            "SELECT * FROM idempotency WHERE thread_id = ? AND user_id = ? AND key = ? AND at > ?",
            (thread_id, who.user_id, idempotency.key, self.clock().timestamp() - KEY_SECONDS),
        ).fetchone()
        if row is not None and row["fingerprint"] != idempotency.fingerprint:
            raise IdempotencyMismatch(idempotency.key)
        return row

    def _replayed(
        self, db: sqlite3.Connection, who: Principal, thread_id: str, idempotency: Idempotency | None
    ) -> Posted | None:
        row = self._key(db, who, thread_id, idempotency)
        if row is None or row["free"]:
            return None
        answer = _read(db, thread_id, row["run_id"])[1] if row["run_id"] else None
        message = _read(db, thread_id, row["message_id"])[1]
        unpublished = answer is None and has_fact(db, thread_id, message.id)
        return Posted(message, answer, replayed=True, unpublished=unpublished)

    def _keep_key(
        self, db: sqlite3.Connection, who: Principal, posted: Posted, idempotency: Idempotency | None
    ) -> None:
        if idempotency is None:
            return
        now = self.clock().timestamp()
        thread_id = posted.message.thread_id
        db.execute("DELETE FROM idempotency WHERE thread_id = ? AND at <= ?", (thread_id, now - KEY_SECONDS))
        db.execute(
            "INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?, ?, ?, ?, 0)",
            (thread_id, who.user_id, idempotency.key, idempotency.fingerprint, posted.message.id, posted.run_id, now),
        )
