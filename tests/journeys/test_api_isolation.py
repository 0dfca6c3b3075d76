"""Two organizations never see each other's objects: every method of every route, with every way to name the object.

A route that is new fails here until it has a case.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest
from starlette.routing import Route, WebSocketRoute
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from agent_chat.server.app import ROUTES
from agent_chat.server.limits import Limits
from agent_chat.server.organizations import member
from agent_chat.server.timing import Timing
from agent_chat.stores.contracts import EventLog, Store
from agent_chat.stores.open import Where, open_backends
from tests.support.client import KEY, Client
from tests.support.servers import Live, live_server
from tests.support.shapes import is_invalid, is_problem
from tests.support.sockets import socket

AGENTS = "/api/v1/agents"
THREADS = "/api/v1/chat/{agent_id}/threads"
THREAD = THREADS + "/{thread_id}"
MESSAGES = THREAD + "/messages"
GONE = "/api/v1/chat/conversations"
STRANGERS_KEY = "test-key-of-the-second-organization"
COLLEAGUES_KEY = "test-key-of-a-second-user"
IDEMPOTENT = {"Idempotency-Key": "the-first-organizations-key"}


class Case(msgspec.Struct, frozen=True):
    """What another organization sends, and what it gets: a problem's code, `own` (its own objects), or `gone`."""

    expected: str
    body: dict[str, Any] | None = None
    file: bool = False


NOT_FOUND = Case("thread_not_found")
CASES: dict[tuple[str, str], Case] = {
    ("GET", AGENTS): Case("own"),
    ("POST", AGENTS): Case("own", {"name": "Mine", "is_default": True}),
    ("GET", AGENTS + "/{agent_id}"): Case("agent_not_found"),
    ("PATCH", AGENTS + "/{agent_id}"): Case("agent_not_found", {"name": "Mine", "is_default": True}),
    ("DELETE", AGENTS + "/{agent_id}"): Case("agent_not_found"),
    ("GET", "/api/v1/usage"): Case("own"),
    ("GET", THREADS): Case("agent_not_found"),
    ("POST", THREADS): Case("agent_not_found", {"title": "A's"}),
    ("GET", THREAD): NOT_FOUND,
    ("PATCH", THREAD): Case("thread_not_found", {"title": "Mine", "archived": True}),
    ("DELETE", THREAD): NOT_FOUND,
    ("POST", THREAD + "/generate_title"): NOT_FOUND,
    ("GET", MESSAGES): NOT_FOUND,
    ("POST", MESSAGES): Case("thread_not_found", {"content": "say hello"}),
    ("GET", MESSAGES + "/{message_id}"): NOT_FOUND,
    ("POST", MESSAGES + "/{message_id}/cancel"): NOT_FOUND,
    ("POST", THREAD + "/attachments"): Case("thread_not_found", file=True),
    ("GET", THREAD + "/attachments/{attachment_id}"): NOT_FOUND,
    ("GET", THREAD + "/events"): NOT_FOUND,
    ("WEBSOCKET", THREAD + "/ws"): NOT_FOUND,
} | {
    (method, path): Case("gone")
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
    for path in (GONE, GONE + "/{rest:path}")
}


def routes() -> list[tuple[str, str]]:
    """Every method and path under /api."""
    table = []
    for route in ROUTES:
        if isinstance(route, Route) and route.path.startswith("/api/"):
            table += [(method, route.path) for method in sorted(route.methods or ()) if method != "HEAD"]
        elif isinstance(route, WebSocketRoute):
            table.append(("WEBSOCKET", route.path))
    return table


LIMITS = Limits(auth_failures=10**6)
TIMING = Timing(key_lookup=0.0)


class World(msgspec.Struct, frozen=True):
    """A thread of the first organization, with a finished run and one in progress, and a client of another one."""

    live: Live
    stranger: Client
    colleague: Client
    store: Store
    log: EventLog
    thread: str
    ids: dict[str, str]

    async def everything(self) -> list[object]:
        """All that the first organization has, and how far its thread's log has come."""
        live = self.live
        agents = await live.get(AGENTS)
        threads = [await live.get(self.thread)]
        for agent in agents:
            threads += await live.get(f"/api/v1/chat/{agent['id']}/threads")
        for message in [message for thread in threads for message in thread["messages"]]:
            if message["metadata"].get("run", {}).get("status") == "in_progress":
                message["content"] = "(as far as the last checkpoint)"
        return [agents, threads, await self.log.tail(self.ids["thread_id"])]

    def paths(self, path: str) -> list[str]:
        """The path with the first organization's ids; where a thread is named, under each agent that one may try."""
        agents = [self.ids["agent_id"]]
        if "{thread_id}" in path:
            agents += ["default", self.ids["strangers_agent_id"]]
        path = path.replace("{rest:path}", self.ids["thread_id"])
        return [path.format(**{**self.ids, "agent_id": agent_id}) for agent_id in agents]


