"""The Storage contract on MongoDB.

An organization's number is {_id, stored, measure_at}. A removal is {_id, organization_id, thread_id, attachment_id,
size, due, taken}.
"""

from __future__ import annotations

from agent_chat.stores.contracts.storage import (
    MEASURE_SECONDS,
    MEASURED_AT_ONCE,
    REMOVAL_SECONDS,
    REMOVALS_TAKEN,
    UPLOAD_SECONDS,
    BlobRemoval,
)
from agent_chat.stores.models import Principal
from agent_chat.stores.mongo.database import Database
from agent_chat.stores.mongo.documents import Document

_FILE: Document = {"$add": ["$size", {"$ifNull": ["$text_bytes", 0]}]}
THREAD_STORED: Document = {"$add": [{"$ifNull": ["$bytes", 0]}, {"$ifNull": ["$paged_bytes", 0]}]}


def _after(seconds: float) -> Document:
    return {"$add": ["$$NOW", round(seconds * 1000)]}


class MongoStorage(Database):
    async def reserve_bytes(self, organization_id: str, need: int, want: int, limit: int) -> int:
        if need > limit:
            return 0
        fits = {"_id": organization_id, "stored": {"$lte": limit - need}}
        more = [{"$set": {"stored": {"$min": [limit, {"$add": ["$stored", want]}]}}}]
        while True:
            before = await self.db.storage.change(fits, more, {"stored": 1}, before=True)
            if before is not None:
                return min(want, limit - int(before["stored"]))
            record = await self.db.storage.one({"_id": organization_id}, {"stored": 1})
            if record is None:
                await self.db.storage.insert({"_id": organization_id, "stored": 0, "measure_at": await self.db.now()})
            elif record["stored"] + need > limit:
                return 0

    async def release_bytes(self, organization_id: str, count: int) -> None:
        await self._add_bytes(organization_id, -count)

    async def _add_bytes(self, organization_id: str, count: int) -> None:
        changes = {"stored": {"$max": [0, {"$add": ["$stored", count]}]}}
        await self.db.storage.change({"_id": organization_id}, [{"$set": changes}], {"_id": 1})

    async def stored_bytes(self, organization_id: str) -> int:
        record = await self.db.storage.one({"_id": organization_id}, {"stored": 1})
        return int(record["stored"]) if record else 0

    async def correct_bytes(self) -> None:
        due = {"measure_at": {"$lte": await self.db.now()}}
        for found in await self.db.storage.many(due, {"_id": 1}, limit=MEASURED_AT_ONCE):
            later = [{"$set": {"measure_at": _after(MEASURE_SECONDS)}}]
            record = await self.db.storage.change({**due, "_id": found["_id"]}, later, {"stored": 1})
            if record is not None:  # no other process measures it
                measured = await self._measured(record["_id"])
                await self._add_bytes(record["_id"], measured - int(record["stored"]))

    async def _measured(self, organization_id: str) -> int:
        of_organization = {"organization_id": organization_id}
        return (
            await self.db.threads.total(of_organization, THREAD_STORED)
            + await self.db.attachments.total(of_organization, _FILE)
            + await self.db.agents.total(of_organization, {"$bsonSize": "$$ROOT"})
            + await self.db.removals.total(of_organization, "$size")
        )

    async def _files_bytes(self, thread_id: str) -> int:
        return await self.db.attachments.total({"thread_id": thread_id}, _FILE)

    async def begin_upload(self, who: Principal, thread_id: str, attachment_id: str, size: int) -> None:
        removal = BlobRemoval(attachment_id, who.organization_id, thread_id, attachment_id, size)
        await self._add_removal(removal, 2 * UPLOAD_SECONDS)

    async def _add_removal(self, removal: BlobRemoval, seconds: float) -> None:
        fields = {
            "organization_id": removal.organization_id,
            "thread_id": removal.thread_id,
            "attachment_id": removal.attachment_id,
            "size": removal.size,
            "taken": False,
        }
        literal = {name: {"$literal": value} for name, value in fields.items()}
        due = {"due": _after(seconds)}
        await self.db.removals.change({"_id": removal.id}, [{"$set": {**literal, **due}}], {"_id": 1}, upsert=True)

    async def _cancel_removal(self, removal_id: str) -> bool:
        """Drop it, unless a sweeper has taken it; true if it is not there now."""
        await self.db.removals.remove({"_id": removal_id, "taken": False})
        return await self.db.removals.one({"_id": removal_id}, {"_id": 1}) is None

    async def take_removals(self) -> list[BlobRemoval]:
        due = {"due": {"$lte": await self.db.now()}}
        taken = [
            await self._taken_removal({**due, "_id": found["_id"]})
            for found in await self.db.removals.many(due, {"_id": 1}, limit=REMOVALS_TAKEN)
        ]
        return [removal for removal in taken if removal is not None]

    async def _taken_removal(self, query: Document) -> BlobRemoval | None:
        """Take it, before looking whether its blobs are still wanted: `add_file` looks in the other order."""
        later = [{"$set": {"taken": True, "due": _after(REMOVAL_SECONDS)}}]
        found = await self.db.removals.change(query, later)
        if found is None:
            return None
        if found["attachment_id"] is None:
            wanted = {"_id": found["thread_id"], "organization_id": found["organization_id"]}
            is_wanted = await self.db.threads.one(wanted, {"_id": 1}) is not None
        else:
            is_wanted = await self.db.attachments.one({"_id": found["attachment_id"]}, {"_id": 1}) is not None
        if is_wanted:
            await self.db.removals.remove({"_id": found["_id"]})
            return None
        fields = (found["organization_id"], found["thread_id"], found["attachment_id"], found["size"])
        return BlobRemoval(found["_id"], *fields)

    async def finish_removal(self, removal_id: str) -> None:
        found = await self.db.removals.one({"_id": removal_id}, {"organization_id": 1, "size": 1})
        if found:
            await self.db.removals.remove({"_id": removal_id})
            await self._add_bytes(found["organization_id"], -int(found["size"]))
