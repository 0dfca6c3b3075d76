"""/api/v1/agents, to the letter."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.servers import Live
from tests.support.shapes import is_agent, is_invalid, is_problem, is_thread

AGENTS = "/api/v1/agents"
NOBODY = "00000000-0000-4000-8000-000000000000"


async def without_agents(live: Live) -> None:
    for agent in await live.get(AGENTS):
        assert (await live.http.delete(f"{AGENTS}/{agent['id']}")).status_code == 204


async def test_an_agent_is_created_with_all_it_was_given_and_read_back(live: Live) -> None:
    given: dict[str, Any] = {
        "name": "Ada",
        "kind": "scripted",
        "model": "some-model",
        "instructions": "Be brief.",
        "mcp_servers": ["demo"],
        "tools": ["calculate"],
        "max_tokens": 100,
        "is_default": False,
        "metadata": {"team": {"run": [1, 2.5, None, "ü", 10**18]}},
    }
    answer = await live.http.post(AGENTS, json=given)
    assert answer.status_code == 201
    agent = is_agent(answer.json())
    assert given.items() <= agent.items()
    assert answer.headers["location"] == f"{AGENTS}/{agent['id']}"
    assert await live.get(answer.headers["location"]) == agent
    assert agent in await live.get(AGENTS)


async def test_an_agent_needs_only_a_name(live: Live) -> None:
    agent = is_agent((await live.http.post(AGENTS, json={"name": "Ada"})).json())
    assert agent["kind"] == "demo"
    assert (agent["model"], agent["instructions"], agent["mcp_servers"]) == (None, "", [])
    assert (agent["tools"], agent["max_tokens"], agent["metadata"]) == (None, None, {})


async def test_a_new_organization_has_one_agent_with_all_configured_servers(live: Live) -> None:
    [agent] = await live.get(AGENTS)
    assert is_agent(agent)["is_default"]
    assert agent["mcp_servers"] == ["demo"]
    assert await live.get(f"{AGENTS}/default") == agent


async def test_agents_are_listed_oldest_first(live: Live) -> None:
    names = [(await live.agent(name=name))["name"] for name in ("c", "a", "b")]
    assert [is_agent(agent)["name"] for agent in await live.get(AGENTS)][1:] == names


async def test_a_patch_changes_what_is_given_and_nothing_else(live: Live) -> None:
    agent = await live.agent(model="m", max_tokens=5)
    answer = await live.http.patch(f"{AGENTS}/{agent['id']}", json={"name": "New", "model": None})
    assert answer.status_code == 200
    changed = is_agent(answer.json())
    assert changed == {**agent, "name": "New", "model": None, "updated_at": changed["updated_at"]}
    assert changed["updated_at"] >= agent["updated_at"]
    assert await live.get(f"{AGENTS}/{agent['id']}") == changed


async def test_the_first_agent_is_the_default_until_another_becomes_it(live: Live) -> None:
    await without_agents(live)
    first = await live.agent(name="first")
    second = await live.agent(name="second")
    assert (first["is_default"], second["is_default"]) == (True, False)
    third = await live.agent(name="third", is_default=True)
    assert [agent["is_default"] for agent in await live.get(AGENTS)] == [False, False, True]
    patched = await live.http.patch(f"{AGENTS}/{second['id']}", json={"is_default": True})
    assert patched.json()["is_default"]
    assert [agent["is_default"] for agent in await live.get(AGENTS)] == [False, True, False]
    assert (await live.get(f"{AGENTS}/default"))["id"] == second["id"]
    renamed = await live.http.patch(f"{AGENTS}/{third['id']}", json={"name": "3"})
    assert not renamed.json()["is_default"]


async def test_without_agents_the_error_explains_how_to_create_one(live: Live) -> None:
    await without_agents(live)
    assert await live.get(AGENTS) == []
    for answer in (
        await live.http.get(f"{AGENTS}/default"),
        await live.http.post("/api/v1/chat/default/threads"),
        await live.http.post(f"/api/v1/chat/{NOBODY}/threads"),
        await live.http.get("/api/v1/chat/default/threads"),
    ):
        assert "POST /api/v1/agents" in is_problem(answer, 404, "agent_not_found")["detail"]


async def test_after_the_default_is_deleted_the_oldest_remaining_agent_is_the_default(live: Live) -> None:
    oldest, newest = await live.agent(), await live.agent()
    await live.http.delete(f"{AGENTS}/default")
    defaults = [(agent["id"], agent["is_default"]) for agent in await live.get(AGENTS)]
    assert defaults == [(oldest["id"], True), (newest["id"], False)]
    for agent in (oldest, newest):
        await live.http.delete(f"{AGENTS}/{agent['id']}")
    is_problem(await live.http.get(f"{AGENTS}/default"), 404, "agent_not_found")
    assert (await live.agent())["is_default"]


async def test_a_deleted_agent_is_not_found_and_its_threads_stay_readable(live: Live) -> None:
    thread = await live.scripted_thread()
    agent_id = thread.split("/")[4]
    await live.post(thread, "say hello")
    before = await live.get(thread)
    deleted = await live.http.delete(f"{AGENTS}/{agent_id}")
    assert (deleted.status_code, deleted.content) == (204, b"")
    is_problem(await live.http.get(f"{AGENTS}/{agent_id}"), 404, "agent_not_found")
    is_problem(await live.http.patch(f"{AGENTS}/{agent_id}", json={"name": "x"}), 404, "agent_not_found")
    is_problem(await live.http.delete(f"{AGENTS}/{agent_id}"), 404, "agent_not_found")
    is_problem(await live.http.post(f"/api/v1/chat/{agent_id}/threads"), 404, "agent_not_found")
    assert await live.get(thread) == before
    assert await live.get(f"/api/v1/chat/{agent_id}/threads") == [before]
    assert await live.get(f"{thread}/messages") == before["messages"]
    assert is_thread((await live.http.patch(thread, json={"title": "Kept"})).json())["title"] == "Kept"


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
async def test_a_deleted_agents_thread_answers_a_post_with_409(live: Live, role: str) -> None:
    thread = await live.scripted_thread()
    await live.http.delete(f"{AGENTS}/{thread.split('/')[4]}")
    answer = await live.http.post(f"{thread}/messages", json={"content": "x", "role": role})
    is_problem(answer, 409, "agent_deleted")
    assert await live.get(f"{thread}/messages") == []


async def test_an_unknown_kind_or_server_is_refused_by_name(live: Live) -> None:
    for fields, field in (({"kind": "nothing"}, "kind"), ({"mcp_servers": ["demo", "nothing"]}, "mcp_servers[1]")):
        assert "nothing" in is_invalid(await live.http.post(AGENTS, json={"name": "x", **fields}), field)["detail"]
        is_invalid(await live.http.patch(f"{AGENTS}/default", json=fields), field)


async def test_there_is_no_agent_of_an_unknown_id(live: Live) -> None:
    for path in (f"{AGENTS}/{NOBODY}", f"{AGENTS}/nonsense"):
        is_problem(await live.http.get(path), 404, "agent_not_found")
        is_problem(await live.http.patch(path, json={}), 404, "agent_not_found")
        is_problem(await live.http.delete(path), 404, "agent_not_found")