@pytest.fixture(scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    opened: list[tuple[Store, EventLog]] = []

    @asynccontextmanager
    async def backends(where: Where) -> AsyncIterator[tuple[Store, EventLog]]:
        async with open_backends(where) as (store, log):
            opened.append((store, log))
            yield store, log

    async with live_server(tmp_path_factory.mktemp("isolation"), backends, LIMITS, timing=TIMING) as live:
        [(store, log)] = opened
        stranger, colleague = Client(live.url, STRANGERS_KEY), Client(live.url, COLLEAGUES_KEY)
        ours = await store.find_organization("default")
        assert ours is not None
        await store.create_key(await store.create_user(ours.id, "colleague"), COLLEAGUES_KEY)
        _, mallory = await member(store, "Other", "mallory", kind="scripted", model=None, servers={})
        await store.create_key(mallory, STRANGERS_KEY)
        agent = await live.agent()
        made = await live.http.post(f"/api/v1/chat/{agent['id']}/threads", json={"title": "A's"}, headers=IDEMPOTENT)
        thread = made.headers["location"]
        assert (await live.post(thread, "say hello", **IDEMPOTENT)).status_code == 201
        uploaded = await live.http.post(f"{thread}/attachments", files=[("files", ("secret.txt", b"hello"))])
        going_on = await live.post(thread, "say half\nhold isolation", Prefer="respond-async")
        await live.gates.reached("isolation")
        ids = {
            "agent_id": agent["id"],
            "thread_id": made.json()["id"],
            "message_id": going_on.json()["id"],
            "attachment_id": uploaded.json()[0]["id"],
            "strangers_agent_id": (await stranger.get(f"{AGENTS}/default"))["id"],
        }
        try:
            yield World(live, stranger, colleague, store, log, thread, ids)
        finally:
            live.gates.release("isolation")
            await stranger.http.aclose()
            await colleague.http.aclose()


async def close_code(url: str, key: str | None) -> int:
    """What a WebSocket is closed with."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with connect(url.replace("http://", "ws://"), additional_headers=headers, open_timeout=10) as opened:
        try:
            raise AssertionError(f"the socket said {await opened.recv()!r}")
        except ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd else 0


def test_every_route_has_a_case() -> None:
    assert set(routes()) - set(CASES) == set()


@pytest.mark.parametrize(("method", "path"), routes())
async def test_another_organization_finds_and_changes_nothing(world: World, method: str, path: str) -> None:
    case = CASES[method, path]
    before = await world.everything()
    for url in world.paths(path):
        if method == "WEBSOCKET":
            assert await close_code(world.live.url + url, STRANGERS_KEY) == 4404
            continue
        files = [("files", ("mine.txt", b"mine"))] if case.file else None
        answer = await world.stranger.http.request(method, url, json=case.body, files=files, headers=IDEMPOTENT)
        match case.expected:
            case "own":
                assert answer.status_code in (200, 201)
            case "gone":
                is_problem(answer, 410, "gone", "use")
            case code:
                is_problem(answer, 404, "agent_not_found" if world.ids["agent_id"] in url else code)
        assert "hello" not in answer.text
        assert "half" not in answer.text
        if case.expected in ("own", "gone"):
            assert not any(world.ids[name] in answer.text for name in ("agent_id", "thread_id", "message_id"))
    assert await world.everything() == before


async def test_default_is_each_organizations_own(world: World) -> None:
    before = await world.everything()
    assert (await world.stranger.get(f"{AGENTS}/default"))["id"] != (await world.live.get(f"{AGENTS}/default"))["id"]
    thread = await world.stranger.thread(title="Mine")
    listed = await world.stranger.get("/api/v1/chat/default/threads")
    assert [own["title"] for own in listed] == ["Mine"]
    is_problem(await world.live.http.get(thread), 404, "thread_not_found")
    refused = await world.stranger.http.post(
        "/api/v1/chat/default/threads", json={"agent_id": world.ids["agent_id"]}, headers=IDEMPOTENT
    )
    is_problem(refused, 422, "invalid_request", "field")
    assert (await world.stranger.http.delete(thread)).status_code == 204
    assert await world.everything() == before


async def test_an_agent_of_another_organization_cannot_become_the_default_or_be_deleted(world: World) -> None:
    path = f"{AGENTS}/{world.ids['agent_id']}"
    is_problem(await world.stranger.http.patch(path, json={"is_default": True}), 404, "agent_not_found")
    is_problem(await world.stranger.http.delete(path), 404, "agent_not_found")
    assert (await world.live.get(path))["name"] == "Scripted"


async def test_another_organizations_message_id_is_not_accepted_for_paging(world: World) -> None:
    thread = await world.stranger.thread()
    answer = await world.stranger.http.get(f"{thread}/messages", params={"before": world.ids["message_id"]})
    assert is_problem(answer, 422, "invalid_request", "field")["field"] == "before"
    path = f"{thread}/messages/{world.ids['message_id']}"
    is_problem(await world.stranger.http.get(path), 404, "message_not_found")
    is_problem(await world.stranger.http.post(f"{path}/cancel"), 404, "message_not_found")


@pytest.mark.parametrize("door", ["json", "form", "socket"])
@pytest.mark.parametrize("whose", ["stranger", "live"], ids=["another organization", "another thread"])
async def test_an_attachment_is_of_one_thread_and_no_message_elsewhere_takes_it(
    world: World, whose: str, door: str
) -> None:
    client: Client = getattr(world, whose)
    thread = await client.thread()
    blobs = set(world.live.data_dir.rglob("*"))
    named = [{"id": world.ids["attachment_id"]}]
    match door:
        case "json":
            body = {"content": "say x", "attachments": named}
            is_invalid(await client.http.post(f"{thread}/messages", json=body), "attachments[0].id")
        case "form":
            fields = {"content": "say x", "attachments": json.dumps(named)}
            answer = await client.http.post(f"{thread}/messages", data=fields, files=[("files", ("b.txt", b"b"))])
            is_invalid(answer, "attachments[0].id")
        case _:
            key = client.http.headers["Authorization"].removeprefix("Bearer ")
            async with socket(world.live.url, thread, key=key) as connection:
                message = {"content": "say x", "attachments": named}
                await connection.send(type="message.create", request_id="r", message=message)
                refused = (await connection.until("error"))[-1]
                error = refused["error"]
                assert (refused["request_id"], error["status"], error["code"]) == ("r", 422, "invalid_request")
                assert error["field"] == "message.attachments[0].id"
    answer = await client.http.get(f"{thread}/attachments/{world.ids['attachment_id']}")
    is_problem(answer, 404, "attachment_not_found")
    assert (await client.get(thread))["messages"] == []
    assert set(world.live.data_dir.rglob("*")) == blobs
    assert (await client.http.delete(thread)).status_code == 204


async def test_a_position_of_another_log_reveals_nothing(world: World) -> None:
    thread = await world.stranger.thread()
    async with world.stranger.watching(thread, await world.log.tail(world.ids["thread_id"])) as watcher:
        frame = await anext(watcher)
    assert (frame.event, frame.data["thread"]["messages"]) == ("thread.snapshot", [])


async def test_an_idempotency_key_is_one_users_own(world: World) -> None:
    live, colleague = world.live, world.colleague
    thread = await live.thread(world.ids["agent_id"])
    first = await live.post(thread, "say hello", **IDEMPOTENT)
    second = await colleague.post(thread, "say hello", **IDEMPOTENT)
    other = await colleague.post(thread, "say other", **{"Idempotency-Key": "another"})
    assert [answer.status_code for answer in (first, second, other)] == [201, 201, 201]
    assert "idempotency-replayed" not in second.headers
    assert first.json()["id"] != second.json()["id"]
    path = f"/api/v1/chat/{world.ids['agent_id']}/threads"
    made = await colleague.http.post(path, json={"title": "B's"}, headers=IDEMPOTENT)
    assert (made.status_code, made.json()["title"]) == (201, "B's")
    for url in (thread, made.headers["location"]):
        assert (await live.http.delete(url)).status_code == 204


async def test_threads_are_shared_in_an_organization_and_user_id_names_the_creator(world: World) -> None:
    ours = await world.live.get(world.thread)
    assert await world.colleague.get(world.thread) == ours
    made = await world.colleague.thread(world.ids["agent_id"])
    assert (await world.live.get(made))["user_id"] != ours["user_id"]
    assert (await world.live.http.delete(made)).status_code == 204


@pytest.mark.parametrize(("method", "path"), routes())
async def test_nothing_under_api_is_answered_without_a_valid_key(world: World, method: str, path: str) -> None:
    before = await world.everything()
    url = world.paths(path)[0]
    if method == "WEBSOCKET":
        assert [await close_code(world.live.url + url, key) for key in (None, "wrong")] == [4401, 4401]
        return
    async with httpx.AsyncClient(base_url=world.live.url, verify=False) as nobody:
        for authorization in (None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x"):
            headers = {"Authorization": authorization} if authorization is not None else {}
            answer = await nobody.request(method, url, json=CASES[method, path].body, headers=headers)
            is_problem(answer, 401, "unauthenticated")
            assert answer.headers["www-authenticate"] == "Bearer"
        is_problem(await nobody.get("/api/nothing"), 401, "unauthenticated")
    assert await world.everything() == before


async def test_a_revoked_key_is_no_key(world: World) -> None:
    ours = await world.store.find_organization("default")
    assert ours is not None
    key = await world.store.create_key(await world.store.create_user(ours.id, "leaver"), "a-key-to-be-revoked")
    leaver = Client(world.live.url, "a-key-to-be-revoked")
    try:
        assert await leaver.get(AGENTS)
        await world.store.revoke_key(key.id)
        is_problem(await leaver.http.get(AGENTS), 401, "unauthenticated")
    finally:
        await leaver.http.aclose()
