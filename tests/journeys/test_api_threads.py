"""/api/v1/chat/{agent_id}/threads, to the letter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.support.servers import Live, live_server
from tests.support.shapes import is_invalid, is_problem, is_thread

NOBODY = "00000000-0000-4000-8000-000000000000"
MEGABYTE = 2**20


@pytest.fixture(scope="module")
async def live(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    """One server for all: every test makes an agent of its own."""
    async with live_server(tmp_path_factory.mktemp("threads")) as live:
        yield live


def threads_of(thread: str) -> str:
    return thread.rpartition("/")[0]


async def patched(live: Live, thread: str, **fields: object) -> dict[str, Any]:
    answer = await live.http.patch(thread, json=fields)
    assert answer.status_code == 200, answer.text
    return is_thread(answer.json())


async def several(live: Live, count: int) -> list[str]:
    """Threads with one new agent, oldest first."""
    first = await live.scripted_thread()
    return [first, *[await live.thread(first.split("/")[4]) for _ in range(count - 1)]]


async def listed(live: Live, threads: str, **query: object) -> list[str]:
    return [f"{threads}/{is_thread(thread)['id']}" for thread in await live.get(threads, **query)]


async def test_a_thread_is_created_with_what_was_given(live: Live) -> None:
    agent = await live.agent()
    given = {"agent_id": agent["id"], "title": "Größe", "metadata": {"run": 1, "a": [{"b": None}]}}
    answer = await live.http.post(f"/api/v1/chat/{agent['id']}/threads", json=given)
    assert answer.status_code == 201
    thread = is_thread(answer.json())
    assert given.items() <= thread.items()
    assert thread["organization_id"] == agent["organization_id"]
    assert (thread["messages"], thread["archived"]) == ([], False)
    assert answer.headers["location"] == f"/api/v1/chat/{agent['id']}/threads/{thread['id']}"
    assert await live.get(answer.headers["location"]) == thread


@pytest.mark.parametrize("body", [b"", b"{}"])
async def test_an_empty_body_makes_a_thread_without_a_title(live: Live, body: bytes) -> None:
    answer = await live.http.post("/api/v1/chat/default/threads", content=body)
    assert answer.status_code == 201
    assert (is_thread(answer.json())["title"], answer.json()["metadata"]) == ("", {})


async def test_the_agent_of_a_body_must_be_that_of_the_path(live: Live) -> None:
    agent, other = await live.agent(), await live.agent()
    path = f"/api/v1/chat/{agent['id']}/threads"
    is_invalid(await live.http.post(path, json={"agent_id": other["id"]}), "agent_id")
    is_invalid(await live.http.post(path, json={"agent_id": "nonsense"}), "agent_id")
    assert await live.get(path) == []


async def test_default_is_the_organizations_default_agent(live: Live) -> None:
    agent = await live.agent(is_default=True)
    answer = await live.http.post("/api/v1/chat/default/threads", json={"agent_id": agent["id"]})
    assert is_thread(answer.json())["agent_id"] == agent["id"]
    assert answer.headers["location"].startswith(f"/api/v1/chat/{agent['id']}/threads/")
    assert await live.get("/api/v1/chat/default/threads") == [answer.json()]


async def test_under_default_any_thread_of_the_organization_is_found(live: Live) -> None:
    thread = await live.scripted_thread()
    under_default = f"/api/v1/chat/default/threads/{thread.rpartition('/')[2]}"
    assert (await live.post(under_default, "say hello")).status_code == 201
    assert await live.get(under_default) == await live.get(thread)
    assert (await patched(live, under_default, title="x"))["title"] == "x"
    assert (await live.http.delete(under_default)).status_code == 204


async def test_under_another_agents_path_a_thread_is_not_found(live: Live) -> None:
    thread, other = await live.scripted_thread(), await live.agent()
    await live.post(thread, "say hello")
    before = await live.get(thread)
    elsewhere = f"/api/v1/chat/{other['id']}/threads/{before['id']}"
    message = f"{elsewhere}/messages/{before['messages'][0]['id']}"
    for method, path, body in (
        ("GET", elsewhere, None),
        ("PATCH", elsewhere, {"title": "x"}),
        ("DELETE", elsewhere, None),
        ("POST", f"{elsewhere}/generate_title", None),
        ("POST", f"{elsewhere}/messages", {"content": "x"}),
        ("GET", f"{elsewhere}/messages", None),
        ("GET", message, None),
        ("POST", f"{message}/cancel", None),
        ("GET", f"{elsewhere}/events", None),
    ):
        is_problem(await live.http.request(method, path, json=body), 404, "thread_not_found")
    assert await live.get(thread) == before


async def test_threads_are_listed_latest_activity_first(live: Live) -> None:
    threads = await several(live, 3)
    path = threads_of(threads[0])
    assert await listed(live, path) == threads[::-1]
    await live.post(threads[0], "say hello")
    assert await listed(live, path) == [threads[0], threads[2], threads[1]]
    await patched(live, threads[1], title="x")
    await patched(live, threads[2], archived=True)
    assert await listed(live, path) == [threads[0], threads[2], threads[1]]


async def test_pages_of_ten_are_followed_by_their_links(live: Live) -> None:
    threads = await several(live, 12)
    path = threads_of(threads[0])
    page = await live.http.get(path)
    assert len(page.json()) == 10
    found = [thread["id"] for thread in page.json()]
    while "link" in page.headers:
        page = await live.http.get(page.links["next"]["url"])
        assert page.status_code == 200
        found += [thread["id"] for thread in page.json()]
    assert found == [thread.rpartition("/")[2] for thread in threads[::-1]]


async def test_a_link_repeats_the_other_parameters_and_the_last_page_has_none(live: Live) -> None:
    threads = await several(live, 4)
    for thread in threads[:3]:
        await patched(live, thread, archived=True)
    page = await live.http.get(threads_of(threads[0]), params={"archived": "true", "limit": "2", "message_limit": "0"})
    following = httpx.URL(page.links["next"]["url"])
    assert dict(following.params) == {"archived": "true", "limit": "2", "message_limit": "0", "offset": "2"}
    last = await live.http.get(following)
    assert [thread["id"] for thread in last.json()] == [threads[0].rpartition("/")[2]]
    assert "link" not in last.headers
    assert "link" not in (await live.http.get(threads_of(threads[0]), params={"limit": "4"})).headers


async def test_threads_are_listed_archived_or_not_or_both(live: Live) -> None:
    one, two = await several(live, 2)
    assert (await patched(live, one, archived=True))["archived"] is True
    path = threads_of(one)
    assert await listed(live, path, archived="true") == [one]
    assert await listed(live, path, archived="false") == [two]
    assert await listed(live, path) == [two, one]
    assert (await patched(live, one, archived=False))["archived"] is False
    assert await listed(live, path, archived="true") == []


@pytest.mark.slow
async def test_message_limits_apply_to_lists_and_to_single_threads(live: Live) -> None:
    thread = await live.scripted_thread()
    for number in range(104):
        body = {"content": str(number), "role": "system"}
        assert (await live.http.post(f"{thread}/messages", json=body)).status_code == 201
    path = threads_of(thread)

    def contents(thread: dict[str, Any]) -> list[str]:
        return [message["content"] for message in is_thread(thread)["messages"]]

    everything = [str(number) for number in range(104)]
    assert contents(await live.get(thread)) == everything[-50:]
    assert contents(await live.get(thread, message_limit=1)) == everything[-1:]
    assert contents(await live.get(thread, message_limit=100)) == everything[-100:]
    assert contents((await live.get(path))[0]) == everything[-50:]
    assert contents((await live.get(path, message_limit=3))[0]) == everything[-3:]
    assert contents((await live.get(path, message_limit=0))[0]) == []
    assert await live.get(path, limit=50, offset=1) == []
    older = await live.get(f"{thread}/messages", limit=100)
    assert [message["content"] for message in older] == everything[-100:]
    oldest = await live.get(f"{thread}/messages", before=older[0]["id"])
    assert [message["content"] for message in oldest] == everything[:4]
    assert len(await live.get(f"{thread}/messages")) == 50
    assert await live.get(f"{thread}/messages", before=oldest[0]["id"]) == []


@pytest.mark.parametrize(
    ("query", "inside", "outside"),
    [
        ("limit", (1, 50), (0, 51)),
        ("offset", (0, 10**12), (-1,)),
        ("message_limit", (0, 50), (-1, 51)),
    ],
)
async def test_a_lists_parameters_have_their_ranges(
    live: Live, query: str, inside: tuple[int, ...], outside: tuple[int, ...]
) -> None:
    path = "/api/v1/chat/default/threads"
    for number in inside:
        await live.get(path, **{query: number})
    for number in outside:
        is_invalid(await live.http.get(path, params={query: str(number)}), query)


async def test_a_list_of_more_than_8_mb_has_fewer_messages_per_thread_and_a_header(live: Live) -> None:
    thread = await live.scripted_thread()
    for number in range(9):
        body = {"content": str(number) * MEGABYTE, "content_html": "", "role": "system"}
        assert (await live.http.post(f"{thread}/messages", json=body)).status_code == 201
    page = await live.http.get(threads_of(thread))
    assert page.headers["x-messages-cut"] == "true"
    assert len(page.content) <= 8 * MEGABYTE
    assert [message["content"][0] for message in is_thread(page.json()[0])["messages"]] == list("2345678")
    assert "x-messages-cut" not in (await live.http.get(threads_of(thread), params={"message_limit": "7"})).headers
    whole = await live.http.get(thread)
    assert (whole.headers["x-messages-cut"], len(whole.json()["messages"])) == ("true", 7)
    older = await live.get(f"{thread}/messages", before=whole.json()["messages"][0]["id"])
    assert [message["content"][0] for message in older] == list("01")


async def test_updated_at_strictly_increases_with_every_write(live: Live) -> None:
    thread = await live.scripted_thread()
    seen = [(await live.get(thread))["updated_at"]]
    for write in (
        live.http.patch(thread, json={"title": "a"}),
        live.http.patch(thread, json={"title": "a"}),
        live.http.patch(thread, json={"archived": True}),
        live.http.patch(thread, json={"archived": False}),
        live.http.post(f"{thread}/messages", json={"content": "x", "role": "system"}),
        live.post(thread, "say hello"),
        live.http.post(f"{thread}/generate_title"),
    ):
        assert (await write).status_code < 300
        seen.append((await live.get(thread))["updated_at"])
    assert seen == sorted(set(seen))


async def test_a_patch_changes_title_or_archived_only(live: Live) -> None:
    thread = await live.scripted_thread(name="x")
    before = await live.get(thread)
    titled = await patched(live, thread, title="New")
    assert titled == {**before, "title": "New", "updated_at": titled["updated_at"]}
    archived = await patched(live, thread, archived=True)
    assert archived == {**titled, "archived": True, "updated_at": archived["updated_at"]}
    assert (await patched(live, thread, title=""))["title"] == ""
    for name in ("metadata", "agent_id", "id", "messages"):
        is_invalid(await live.http.patch(thread, json={name: {}}), name)


@pytest.mark.parametrize("role", ["user", "assistant"])
async def test_an_archived_thread_is_readable_and_answers_a_post_with_409(live: Live, role: str) -> None:
    thread = await live.scripted_thread()
    await live.post(thread, "say hello")
    archived = await patched(live, thread, archived=True)
    answer = await live.http.post(f"{thread}/messages", json={"content": "say more", "role": role})
    is_problem(answer, 409, "thread_archived")
    assert await live.get(thread) == archived
    await patched(live, thread, archived=False)
    assert (await live.post(thread, "say more")).status_code == 201


async def test_a_deleted_thread_and_its_messages_are_not_found(live: Live) -> None:
    thread = await live.scripted_thread()
    message = (await live.post(thread, "say hello")).headers["location"]
    answer = await live.http.delete(thread)
    assert (answer.status_code, answer.content) == (204, b"")
    for path in (thread, message, f"{thread}/messages", f"{thread}/events"):
        is_problem(await live.http.get(path), 404, "thread_not_found")
    is_problem(await live.http.delete(thread), 404, "thread_not_found")
    is_problem(await live.post(thread, "say more"), 404, "thread_not_found")
    assert await live.get(threads_of(thread)) == []


async def test_a_title_is_generated_from_the_messages_and_stored(live: Live) -> None:
    thread = await live.scripted_thread()
    is_problem(await live.http.post(f"{thread}/generate_title"), 409, "thread_empty")
    await live.post(thread, "say **hello** there")
    before = await live.get(thread)
    answer = await live.http.post(f"{thread}/generate_title")
    assert answer.status_code == 200
    titled = is_thread(answer.json())
    assert titled == {**before, "title": "say hello there", "updated_at": titled["updated_at"]}
    assert await live.get(thread) == titled


async def test_a_thread_in_which_only_the_assistant_spoke_gets_a_title_too(live: Live) -> None:
    thread = await live.scripted_thread()
    await live.http.post(f"{thread}/messages", json={"role": "assistant", "content": "Welcome aboard"})
    assert (await live.http.post(f"{thread}/generate_title")).json()["title"] == "Welcome aboard"


async def test_only_title_requests_change_a_title(live: Live) -> None:
    thread = await live.thread((await live.agent())["id"], title="Mine")
    await live.post(thread, "say hello")
    assert (await live.get(thread))["title"] == "Mine"


async def test_a_key_makes_one_thread_per_agent_and_another_body_is_refused(live: Live) -> None:
    agent, other = await live.agent(), await live.agent()
    path = f"/api/v1/chat/{agent['id']}/threads"
    key = {"Idempotency-Key": "k"}
    first = await live.http.post(path, json={"title": "a", "metadata": {"x": 1, "y": 2}}, headers=key)
    assert "idempotency-replayed" not in first.headers
    thread = first.headers["location"]
    await live.post(thread, "say hello")
    again = await live.http.post(path, content=b'{"metadata":{"y":2, "x":1},"title":"\\u0061"}', headers=key)
    assert again.status_code == 201
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["location"] == thread
    assert is_thread(again.json()) == await live.get(thread)
    is_problem(await live.http.post(path, json={"title": "b"}, headers=key), 422, "idempotency_mismatch")
    elsewhere = await live.http.post(f"/api/v1/chat/{other['id']}/threads", json={"title": "b"}, headers=key)
    assert "idempotency-replayed" not in elsewhere.headers
    assert len(await live.get(path)) == 1


async def test_concurrent_requests_with_one_key_create_one_thread(live: Live) -> None:
    path = f"/api/v1/chat/{(await live.agent())['id']}/threads"
    answers = await asyncio.gather(*(live.http.post(path, headers={"Idempotency-Key": "k"}) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 7


async def test_there_is_no_thread_of_an_unknown_id(live: Live) -> None:
    agent = await live.agent()
    for agent_id in (agent["id"], "default"):
        for thread_id in (NOBODY, "nonsense", "default"):
            path = f"/api/v1/chat/{agent_id}/threads/{thread_id}"
            is_problem(await live.http.get(path), 404, "thread_not_found")
            is_problem(await live.post(path, "say hello"), 404, "thread_not_found")
    is_problem(await live.http.get(f"/api/v1/chat/nonsense/threads/{NOBODY}"), 404, "agent_not_found")
