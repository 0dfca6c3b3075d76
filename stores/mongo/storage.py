"""The Storage contract on MongoDB.

The bytes of an organization are {_id, stored, measure_at}. A removal is {_id, organization_id, thread_id,
attachment_id, size, due, taken}.
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
from agent_chat.stores.mongo.database import MongoBase
from agent_chat.stores.mongo.native import Document
from agent_chat.stores.rules import granted_bytes, removal_of_attachment

_FILE: Document = {"$add": ["$size", {"$ifNull": ["$text_bytes", 0]}]}
THREAD_STORED: Document = {"$add": [{"$ifNull": ["$bytes", 0]}, {"$ifNull": ["$moved_bytes", 0]}]}


def _after(seconds: float) -> Document:
    return {"$add": ["$$NOW", round(seconds * 1000)]}


class MongoStorage(MongoBase):
    """Counted bytes and blobs to remove, in MongoDB."""

    async def reserve_bytes(self, organization_id: str, need: int, want: int, limit: int) -> int:
        """The update repeats `rules.granted_bytes`."""
        if need > limit:
            return 0
        fits = {"_id": organization_id, "stored": {"$lte": limit - need}}
        more = [{"$set": {"stored": {"$min": [limit, {"$add": ["$stored", want]}]}}}]
        while True:
            before = await self.db.storage.update_one(fits, more, {"stored": 1}, before=True)
            if before is not None:
                return granted_bytes(int(before["stored"]), need, want, limit)
            record = await self.db.storage.find_one({"_id": organization_id}, {"stored": 1})
            if record is None:
                await self.db.storage.insert({"_id": organization_id, "stored": 0, "measure_at": await self.db.now()})
            elif record["stored"] + need > limit:
                return 0

    async def release_bytes(self, organization_id: str, count: int) -> None:
        await self._add_bytes(organization_id, -count)

    async def _add_bytes(self, organization_id: str, count: int) -> None:
        changes = {"stored": {"$max": [0, {"$add": ["$stored", count]}]}}
        await self.db.storage.update_one({"_id": organization_id}, [{"$set": changes}], {"_id": 1})

    async def stored_bytes(self, organization_id: str) -> int:
        record = await self.db.storage.find_one({"_id": organization_id}, {"stored": 1})
        return int(record["stored"]) if record else 0

    async def correct_bytes(self) -> None:
        due = {"measure_at": {"$lte": await self.db.now()}}
        for found in await self.db.storage.find(due, {"_id": 1}, limit=MEASURED_AT_ONCE):
            due_again = [{"$set": {"measure_at": _after(MEASURE_SECONDS)}}]
            record = await self.db.storage.update_one({**due, "_id": found["_id"]}, due_again, {"stored": 1})
            if record is not None:  # else another process measures it
                measured = await self._measure(record["_id"])
                await self._add_bytes(record["_id"], measured - int(record["stored"]))

    async def _measure(self, organization_id: str) -> int:
        of_organization = {"organization_id": organization_id}
        return (
            await self.db.threads.sum_up(of_organization, THREAD_STORED)
            + await self.db.attachments.sum_up(of_organization, _FILE)
            + await self.db.agents.sum_up(of_organization, {"$bsonSize": "$$ROOT"})
            + await self.db.removals.sum_up(of_organization, "$size")
        )

    async def _files_bytes(self, thread_id: str) -> int:
        return await self.db.attachments.sum_up({"thread_id": thread_id}, _FILE)

    async def begin_upload(self, principal: Principal, thread_id: str, attachment_id: str, size: int) -> None:
        await self._add_removal(removal_of_attachment(principal, thread_id, attachment_id, size), 2 * UPLOAD_SECONDS)

    async def _add_removal(self, removal: BlobRemoval, seconds: float | None = None) -> None:
        """Store the removal, due after `seconds`; None: REMOVAL_SECONDS."""
        fields = {
            "organization_id": removal.organization_id,
            "thread_id": removal.thread_id,
            "attachment_id": removal.attachment_id,
            "size": removal.size,
            "taken": False,
        }
        literal = {name: {"$literal": value} for name, value in fields.items()}
        due = {"due": _after(REMOVAL_SECONDS if seconds is None else seconds)}
        await self.db.removals.update_one({"_id": removal.id}, [{"$set": {**literal, **due}}], {"_id": 1}, upsert=True)

    async def _cancel_removal(self, removal_id: str) -> bool:
        """Delete the removal unless a sweeper has taken it; True if it does not exist now."""
        await self.db.removals.delete_one({"_id": removal_id, "taken": False})
        return await self.db.removals.find_one({"_id": removal_id}, {"_id": 1}) is None

    async def take_removals(self) -> list[BlobRemoval]:
        due = {"due": {"$lte": await self.db.now()}}
        taken = [
            await self._take_removal({**due, "_id": found["_id"]})
            for found in await self.db.removals.find(due, {"_id": 1}, limit=REMOVALS_TAKEN)
        ]
        return [removal for removal in taken if removal is not None]

    async def _take_removal(self, query: Document) -> BlobRemoval | None:
        """Take the removal; None if another process has it, or if its blobs are still wanted."""
        # taken first, checked second: `add_file` stores the record first and checks `taken` second
        taken = [{"$set": {"taken": True, "due": _after(REMOVAL_SECONDS)}}]
        found = await self.db.removals.update_one(query, taken)
        if found is None:
            return None
        if found["attachment_id"] is None:
            thread = {"_id": found["thread_id"], "organization_id": found["organization_id"]}
            is_wanted = await self.db.threads.find_one(thread, {"_id": 1}) is not None
        else:
            is_wanted = await self.db.attachments.find_one({"_id": found["attachment_id"]}, {"_id": 1}) is not None
        if is_wanted:
            await self.db.removals.delete_one({"_id": found["_id"]})
            return None
        fields = (found["organization_id"], found["thread_id"], found["attachment_id"], found["size"])
        return BlobRemoval(found["_id"], *fields)

    async def finish_removal(self, removal_id: str) -> None:
        found = await self.db.removals.find_one({"_id": removal_id}, {"organization_id": 1, "size": 1})
        if found:
            await self.db.removals.delete_one({"_id": removal_id})
            await self._add_bytes(found["organization_id"], -int(found["size"]))
