"""Starting together: processes that find an empty database, and processes that share a port."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from pymongo import MongoClient

from tests.support.site import Site
from tests.support.viewers import DOORS, Viewer, viewing


async def test_processes_that_start_together_on_an_empty_database_make_one_of_everything(site: Site) -> None:
    servers = [await site.server(start=False, TEST_HOLDS=f"start-{n}") for n in range(4)]
    starting = asyncio.gather(*[server.start() for server in servers])
    for n in range(4):
        await site.gates.reached(f"start-{n}")
    for n in range(4):
        site.gates.release(f"start-{n}")
    await starting
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
    await site.server(CHAT_REUSE_PORT="1", PORT=a.url.rpartition(":")[2])

    async def post(n: int) -> tuple[dict[str, Any], str]:
        """Post on a connection of its own; the answer, and which process served that connection."""
        async with httpx.AsyncClient(base_url=a.url, headers=a.http.headers, timeout=30, verify=False) as client:
            answer = await client.post(f"{threads[n]}/messages", json={"content": f"count 20 1\nsay {n}"})
            assert answer.status_code == 201, answer.text
            metrics = (await client.get("/metrics")).text
            began = next(line for line in metrics.splitlines() if line.startswith("process_start_time_seconds"))
            return answer.json(), began

    threads = [await a.scripted_thread() for _ in range(20)]
    viewers = [Viewer([a], threads[0], door) for door in DOORS for _ in range(5)]
    async with viewing(*viewers):
        answers = await asyncio.gather(*[post(n) for n in range(len(threads))])
        assert (await site.over(threads[0], *viewers))[-1] == answers[0][0]
    assert len({process for _, process in answers}) == 2, "both serve"
    for thread, (answer, _) in zip(threads, answers, strict=True):
        assert (await a.get(f"{thread}/messages/{answer['id']}")) == answer
