"""The ThreadStore contract on MongoDB: the runs in progress.

A run's record is a document of its own, {_id, thread_id, organization_id, user_id, worker, lease, cancelled, partial,
size}: written before the thread is claimed, so that a thread never points to a run without one. A claim that dies in
between leaves a record that no thread points to; whoever takes that over first raises the thread's fence, so that the
claim, if it is only slow, is refused. A time limit on claims was refused: it would trust a clock.
"""

from __future__ import annotations

import hashlib
import logging
from datetime import datetime

from msgspec.structs import replace

from agent_chat.stores.contracts import Finished, Lease, Posted
from agent_chat.stores.errors import NotFound, StoreUnavailable, ThreadArchived, ThreadBusy
from agent_chat.stores.models import Clock, Idempotency, Message, Principal, RunRecord
from agent_chat.stores.mongo.database import Collections
from agent_chat.stores.mongo.documents import (
    DOCUMENT_BYTES,
    HEAD,
    Document,
    Limits,
    Packed,
    finishing,
    pack,
    pushing,
    stamp,
    unpack,
    unpack_body,
    writing,
)
from agent_chat.stores.mongo.pages import TRIES, contended, where
from agent_chat.stores.mongo.threads import MongoThreads, guarded, unused

logger = logging.getLogger(__name__)

_CLEARED_PER_SWEEP = 50


