"""MongoDB: a database that version 0.1.0 wrote loses nothing, whoever migrates it and wherever a process dies."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from pymongo import MongoClient

from agent_chat.stores.errors import SchemaTooNew, StoreUnavailable
from agent_chat.stores.models import Idempotency, Principal, utcnow
from agent_chat.stores.mongo import schema
from agent_chat.stores.mongo.schema import MIGRATIONS, migrate
from agent_chat.stores.mongo.store import MotorCollections, open_mongo
from tests.support.client import Client
from tests.support.earlier_data import load_documents, recorded
from tests.support.mongo_commands import Commands, every_message, opened, watch
from tests.support.site import Site

JSON = dict[str, Any]


@pytest.fixture
def recording(mongo_url: str) -> JSON:
    """What the API of 0.1.0 returned of the data that are in the database now."""
    load_documents("0.1.0", mongo_url)
    return recorded("0.1.0", "mongodb")


async def read_messages(client: Client, thread: str) -> list[JSON]:
    messages: list[JSON] = await client.get(f"{thread}/messages", limit=100)
    while older := await client.get(f"{thread}/messages", limit=100, before=messages[0]["id"]) if messages else []:
        messages = older + messages
    return messages


async def test_two_servers_that_start_together_on_data_of_0_1_0_migrate_it_once(site: Site, recording: JSON) -> None:
    a, b = await site.server(start=False), await site.server(start=False)
    for server in (a, b):
        server.http.headers["Authorization"] = f"Bearer {recording['key']}"
    await asyncio.gather(a.start(), b.start())
    agents = {agent["id"]: agent for agent in await b.get("/api/v1/agents")}
    assert {agent["id"]: agents.get(agent["id"]) for agent in recording["agents"]} == {
        agent["id"]: agent for agent in recording["agents"]
    }
    for name, earlier in recording["threads"].items():
        thread = f"/api/v1/chat/default/threads/{earlier['thread']['id']}"
        messages = await read_messages(b, thread)
        if name != "running":
            assert (await b.get(thread)) | {"messages": []} == earlier["thread"] | {"messages": []}
            assert messages == earlier["messages"]
        else:
            assert messages[0] == earlier["messages"][0]
            assert messages[1]["content"].startswith(recording["running"]["content"])
            assert messages[1]["metadata"]["run"]["status"] == "failed"
    listed = await b.get(f"/api/v1/chat/{recording['list'][0]['agent_id']}/threads", limit=50, message_limit=10)
    assert [
        {**thread, "messages": [message["id"] for message in thread["messages"]]} for thread in listed
    ] == recording["list"]
    for deleted in recording["deleted"]:
        assert (await b.http.get(f"/api/v1/chat/default/threads/{deleted}")).status_code == 404
    with MongoClient[JSON](site.mongo_url) as client:
        database = client.get_default_database()
        assert database.meta.find_one({"_id": "schema"}) == {"_id": "schema", "version": len(MIGRATIONS)}
        assert "pages" not in database.list_collection_names()
        assert database.older_messages.count_documents({}) == 153


async def test_a_process_that_dies_at_any_command_of_a_migration_loses_nothing(
    mongo_url: str, recording: JSON, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "LOCK_SECONDS", 0.0)
    dies_at, done = 1, False
    while not done:
        commands = Commands()
        commands.dies_at, commands.response_lost = dies_at, dies_at % 2 == 0
        db = MotorCollections(mongo_url)
        watch(db, commands)
        try:
            await migrate(db, "chat")
            done = True
        except StoreUnavailable:
            dies_at += 1
        finally:
            await db.close()
    assert dies_at > 10
    await check_stored(mongo_url, recording)


async def check_stored(mongo_url: str, recording: JSON) -> None:
    """The store returns what the API of 0.1.0 returned, and each message is stored once."""
    at = utcnow()
    async with opened(mongo_url) as store:
        for earlier in recording["threads"].values():
            thread = earlier["thread"]
            principal = Principal(thread["organization_id"], thread["user_id"])
            messages = await every_message(store, principal, thread["id"], 50)
            assert [message.id for message in messages] == [message["id"] for message in earlier["messages"]]
            for message, before in zip(messages, earlier["messages"], strict=True):
                assert (message.content, message.metadata) == (before["content"], before["metadata"]) or (
                    message.in_progress
                )
            stored = await store.db.threads.find_one({"_id": thread["id"]}) or {}
            moved = await store.db.older_messages.find({"thread_id": thread["id"]})
            places = [each["n"] for each in (*moved, *stored["messages"])]
            assert sorted(places) == list(range(stored["total"]))
            assert {key["at"] < at.replace(tzinfo=None) for key in stored["keys"]} <= {True}


async def test_keys_of_0_1_0_still_count(mongo_url: str, recording: JSON) -> None:
    thread = recording["threads"]["long"]["thread"]
    principal = Principal(thread["organization_id"], thread["user_id"])
    with MongoClient[JSON](mongo_url) as client:
        database = client.get_default_database()
        keys = [key for each in (*database.pages.find(), *database.threads.find()) for key in each.get("keys", [])]
        created = database.threads.find_one({"key_id": {"$exists": True}}) or {}
        at = utcnow() - timedelta(milliseconds=utcnow().timestamp() * 1000 - max(key["at"] for key in keys))
    by_message = {key["message_id"]: key for key in keys}
    now = lambda: at  # noqa: E731
    db = MotorCollections(mongo_url)
    await db.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MotorCollections, "now", lambda self: _constant(at.replace(tzinfo=None)))
        store = await open_mongo(mongo_url, clock=now)
    try:
        content = {message["content"]: message for message in recording["threads"]["long"]["messages"]}
        for key, text in recording["keys"].items():
            used = by_message[content[text]["id"]]
            posted = await store.replay(principal, thread["id"], Idempotency(key, used["fingerprint"]))
            assert posted is not None
            assert (posted.message.content, posted.replayed) == (text, True)
        assert created["title"] == "Keyed"
    finally:
        await store.close()


async def _constant(value: Any) -> Any:
    return value


async def test_the_lock_of_a_dead_process_expires(mongo_url: str, recording: JSON) -> None:
    seconds = 1.0
    with MongoClient[JSON](mongo_url) as client:
        meta = client.get_default_database().meta
        now = client.admin.command("hello")["localTime"]
        meta.insert_one({"_id": "migration", "holder": "dead", "until": now + timedelta(seconds=seconds)})
        began = utcnow()
        store = await open_mongo(mongo_url)
        await store.close()
        assert utcnow() - began > timedelta(seconds=seconds * 0.8)
        assert [each["_id"] for each in meta.find()] == ["schema"]
    await check_stored(mongo_url, recording)


async def test_data_of_a_later_version_are_refused(mongo_url: str) -> None:
    with MongoClient[JSON](mongo_url) as client:
        client.get_default_database().meta.insert_one({"_id": "schema", "version": 1000})
        with pytest.raises(SchemaTooNew, match="schema version 1000; this one knows versions up to"):
            await open_mongo(mongo_url)
        assert client.get_default_database().list_collection_names() == ["meta"]
