"""The usage contract on MongoDB.

A row is a document of `usage` with the fields of a UsageRow, `runs` and `rolled_up`. A run's row has the run's id and
`rolled_up` false. Rolling up replaces the rows of one day without a transaction: first the sums are inserted, then the
mark in `storage` moves past the day, then the rows are deleted. Before the mark only sums count, from it on only the
rows of runs. Sums are inserted and never changed, since a second process may find some rows deleted.
"""

from __future__ import annotations

import hashlib
from datetime import date, timedelta

import msgspec

from agent_chat.stores.contracts.usage import COUNTS, UsageGroup, UsageRow, UsageTotal
from agent_chat.stores.models import Principal
from agent_chat.stores.mongo.database import MongoBase
from agent_chat.stores.mongo.native import Document

_FIELDS: dict[UsageGroup, str] = {"day": "day", "agent": "agent_id", "model": "model", "user": "user_id"}
_SUMS: Document = {name: {"$sum": f"${name}"} for name in COUNTS}
_GROUP = ("organization_id", "user_id", "agent_id", "model", "day", "status")
_MARK = {"_id": "usage"}


class MongoUsage(MongoBase):
    """Usage rows in MongoDB."""

    async def _insert_usage(self, row: UsageRow) -> None:
        """Store the row of a run, unless it is there (I25)."""
        fields = msgspec.to_builtins(row)
        await self.db.usage.insert({"_id": fields.pop("id"), **fields, "runs": 1, "rolled_up": False})

    async def sum_usage(
        self, principal: Principal, *, first_day: str, last_day: str, group_by: UsageGroup, limit: int, offset: int
    ) -> list[UsageTotal]:
        """Repeated if a day was rolled up meanwhile."""
        while True:
            mark = await self._read_mark()
            counted = [{"rolled_up": False, "day": {"$gte": mark}}, {"rolled_up": True, "day": {"$lt": mark}}]
            days = {"$gte": first_day, "$lte": last_day}
            totals = await self.db.usage.aggregate(
                [
                    {"$match": {"organization_id": principal.organization_id, "day": days, "$or": counted}},
                    {"$group": {"_id": f"${_FIELDS[group_by]}", **_SUMS}},
                    {"$sort": {"_id": 1}},
                    {"$skip": offset},
                    {"$limit": limit},
                ]
            )
            if await self._read_mark() == mark:
                return [UsageTotal(each["_id"], *(int(each[name]) for name in COUNTS)) for each in totals]

    async def roll_up_usage(self, before: str) -> bool:
        old: Document = {"rolled_up": False, "day": {"$lt": before}}
        found = await self.db.usage.find(old, {"day": 1}, sort=[("day", 1)], limit=1)
        if not found:
            return False
        day = str(found[0]["day"])
        mark = await self._read_mark()
        if day >= mark:
            mark = (date.fromisoformat(day) + timedelta(days=1)).isoformat()
            group = {"_id": {name: f"${name}" for name in _GROUP}, **_SUMS}
            for total in await self.db.usage.aggregate(
                [{"$match": {"rolled_up": False, "day": day}}, {"$group": group}]
            ):
                fields = total.pop("_id")
                name = hashlib.sha256(msgspec.json.encode([fields.get(part) for part in _GROUP])).hexdigest()
                await self.db.usage.insert(
                    {"_id": f"{day}/{name}", "model": None, **fields, **total, "rolled_up": True}
                )
            moved = {"rolled_before": {"$max": ["$rolled_before", mark]}}
            await self.db.storage.update_one(_MARK, [{"$set": moved}], {"_id": 1}, upsert=True)
        await self.db.usage.delete_many({"rolled_up": False, "day": {"$lt": mark}})
        return True

    async def _read_mark(self) -> str:
        found = await self.db.storage.find_one(_MARK, {"rolled_before": 1})
        return str(found["rolled_before"]) if found else ""
