"""One path, three endings: the same journeys over JSON, SSE and WebSocket."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.client import Client, frames
from tests.support.servers import Live
from tests.support.sockets import socket

TERMINAL = ("run.completed", "run.failed", "run.cancelled")
Answer = dict[str, Any]


class Json:
    """Posts and waits for the JSON answer."""

    def __init__(self, live: Live, thread: str) -> None:
        self.live = live
        self.thread = thread

    async def ask(self, content: str, key: str | None = None) -> Answer:
        answer = await self.live.post(self.thread, content, **({"Idempotency-Key": key} if key else {}))
        if answer.status_code == 201:
            return dict(answer.json())
        return dict(await self.live.get(f"{self.thread}/messages/{answer.json()['message_id']}"))


class Sse(Json):
    """Posts and reads the stream to its end."""

    async def ask(self, content: str, key: str | None = None) -> Answer:
        stream = await self.live.streamed(self.thread, content, **({"Idempotency-Key": key} if key else {}))
        assert stream[-1].event in TERMINAL
        assert [frame.event for frame in stream].count(stream[-1].event) == 1
        return dict(stream[-1].data["message"])


class WebSocket(Json):
    """Sends the command and reads the events to the run's end, or finds it in the snapshot."""

    async def ask(self, content: str, key: str | None = None) -> Answer:
        async with socket(self.live.url, self.thread) as connection:
            snapshot = await connection.receive()
            assert snapshot["type"] == "thread.snapshot"
            request_id = await connection.create(content, **({"idempotency_key": key} if key else {}))
            events = await connection.until("ack")
            ack = events[-1]
            assert ack["request_id"] == request_id
            for message in snapshot["thread"]["messages"]:
                if message["id"] == ack["message_id"] and message["metadata"]["run"]["status"] != "in_progress":
                    return dict(message)
            while events[-1]["type"] not in TERMINAL:
                events.append(await connection.receive())
            assert events[-1]["message"]["id"] == ack["message_id"]
            return dict(events[-1]["message"])


@pytest.fixture(params=[Json, Sse, WebSocket], ids=["json", "sse", "websocket"])
def door(request: pytest.FixtureRequest) -> type[Json]:
    door: type[Json] = request.param
    return door


async def test_the_answer_is_the_stored_message(live: Live, door: type[Json]) -> None:
    thread = await live.scripted_thread(mcp_servers=["demo"])
    answer = await door(live, thread).ask('count 20\ntool calculate {"expression": "6*7"}\nsay done')
    assert answer["content"].endswith("19 \n\ndone")
    assert answer["tool_calls"][0]["result"]["value"] == 42
    assert set(answer["tool_calls"][0]) == {"tool_name", "arguments", "result", "error", "start_time", "end_time"}
    assert (await live.get(thread))["messages"][-1] == answer


@pytest.mark.parametrize("script", ["say half\nfail Too bad.", "say half\noverload Busy.", "say half\ncrash"])
async def test_a_failed_run_stores_its_text_and_releases_the_thread(live: Live, door: type[Json], script: str) -> None:
    thread = await live.scripted_thread()
    answer = await door(live, thread).ask(script)
    assert answer["content"] == "half"
    assert answer["metadata"]["run"]["status"] == "failed"
    assert "secret" not in answer["metadata"]["run"]["error"]["detail"]
    assert (await door(live, thread).ask("say on"))["content"] == "on"


async def test_the_same_key_never_starts_two_runs(live: Live, door: type[Json]) -> None:
    thread = await live.scripted_thread()
    first = await door(live, thread).ask("say once", key="k")
    for other in (Json, Sse, WebSocket):
        assert (await other(live, thread).ask("say once", key="k"))["id"] == first["id"]
    assert len((await live.get(thread))["messages"]) == 2


