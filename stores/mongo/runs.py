"""The runs in progress of the ThreadStore contract on MongoDB.

A run's record is its own document, {_id, thread_id, organization_id, user_id, worker, lease, cancelled, partial}.
`partial` is the message as `native` describes it; its time is that of the thread's entry.
It is written before the thread is claimed, so that no thread names a run without a record. A claim that dies in between
leaves a record that no thread names; the process that takes it over first increments the thread's fence, so that the
claim fails if it was only slow. A time limit on claims was refused: it would trust a clock.
"""

from __future__ import annotations

import hashlib
import logging
from datetime import datetime

from msgspec.structs import replace

from agent_chat.stores import rules
from agent_chat.stores.contracts import Finished, Lease, Posted, UsageRow
from agent_chat.stores.errors import NotFound, StoreUnavailable
from agent_chat.stores.models import Clock, Idempotency, Message, Principal, RunRecord
from agent_chat.stores.mongo.database import Collections
from agent_chat.stores.mongo.documents import (
    DOCUMENT_BYTES,
    HEAD_FIELDS,
    LAST_PUSHED,
    EmbeddingLimits,
    append_stages,
    build_used_key,
    finish_stage,
    write_pipeline,
)
from agent_chat.stores.mongo.messages import TRIES, contention, thread_query
from agent_chat.stores.mongo.native import Document, Packed, decode_message, pack, to_timestamp, unpack
from agent_chat.stores.mongo.threads import MongoThreads, append_guard, key_guard
from agent_chat.stores.mongo.usage import MongoUsage

logger = logging.getLogger(__name__)

_CLEARED_PER_SWEEP = 50