class MongoRuns(MongoThreads):
    def __init__(self, db: Collections, *, lease: float, clock: Clock, limits: Limits | None = None) -> None:
        super().__init__(db, lease=lease, clock=clock, limits=limits)
        self._unsure: set[str] = set()

    @property
    def _lease(self) -> Document:
        """When a lease that begins now ends, as a pipeline's expression."""
        return {"$add": ["$$NOW", round(self.lease * 1000)]}

    async def claim(
        self,
        who: Principal,
        question: Message,
        answer: Message,
        *,
        worker: str,
        idempotency: Idempotency | None = None,
    ) -> Posted:
        asked = await pack(question)
        for _ in range(TRIES):
            if posted := await self._claimed(who, question, asked, answer, worker, idempotency):
                return posted
        raise contended(question.thread_id)

    async def checkpoint(self, who: Principal, run_id: str, *, worker: str, partial: Message | None) -> Lease:
        changes: Document = {"lease": self._lease}
        if partial is not None:
            packed = await pack(partial)
            changes |= {"partial": packed.body, "size": packed.size}
        run = await self.db.runs.change(
            {"_id": run_id, "organization_id": who.organization_id, "worker": worker},
            [{"$set": changes}],
            {"cancelled": 1},
        )
        if run is None:
            return "lost"
        return "cancelled" if run["cancelled"] else "held"

    async def cancel(self, who: Principal, thread_id: str, run_id: str) -> None:
        if await self.db.threads.one({**where(who, thread_id), "running.id": run_id}, {"_id": 1}):
            run = {"_id": run_id, "thread_id": thread_id, "organization_id": who.organization_id}
            await self.db.runs.change(run, {"$set": {"cancelled": True}}, {"_id": 1})

    async def finish(self, who: Principal, message: Message) -> Finished:
        """The run's record is not looked at: the thread says whose it is.

        A finish whose answer was lost is remembered: when it is tried again and the message is found as it stored it,
        it has won, and once only. `by` tells it from every other finish, of this process too.
        """
        packed = await pack(message)
        by = f"{self.id}:{hashlib.sha256(packed.body).hexdigest()[:16]}"
        error = (message.run or {}).get("error")
        pipeline = writing(self.now(), finishing(packed, by, frees=bool(error and error["retryable"])))
        guard = {
            **where(who, message.thread_id),
            "running.id": message.id,
            "bytes": {"$lte": DOCUMENT_BYTES - len(packed.body)},
        }
        for _ in range(TRIES):
            try:
                thread = await self.db.threads.change(guard, pipeline, HEAD, before=True)
            except StoreUnavailable:
                self._unsure.add(by)
                raise
            if thread:
                self._unsure.discard(by)
                await self._settle(who, message.thread_id, thread["count"], thread["bytes"] + len(packed.body))
                return Finished(replace(message, created_at=stamp(thread["running"]["at"])), won=True)
            try:
                thread, entry = await self._entry(who, message.thread_id, message.id)
            except NotFound:
                self._unsure.discard(by)
                raise
            if (thread["running"] or {}).get("id") == message.id:
                await self._make_room(who, message.thread_id, len(packed.body))
                continue
            won = by in self._unsure and entry.get("by") == by
            self._unsure.discard(by)
            return Finished((await unpack([entry]))[0], won=won)
        raise contended(message.thread_id)

    async def take_orphans(self, worker: str) -> list[RunRecord]:
        """Besides, clear away what deleted threads have left."""
        now = await self.db.now()
        for emptied in await self.db.threads.many({"sweep_at": {"$lte": now}}, limit=_CLEARED_PER_SWEEP):
            await self._clear(emptied)
        expired = await self.db.runs.many({"lease": {"$lte": now}}, {"_id": 1})
        taken = [await self._readable(run["_id"], worker, now) for run in expired]
        return [record for record in taken if record is not None]

    async def take_orphan(self, who: Principal, run_id: str, worker: str) -> RunRecord | None:
        query = {"_id": run_id, "organization_id": who.organization_id}
        return await self._taken(query, worker, await self.db.now())

    async def find_record(self, who: Principal, run_id: str) -> RunRecord | None:
        run = await self.db.runs.one({"_id": run_id, "organization_id": who.organization_id})
        return (await self._record(run))[0] if run else None

    async def delete_record(self, who: Principal, run_id: str) -> None:
        await self.db.runs.remove({"_id": run_id, "organization_id": who.organization_id})

    # claiming

    async def _claimed(
        self,
        who: Principal,
        question: Message,
        asked: Packed,
        answer: Message,
        worker: str,
        idempotency: Idempotency | None,
    ) -> Posted | None:
        """Claim once; null if the thread has changed since it was looked at. Whatever is refused leaves no record."""
        thread_id = question.thread_id
        now = self.now()
        head, key = await self._head(who, thread_id, idempotency)
        if key and not key["free"]:
            return await self._replayed(who, thread_id, key)
        if head["archived"]:
            raise ThreadArchived(thread_id)
        if head["running"]:
            raise ThreadBusy(head["running"]["id"])
        if key:
            question = await self.get_message(who, thread_id, key["message_id"])
            answer = answer.with_run(in_reply_to=question.id)
        answered = await pack(answer)
        pushed = [answered] if key else [asked, answered]
        need = sum(len(packed.body) for packed in pushed)
        if head["bytes"] + need > DOCUMENT_BYTES:
            await self._make_room(who, thread_id, need)
            return None
        await self._hold(who, thread_id, answered, worker)
        new_key = self._new_key(who, thread_id, idempotency, question.id, answer.id, now)
        stored = await self.db.threads.change(
            {
                **guarded(who, head, need),
                **unused(head, new_key, key, now),
                "running": None,
                "fence": head["fence"],
            },
            writing(now, *pushing(pushed, new_key, answer.id, now)),
            {**HEAD, "pushed": 1},
        )
        if stored is None:
            await self.db.runs.remove({"_id": answer.id, "worker": worker})
            return None
        await self._settle(who, thread_id, stored["count"], stored["bytes"])
        if not key:
            question = replace(question, created_at=stamp(stored["pushed"][0]))
        answer = replace(answer, created_at=stamp(stored["pushed"][-1]))
        return Posted(question, answer, replayed=False, again=key is not None)

    async def _hold(self, who: Principal, thread_id: str, answered: Packed, worker: str) -> None:
        """Write the record. Raises: StoreUnavailable if a sweeper has taken it over."""
        fields = {
            "thread_id": thread_id,
            "organization_id": who.organization_id,
            "user_id": who.user_id,
            "cancelled": False,
            "partial": answered.body,
            "size": answered.size,
        }
        literal = {name: {"$literal": value} for name, value in fields.items()}
        run = {"_id": answered.id, "worker": worker}
        held = await self.db.runs.change(run, [{"$set": {**literal, "lease": self._lease}}], {"_id": 1}, upsert=True)
        if held is None:
            raise StoreUnavailable(f"the claim of run {answered.id} took too long")

    # taking over

    async def _readable(self, run_id: str, worker: str, now: datetime) -> RunRecord | None:
        try:
            return await self._taken({"_id": run_id}, worker, now)
        except StoreUnavailable:
            raise
        except Exception:
            logger.exception("The record of run %s cannot be read", run_id)
            return None

    async def _taken(self, query: Document, worker: str, now: datetime) -> RunRecord | None:
        """Take the run over if its lease has expired at `now`, by the database's clock."""
        changes = {"worker": {"$literal": worker}, "lease": self._lease}
        run = await self.db.runs.change({**query, "lease": {"$lte": now}}, [{"$set": changes}])
        if run is None:
            return None
        record, claimed = await self._record(run)
        if not claimed:
            await self.db.threads.change({"_id": run["thread_id"]}, {"$inc": {"fence": 1}}, {"_id": 1})
            record, _ = await self._record(run)
        return record

    async def _record(self, run: Document) -> tuple[RunRecord, bool]:
        """The record, its message dated as in the thread; and whether the thread has that message."""
        record = RunRecord(
            id=run["_id"],
            thread_id=run["thread_id"],
            organization_id=run["organization_id"],
            user_id=run["user_id"],
            worker=run["worker"],
            partial=unpack_body(run["partial"]),
            cancelled=run["cancelled"],
        )
        try:
            _, entry = await self._entry(record.who, record.thread_id, record.id)
        except NotFound:
            return record, False
        return replace(record, partial=replace(record.partial, created_at=stamp(entry["at"]))), True