async def test_concurrent_retries_over_every_transport_join_one_run(live: Live) -> None:
    thread = await live.scripted_thread()
    asking = [
        asyncio.create_task(door(live, thread).ask("hold go\nsay done", key="k")) for door in (Json, Sse, WebSocket)
    ]
    await live.gates.reached("go")
    live.gates.release("go")
    answers = await asyncio.gather(*asking)
    assert len({answer["id"] for answer in answers}) == 1
    assert {answer["content"] for answer in answers} == {"done"}


async def test_a_cancelled_run_ends_everywhere_with_the_same_message(live: Live) -> None:
    thread = await live.scripted_thread()
    asking = asyncio.create_task(Json(live, thread).ask("say partial\nhold for ever"))
    await live.gates.reached("for ever")
    async with socket(live.url, thread) as watching, socket(live.url, thread) as cancelling:
        run_id = (await watching.receive())["thread"]["messages"][-1]["id"]
        await cancelling.send(type="run.cancel", request_id="c", message_id=run_id)
        assert (await cancelling.until("ack"))[-1]["message_id"] == run_id
        seen = (await watching.until("run.cancelled"))[-1]["message"]
    answer = await asking
    assert seen == answer == (await live.get(thread))["messages"][-1]
    assert answer["content"] == "partial"


async def test_positions_are_the_same_on_every_channel(live: Live) -> None:
    thread = await live.scripted_thread()
    whole = await live.streamed(thread, "count 10")
    async with socket(live.url, thread, after=whole[4].id) as connection:
        rest = await connection.until(*TERMINAL)
    assert [(frame["position"], frame["type"]) for frame in rest] == [(frame.id, frame.event) for frame in whole[5:]]


@pytest.mark.parametrize(
    "after", ["nonsense", "1-1", "99999999999999999999-0", "7f47f0a9-657d-4eb0-8b0d-20598d3e771a", "1-1\n"]
)
async def test_a_position_from_elsewhere_is_met_with_a_snapshot(live: Live, after: str) -> None:
    thread = await live.scripted_thread()
    await live.post(thread, "say hi")
    async with socket(live.url, thread, after=after.strip()) as connection:
        assert (await connection.receive())["thread"]["messages"][-1]["content"] == "hi"
    async with live.http.stream("GET", f"{thread}/events", params={"after": after}) as response:
        assert (await anext(frames(response))).event == "thread.snapshot"


BAD_FRAMES = [
    ("{", "malformed_body", None),
    ("[]", "invalid_request", "body"),
    ('{"type": "nothing"}', "invalid_request", "type"),
    ('{"type": "message.create", "request_id": "r"}', "invalid_request", "message"),
    ('{"type": "message.create", "request_id": "r", "message": {"content": 1}}', "invalid_request", "message.content"),
    ('{"type": "message.create", "request_id": "r", "message": {"content": "\\u0000"}}', "invalid_request", None),
    ('{"type": "message.create", "request_id": "r", "message": {"content": ""}}', "invalid_request", "message.content"),
    ('{"type": "run.cancel", "request_id": "r", "message_id": "x"}', "message_not_found", None),
    ('{"type": "ping", "extra": 1}', "invalid_request", "extra"),
    ("[" * 10_000, "invalid_request", "body"),
]


async def test_a_bad_frame_gets_an_error_frame_and_the_socket_lives(live: Live) -> None:
    thread = await live.scripted_thread()
    async with socket(live.url, thread) as connection:
        await connection.receive()
        for text, code, field in BAD_FRAMES:
            await connection.connection.send(text)
            frame = await connection.receive()
            assert (frame["type"], frame["error"]["code"]) == ("error", code), text
            assert field is None or frame["error"]["field"] == field
            assert frame.get("request_id") == ("r" if '"r"' in text else None)
        await connection.connection.send(b"\xff binary")
        assert (await connection.receive())["error"]["code"] == "malformed_body"
        await connection.send(type="ping")
        assert await connection.receive() == {"type": "pong"}