class MongoRuns(MongoThreads, MongoUsage):
    """Everything of the ThreadStore contract; the runs are built on threads, messages and the outbox.

    Attributes:
        _unconfirmed: `by` of each finish that got no response and was not repeated yet.
    """

    def __init__(self, db: Collections, *, lease: float, clock: Clock, limits: EmbeddingLimits | None = None) -> None:
        super().__init__(db, lease=lease, clock=clock, limits=limits)
        self._unconfirmed: set[str] = set()

    @property
    def _lease(self) -> Document:
        """The end of a lease that begins now, as an expression of a pipeline."""
        return {"$add": ["$$NOW", round(self.lease * 1000)]}

    async def claim(
        self,
        principal: Principal,
        question: Message,
        answer: Message,
        *,
        worker: str,
        idempotency: Idempotency | None = None,
    ) -> Posted:
        packed_question = await pack(question)
        for _ in range(TRIES):
            if posted := await self._try_claim(principal, question, packed_question, answer, worker, idempotency):
                return posted
        raise contention(question.thread_id)

    async def checkpoint(self, principal: Principal, run_id: str, *, worker: str, partial: Message | None) -> Lease:
        changes: Document = {"lease": self._lease}
        if partial is not None:
            changes["partial"] = {"$literal": (await pack(partial)).raw}
        run = await self.db.runs.update_one(
            {"_id": run_id, "organization_id": principal.organization_id, "worker": worker},
            [{"$set": changes}],
            {"cancelled": 1},
        )
        if run is None:
            return "lost"
        return "cancelled" if run["cancelled"] else "held"

    async def cancel(self, principal: Principal, thread_id: str, run_id: str) -> None:
        if await self.db.threads.find_one({**thread_query(principal, thread_id), "running.id": run_id}, {"_id": 1}):
            run = {"_id": run_id, "thread_id": thread_id, "organization_id": principal.organization_id}
            await self.db.runs.update_one(run, {"$set": {"cancelled": True}}, {"_id": 1})

    async def finish(self, principal: Principal, message: Message) -> Finished:
        """The thread decides which run has it (I4); the run's record is not read.

        A finish without a response may have been done. So it is remembered in `_unconfirmed`, and when it is repeated
        and the message turns out to be stored by it (`by`, unlike that of any other finish), it has won, once.
        """
        packed = await pack(message)
        by = f"{self.id}:{hashlib.sha256(packed.raw.raw).hexdigest()[:16]}"
        stage = finish_stage(packed, by, frees_key=rules.frees_key(message))
        now = self.now()
        pipeline = write_pipeline(now, stage, active_at=now)
        guard = {
            **thread_query(principal, message.thread_id),
            "running.id": message.id,
            "bytes": {"$lte": DOCUMENT_BYTES - packed.bytes},
        }
        for _ in range(TRIES):
            try:
                thread = await self.db.threads.update_one(guard, pipeline, HEAD_FIELDS, before=True)
            except StoreUnavailable:
                self._unconfirmed.add(by)
                raise
            if thread:
                self._unconfirmed.discard(by)
                await self._move_surplus(principal, message.thread_id, thread["count"], thread["bytes"] + packed.bytes)
                return Finished(replace(message, created_at=to_timestamp(thread["running"]["at"])), won=True)
            try:
                thread, entry = await self._find_entry(principal, message.thread_id, message.id)
            except NotFound:
                self._unconfirmed.discard(by)
                raise
            if (thread["running"] or {}).get("id") == message.id:
                await self._make_room(principal, message.thread_id, packed.bytes)
                continue
            won = by in self._unconfirmed and entry.get("by") == by
            self._unconfirmed.discard(by)
            return Finished((await unpack(message.thread_id, [entry]))[0], won=won)
        raise contention(message.thread_id)

    async def take_orphans(self, worker: str) -> list[RunRecord]:
        """Also deletes what belongs to deleted threads and has not been deleted yet."""
        now = await self.db.now()  # I5
        for emptied in await self.db.threads.find({"sweep_at": {"$lte": now}}, limit=_CLEARED_PER_SWEEP):
            await self._clear(emptied)
        expired = await self.db.runs.find({"lease": {"$lte": now}}, {"_id": 1})
        taken = [await self._take_over_or_log(run["_id"], worker, now) for run in expired]
        return [record for record in taken if record is not None]

    async def take_orphan(self, principal: Principal, run_id: str, worker: str) -> RunRecord | None:
        query = {"_id": run_id, "organization_id": principal.organization_id}
        return await self._take_over(query, worker, await self.db.now())

    async def find_record(self, principal: Principal, run_id: str) -> RunRecord | None:
        run = await self.db.runs.find_one({"_id": run_id, "organization_id": principal.organization_id})
        return (await self._build_record(run))[0] if run else None

    async def delete_record(self, principal: Principal, run_id: str, usage: UsageRow | None = None) -> None:
        if usage is not None:
            await self._insert_usage(usage)
        await self.db.runs.delete_one({"_id": run_id, "organization_id": principal.organization_id})

    # claiming

    async def _try_claim(
        self,
        principal: Principal,
        question: Message,
        packed_question: Packed,
        answer: Message,
        worker: str,
        idempotency: Idempotency | None,
    ) -> Posted | None:
        """Try to claim; None if the thread has changed since it was read. No record remains of a claim that failed."""
        thread_id = question.thread_id
        now = self.now()
        head, key = await self._read_head(principal, thread_id, idempotency)
        used = build_used_key(key) if key else None
        running = (head["running"] or {}).get("id")
        decision = rules.decide_post(thread_id, used, archived=head["archived"], running=running, starts_run=True)
        if used is not None and decision == "replay":
            return await self._replay(principal, thread_id, used)
        if used is not None:
            question = await self.get_message(principal, thread_id, used.message_id)
            answer = answer.with_run(in_reply_to=question.id)
        packed_answer = await pack(answer)
        appended = [packed_answer] if used else [packed_question, packed_answer]
        need = sum(packed.bytes for packed in appended)
        if head["bytes"] + need > DOCUMENT_BYTES:
            await self._make_room(principal, thread_id, need)
            return None
        await self._write_record(principal, thread_id, packed_answer, worker)
        new_key = self._build_key(principal, thread_id, idempotency, question.id, answer.id, now)
        stored = await self.db.threads.update_one(
            {
                **append_guard(principal, head, need),
                **key_guard(head, new_key, key, now),
                "running": None,
                "fence": head["fence"],
            },
            write_pipeline(now, *append_stages(appended, new_key, answer.id, now), active_at=LAST_PUSHED),
            {**HEAD_FIELDS, "pushed": 1},
        )
        if stored is None:
            await self.db.runs.delete_one({"_id": answer.id, "worker": worker})
            return None
        await self._move_surplus(principal, thread_id, stored["count"], stored["bytes"])
        if used is None:
            question = replace(question, created_at=to_timestamp(stored["pushed"][0]))
        answer = replace(answer, created_at=to_timestamp(stored["pushed"][-1]))
        return Posted(question, answer, replayed=False, again=used is not None)

    async def _write_record(self, principal: Principal, thread_id: str, packed_answer: Packed, worker: str) -> None:
        """Write the run's record. Raises: StoreUnavailable if a sweeper has taken it over."""
        fields = {
            "thread_id": thread_id,
            "organization_id": principal.organization_id,
            "user_id": principal.user_id,
            "cancelled": False,
            "partial": packed_answer.raw,
        }
        literal = {name: {"$literal": value} for name, value in fields.items()}
        run = {"_id": packed_answer.id, "worker": worker}
        record = [{"$set": {**literal, "lease": self._lease}}]
        if await self.db.runs.update_one(run, record, {"_id": 1}, upsert=True) is None:
            raise StoreUnavailable(f"the claim of run {packed_answer.id} took too long")

    # taking over

    async def _take_over_or_log(self, run_id: str, worker: str, now: datetime) -> RunRecord | None:
        try:
            return await self._take_over({"_id": run_id}, worker, now)
        except StoreUnavailable:
            raise
        except Exception:
            logger.exception("The record of run %s cannot be read", run_id)
            return None

    async def _take_over(self, query: Document, worker: str, now: datetime) -> RunRecord | None:
        """Take the run over if its lease has expired at `now`, by the database's clock."""
        changes = {"worker": {"$literal": worker}, "lease": self._lease}
        run = await self.db.runs.update_one({**query, "lease": {"$lte": now}}, [{"$set": changes}])
        if run is None:
            return None
        record, claimed = await self._build_record(run)
        if not claimed:
            await self.db.threads.update_one({"_id": run["thread_id"]}, {"$inc": {"fence": 1}}, {"_id": 1})
            record, _ = await self._build_record(run)
        return record

    async def _build_record(self, run: Document) -> tuple[RunRecord, bool]:
        """The record, its message with the time that the thread has for it; and whether the thread has that message."""
        record = RunRecord(
            id=run["_id"],
            thread_id=run["thread_id"],
            organization_id=run["organization_id"],
            user_id=run["user_id"],
            worker=run["worker"],
            partial=decode_message(run["thread_id"], run["partial"]),
            cancelled=run["cancelled"],
        )
        try:
            _, entry = await self._find_entry(record.principal, record.thread_id, record.id)
        except NotFound:
            return record, False
        return replace(record, partial=replace(record.partial, created_at=to_timestamp(entry["created_at"]))), True
