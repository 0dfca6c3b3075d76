"""A client's own ids of threads, over HTTP."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.servers import Live
from tests.support.shapes import is_invalid, is_problem, is_thread


async def threads_path(live: Live) -> str:
    return f"/api/v1/chat/{(await live.agent())['id']}/threads"


async def test_a_thread_is_created_once_and_then_found_with_its_messages(live: Live) -> None:
    path = await threads_path(live)
    body = {"external_id": "chat 1/ä", "title": "First", "metadata": {"a": 1}}
    created = await live.http.post(path, json=body)
    assert created.status_code == 201
    thread = is_thread(created.json())
    assert thread["metadata"] == {"a": 1, "thread": {"external_id": "chat 1/ä"}}
    assert (await live.http.post(f"{path}/{thread['id']}/messages", json={"content": "say hello"})).status_code == 201
    found = await live.http.post(path, json={"external_id": "chat 1/ä", "title": "ignored"})
    assert found.status_code == 200
    assert found.headers["location"] == created.headers["location"]
    assert "idempotency-replayed" not in found.headers
    assert found.json() == await live.get(f"{path}/{thread['id']}")
    assert [message["role"] for message in found.json()["messages"]] == ["user", "assistant"]
    assert (await live.http.delete(f"{path}/{thread['id']}")).status_code == 204
    anew = await live.http.post(path, json=body)
    assert anew.status_code == 201
    assert anew.json()["id"] != thread["id"]


async def test_concurrent_requests_create_one_thread(live: Live) -> None:
    path = await threads_path(live)
    answers = await asyncio.gather(*[live.http.post(path, json={"external_id": "chat-1"}) for _ in range(12)])
    assert sorted(answer.status_code for answer in answers) == [200] * 11 + [201]
    assert len({answer.json()["id"] for answer in answers}) == 1


async def test_a_list_is_restricted_to_an_external_id(live: Live) -> None:
    path = await threads_path(live)
    thread = (await live.http.post(path, json={"external_id": "chat-1"})).json()
    await live.http.post(path, json={"external_id": "chat-2"})
    await live.http.post(path)
    found = await live.http.get(path, params={"external_id": "chat-1"})
    assert found.json() == [thread]
    assert (await live.http.get(path, params={"external_id": "unknown"})).json() == []
    is_invalid(await live.http.get(path, params={"external_id": "x" * 256}), "external_id")
    is_invalid(await live.http.get(path, params={"external_id": ""}), "external_id")


async def test_a_key_of_the_creating_request_is_replayed_and_not_found(live: Live) -> None:
    path, body = await threads_path(live), {"external_id": "chat-1"}
    first = await live.http.post(path, json=body, headers={"Idempotency-Key": "k"})
    again = await live.http.post(path, json=body, headers={"Idempotency-Key": "k"})
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.headers["idempotency-replayed"] == "true"
    other = await live.http.post(path, json={"external_id": "chat-2"}, headers={"Idempotency-Key": "k"})
    is_problem(other, 422, "idempotency_mismatch")


@pytest.mark.parametrize("external_id", ["", "x" * 256, "nul\0", 1, None, ["x"]])
async def test_an_invalid_external_id_is_refused(live: Live, external_id: object) -> None:
    is_invalid(await live.http.post(await threads_path(live), json={"external_id": external_id}), "external_id")


@pytest.mark.parametrize("value", [None, {}, {"external_id": "x"}, "x"])
async def test_clients_cannot_set_what_the_server_knows_of_a_thread(live: Live, value: object) -> None:
    path = await threads_path(live)
    is_invalid(await live.http.post(path, json={"metadata": {"thread": value}}), "metadata.thread")
    thread = (await live.http.post(path, json={"metadata": {"run": value, "branch": value}})).json()
    assert thread["metadata"] == {"run": value, "branch": value}
    message = {"content": "x", "metadata": {"branch": value}}
    is_invalid(await live.http.post(f"{path}/{thread['id']}/messages", json=message), "metadata.branch")
