"""Starting together: processes that find an empty database, and processes that share a port."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from pymongo import MongoClient

from tests.processes.site import Site
from tests.processes.viewers import DOORS, Viewer, viewing


async def test_processes_that_start_together_on_an_empty_database_make_one_of_everything(site: Site) -> None:
    servers = [await site.server(start=False) for _ in range(4)]
    await asyncio.gather(*[server.start() for server in servers])
    with MongoClient[dict[str, Any]](site.mongo_url) as client:
        database = client.get_default_database()
        found = {name: list(database[name].find({})) for name in ("organizations", "users", "keys", "agents")}
    assert {name: len(documents) for name, documents in found.items() if name != "agents"} == {
        "organizations": 1,
        "users": 1,
        "keys": 1,
    }
    (agent,) = [document for document in found["agents"] if not document["deleted"]]
    assert found["organizations"][0]["default_agent_id"] == agent["_id"]
    for server in servers:
        (told,) = await server.get("/api/v1/agents")
        assert (told["id"], told["is_default"]) == (agent["_id"], True)


async def test_two_processes_on_one_port_serve_one_thread(site: Site) -> None:
    a = await site.server(CHAT_REUSE_PORT="1")
    b = await site.server(CHAT_REUSE_PORT="1", PORT=a.url.rpartition(":")[2])

    async def connection() -> httpx.Response:
        """Ask on a connection of its own who answers."""
        async with httpx.AsyncClient(base_url=a.url, headers=a.http.headers) as client:
            return await client.get("/metrics")

    async def post(n: int) -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=a.url, headers=a.http.headers, timeout=30) as client:
            answer = await client.post(f"{threads[n]}/messages", json={"content": f"count 20 1\nsay {n}"})
            assert answer.status_code == 201, answer.text
            return dict(answer.json())

    threads = [await a.scripted_thread() for _ in range(10)]
    viewers = [Viewer([a], thread, door) for thread in threads for door in DOORS]
    async with viewing(*viewers):
        answers = await asyncio.gather(*[post(n) for n in range(len(threads))])
        for n, thread in enumerate(threads):
            assert (await site.over(thread, *viewers[2 * n : 2 * n + 2]))[-1] == answers[n]
    b.alive and await b.kill()
    assert answers