async def test_a_busy_thread_refuses_a_second_message_by_frame_and_takes_it_with_interrupt(live: Live) -> None:
    thread = await live.scripted_thread()
    async with socket(live.url, thread) as connection:
        await connection.receive()
        await connection.create("say first\nhold it")
        ack = (await connection.until("ack"))[-1]
        await live.gates.reached("it")
        second = await connection.create("say second")
        refused = (await connection.until("error"))[-1]
        assert refused["request_id"] == second
        assert (refused["error"]["code"], refused["error"]["message_id"]) == ("thread_busy", ack["message_id"])
        await connection.create("say second", if_busy="interrupt")
        assert (await connection.until("run.cancelled"))[-1]["message"]["content"] == "first"
        assert (await connection.until("run.completed"))[-1]["message"]["content"] == "second"


async def test_the_close_codes_state_the_reason(live: Live) -> None:
    thread = await live.scripted_thread()
    async with socket(live.url, thread, key=None) as connection:
        assert await connection.close_code() == 4401
    async with socket(live.url, thread, key="wrong") as connection:
        assert await connection.close_code() == 4401
    async with socket(live.url, thread, headers={"Origin": "https://evil.example"}) as connection:
        assert await connection.close_code() == 4403
    async with socket(live.url, thread[:-1] + "x") as connection:
        assert await connection.close_code() == 4404
    async with socket(live.url, thread) as connection:
        assert (await live.http.delete(thread)).status_code == 204
        assert await connection.close_code() == 4410


async def test_a_browser_may_bring_its_key_as_a_subprotocol_or_a_cookie(live: Live) -> None:
    thread = await live.scripted_thread()
    key = live.http.headers["Authorization"].removeprefix("Bearer ")
    async with socket(live.url, thread, key=None, subprotocols=["chat", f"bearer.{key}"]) as connection:
        assert connection.connection.subprotocol == "chat"
        assert (await connection.receive())["type"] == "thread.snapshot"
    typed = {"Authorization": "", "Sec-Fetch-Site": "none"}
    wrong = await live.http.get("/?key=wrong", headers=typed)
    assert (wrong.status_code, "Set-Cookie" in wrong.headers, "<html" in wrong.text) == (401, False, True)
    login = await live.http.get(f"/?key={key}", headers=typed)
    cookie = login.headers["Set-Cookie"]
    assert (login.status_code, login.headers["Location"]) == (303, "/")
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    headers = {"Cookie": cookie.partition(";")[0], "Origin": live.url}
    async with socket(live.url, thread, key=None, headers=headers) as connection:
        assert (await connection.receive())["type"] == "thread.snapshot"
    async with socket(live.url, thread, key=None, headers={**headers, "Origin": "http://127.0.0.1:1"}) as connection:
        assert await connection.close_code() == 4403


@pytest.mark.parametrize("wanted", ["close", "keep-alive"])
async def test_an_event_stream_has_one_connection_header_at_most(live: Live, wanted: str) -> None:
    thread = await live.scripted_thread()
    async with live.http.stream("GET", f"{thread}/events", headers={"Connection": wanted}) as response:
        assert response.headers.get_list("connection") in ([], [wanted])


async def test_another_organization_finds_no_thread(live: Live) -> None:
    thread = await live.scripted_thread()
    stranger = Client(live.url, "no such key at all")
    assert (await stranger.http.get(thread)).status_code == 401
    await stranger.http.aclose()


async def test_a_stop_closes_every_stream_so_that_clients_reconnect(live: Live) -> None:
    thread = await live.scripted_thread()
    async with live.http.stream("GET", f"{thread}/events") as watching, socket(live.url, thread) as connection:
        stream = watching.aiter_raw()
        assert b"thread.snapshot" in await anext(stream)
        await connection.receive()
        live.server.drain()
        rest = b"".join([data async for data in stream])
        assert rest.endswith(b"retry: 1000\n\n")
        assert await connection.close_code() == 1012
