"""MongoDB: what people see and find in the database with nothing but a driver."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from msgspec.structs import replace
from pymongo import MongoClient

from agent_chat.stores.models import ToolCall
from agent_chat.stores.mongo.documents import EmbeddingLimits
from tests.support.mongo_commands import opened
from tests.support.samples import (
    WORKER,
    completed,
    finished_run,
    new_file,
    new_message,
    new_principal,
    new_thread,
    turn,
)

JSON = dict[str, Any]


async def test_people_find_messages_and_count_tool_calls_with_a_plain_driver(mongo_url: str) -> None:
    principal = new_principal()
    async with opened(mongo_url, limits=EmbeddingLimits(messages=4, slack=0)) as store:
        thread = new_thread(principal, metadata={"customer": {"tier": "gold", "since": 2019}})
        await store.create(principal, thread)
        await finished_run(store, principal, thread.id, "Where is berth 12?")
        file = new_file(thread.id, filename="berths.txt")
        question, answer = turn(thread.id, "Which berths are free?")
        question = replace(question, attachments=[file.attachment], metadata={"huge": 2**70})
        posted = await store.claim(principal, question, answer, worker=WORKER)
        now = question.created_at
        calls = [
            ToolCall(
                "find_berths", {"free": True, "limit": 2}, {"berths": [{"number": 12, "depth": 4.5}]}, None, now, now
            ),
            ToolCall("find_berths", {"free": False}, None, None, now, None),
        ]
        partial = replace(posted.answer or answer, content="Berth 12 is", tool_calls=calls)
        await store.checkpoint(principal, answer.id, worker=WORKER, partial=partial)
        with MongoClient[JSON](mongo_url) as client:
            database = client.get_default_database()
            assert [
                each["_id"] for each in database.threads.find({"messages.content": {"$regex": "^Which berths"}})
            ] == [thread.id]
            assert database.threads.count_documents({"metadata.customer.tier": "gold"}) == 1
            stored = database.threads.find_one({"_id": thread.id}) or {}
            assert isinstance(stored["created_at"], datetime)
            assert stored["messages"][2]["metadata_json"] == '{"huge":1180591620717411303424}'
            assert stored["messages"][2]["attachments"][0]["filename"] == "berths.txt"
            assert isinstance(stored["messages"][3]["created_at"], datetime)
            run = database.runs.find_one({"partial.content": "Berth 12 is"}) or {}
            assert run["partial"]["tool_calls"][0]["result"] == {"berths": [{"number": 12, "depth": 4.5}]}
            await store.finish(principal, completed(partial))
            count: list[JSON] = [
                {"$unwind": "$messages"},
                {"$unwind": "$messages.tool_calls"},
                {"$group": {"_id": "$messages.tool_calls.tool_name", "count": {"$sum": 1}}},
            ]
            assert list(database.threads.aggregate(count)) == [{"_id": "find_berths", "count": 2}]
            for _ in range(3):
                await store.append_message(principal, new_message(thread.id, role="system"))
            moved = database.older_messages.find_one({"content": {"$regex": "berth 12"}}) or {}
            assert (moved["thread_id"], moved["organization_id"]) == (thread.id, principal.organization_id)
            assert moved["content"] == "Where is berth 12?"
