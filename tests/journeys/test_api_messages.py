"""…/messages, to the letter: posting in its forms, failed runs, Idempotency-Key, older pages, polling, cancel."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_chat.stores.events import TERMINAL_TYPES
from tests.support.client import Frame, frames
from tests.support.servers import Live, live_server
from tests.support.shapes import is_invalid, is_message, is_problem, is_thread

NOBODY = "00000000-0000-4000-8000-000000000000"
FORMS = ["json", "sse", "202"]


@pytest.fixture(scope="module")
async def live(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    """One server for all: every test makes an agent and gates of its own."""
    async with live_server(tmp_path_factory.mktemp("messages")) as live:
        yield live


@pytest.fixture
def gate() -> str:
    """The name of a gate that no other test uses."""
    return uuid.uuid4().hex


async def ended(watcher: AsyncIterator[Frame]) -> Frame:
    """The next terminal event that a watcher sees."""
    async for frame in watcher:
        if frame.event in TERMINAL_TYPES:
            return frame
    raise AssertionError("the stream ended without a terminal event")


async def running(live: Live, thread: str) -> str:
    """The path of the thread's last message, whose run is in progress."""
    message = is_thread(await live.get(thread))["messages"][-1]
    assert message["metadata"]["run"]["status"] == "in_progress"
    return f"{thread}/messages/{message['id']}"


async def test_a_post_waits_for_the_run_and_answers_with_its_message(live: Live) -> None:
    thread = await live.scripted_thread(mcp_servers=["demo"], model="some-model")
    answer = await live.post(thread, 'say **Hi** \ntool calculate {"expression": "2*3"}\nsay bye')
    assert answer.status_code == 201
    message = is_message(answer.json())
    assert (message["role"], message["content"]) == ("assistant", "**Hi** \n\nbye")
    assert message["content_html"] == '<p dir="auto"><strong>Hi</strong></p>\n<p dir="auto">bye</p>\n'
    [call] = message["tool_calls"]
    assert (call["tool_name"], call["arguments"], call["error"]) == ("calculate", {"expression": "2*3"}, None)
    assert call["start_time"] <= call["end_time"]
    question, stored = is_thread(await live.get(thread))["messages"]
    assert stored == message
    assert answer.headers["location"] == f"{thread}/messages/{message['id']}"
    assert await live.get(answer.headers["location"]) == message
    run = message["metadata"]["run"]
    assert (run["status"], run["in_reply_to"], run["model"]) == ("completed", question["id"], "some-model")
    assert (run["error"], run["tool_calls"][0]["offset"]) == (None, len("**Hi** "))
    assert (question["role"], question["metadata"], question["attachments"]) == ("user", {}, [])


@pytest.mark.parametrize("role", ["assistant", "system"])
async def test_a_message_of_another_role_is_only_stored(live: Live, role: str) -> None:
    thread = await live.scripted_thread()
    body = {"content": "say x", "role": role, "metadata": {"a": {"run": 10**30}}}
    answer = await live.http.post(f"{thread}/messages", json=body)
    assert answer.status_code == 201
    message = is_message(answer.json())
    assert body.items() <= message.items()
    assert (await live.get(thread))["messages"] == [message]
    async with live.http.stream(
        "POST", f"{thread}/messages", params={"stream": "true"}, json={"content": "y", "role": role}
    ) as stream:
        [frame] = [frame async for frame in frames(stream)]
    assert (frame.event, frame.data["message"]["content"]) == ("message.created", "y")
    assert len((await live.get(thread))["messages"]) == 2


@pytest.mark.parametrize(
    ("accept", "query", "streams"),
    [
        ("text/event-stream", "", True),
        ("text/event-stream, application/json", "", False),
        ("*/*", "", False),
        ("application/json", "?stream=true", True),
        ("text/event-stream", "?stream=false", False),
    ],
)
async def test_the_response_is_a_stream_if_only_that_is_accepted_or_requested(
    live: Live, accept: str, query: str, streams: bool
) -> None:
    thread = await live.scripted_thread()
    async with live.posting(thread, "say a", query=query, Accept=accept) as answer:
        kind = answer.headers["content-type"].partition(";")[0]
        if streams:
            assert (answer.status_code, kind) == (200, "text/event-stream")
            names = [frame.event async for frame in frames(answer)]
            assert names == ["message.created", "run.started", "message.delta", "run.completed"]
        else:
            assert (answer.status_code, kind) == (201, "application/json")
            assert is_message(await answer.aread() and answer.json())["content"] == "a"


async def test_respond_async_answers_202_with_a_message_to_poll(live: Live, gate: str) -> None:
    thread = await live.scripted_thread()
    answer = await live.post(thread, f"say a\nhold {gate}\nsay b", Prefer="respond-async")
    assert answer.status_code == 202
    assert answer.headers["preference-applied"] == "respond-async"
    message = is_message(answer.json())
    assert (message["role"], message["content"], message["content_html"]) == ("assistant", "", "")
    assert message["metadata"]["run"]["status"] == "in_progress"
    poll = answer.headers["location"]
    assert poll == await running(live, thread)
    async with live.watching(thread) as watcher:
        await anext(watcher)
        live.gates.release(gate)
        end = await ended(watcher)
    assert is_message(await live.get(poll)) == end.data["message"]
    assert end.data["message"]["content"] == "ab"


@pytest.mark.parametrize("prefer", ["wait=1", 'foo, wait="1"; x=y'])
async def test_after_the_preferred_wait_the_response_is_202_and_the_run_continues(
    live: Live, gate: str, prefer: str
) -> None:
    thread = await live.scripted_thread()
    answer = await live.post(thread, f"hold {gate}\nsay b", Prefer=prefer)
    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "wait=1")
    async with live.watching(thread) as watcher:
        await anext(watcher)
        live.gates.release(gate)
        assert (await ended(watcher)).event == "run.completed"


async def test_a_wait_answers_201_as_soon_as_the_run_is_over(live: Live) -> None:
    thread = await live.scripted_thread()
    answer = await live.post(thread, "say b", Prefer="wait=30")
    assert (answer.status_code, answer.headers["preference-applied"]) == (201, "wait=30")
    assert "preference-applied" not in (await live.post(thread, "say b")).headers
    headers = [("Prefer", "return=minimal"), ("Prefer", "wait=30")]
    answer = await live.http.post(f"{thread}/messages", json={"content": "say b"}, headers=headers)
    assert (answer.status_code, answer.headers["preference-applied"]) == (201, "wait=30")


@pytest.mark.parametrize(
    ("script", "status", "code", "retryable", "detail"),
    [
        ("fail It is broken.", 502, "agent_failed", False, "It is broken."),
        ("overload Come back later.", 503, "agent_overloaded", True, "Come back later."),
        ("crash", 502, "agent_failed", False, "The agent failed."),
        ("tool 1 nonsense", 502, "agent_failed", False, "The agent failed."),
    ],
)
async def test_a_failed_run_is_a_problem_and_its_partial_answer_is_stored(
    live: Live, script: str, status: int, code: str, retryable: bool, detail: str
) -> None:
    thread = await live.scripted_thread()
    answer = await live.post(thread, f"say half\n{script}")
    problem = is_problem(answer, status, code, "thread_id", "message_id", "retryable")
    assert (problem["retryable"], problem["detail"]) == (retryable, detail)
    assert ("retry-after" in answer.headers) == (status == 503)
    assert problem["thread_id"] == thread.rpartition("/")[2]
    message = is_message(await live.get(f"{thread}/messages/{problem['message_id']}"))
    assert (message["content"], message["content_html"]) == ("half", '<p dir="auto">half</p>\n')
    assert message["metadata"]["run"]["status"] == "failed"
    assert message["metadata"]["run"]["error"] == {"code": code, "detail": detail, "retryable": retryable}
    stream = await live.streamed(thread, f"say half\n{script}")
    assert (stream[-1].event, stream[-1].data["error"]["code"]) == ("run.failed", code)
    told = answer.text + (await live.http.get(thread)).text + repr(stream)
    assert "secret internal text" not in told
    assert "Traceback" not in told
    assert (await live.post(thread, "say on")).status_code == 201


async def test_a_run_that_takes_too_long_is_a_504(tmp_path: Path, gate: str) -> None:
    async with live_server(tmp_path, run_seconds=0.2) as live:
        thread = await live.scripted_thread()
        answer = await live.post(thread, f"say half\nhold {gate}")
        problem = is_problem(answer, 504, "agent_timeout", "thread_id", "message_id", "retryable")
        assert problem["retryable"]
        assert (await live.get(answer.headers["location"]))["content"] == "half"


async def ask(live: Live, thread: str, form: str, content: str, key: str) -> tuple[str, bool, httpx.Response]:
    """Post in one of the three forms: the id of the run's message, whether it was marked as a replay, the response."""
    headers = {"Idempotency-Key": key}
    if form == "sse":
        async with live.posting(thread, content, **headers) as answer:
            assert answer.status_code == 200
            stream = [frame async for frame in frames(answer)]
        assert stream[-1].event in TERMINAL_TYPES
        run_id = stream[-1].data["message"]["id"]
    else:
        if form == "202":
            headers["Prefer"] = "respond-async"
        answer = await live.post(thread, content, **headers)
        run_id = answer.json().get("id") or answer.json()["message_id"]
    return run_id, answer.headers.get("idempotency-replayed") == "true", answer


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
async def test_a_retry_returns_the_finished_run_in_the_requested_form(live: Live, first: str, second: str) -> None:
    thread = await live.scripted_thread()
    async with live.watching(thread) as watcher:
        await anext(watcher)
        run_id, replayed, _ = await ask(live, thread, first, "say a", "k")
        assert not replayed
        await ended(watcher)
    again, replayed, answer = await ask(live, thread, second, "say a", "k")
    assert (again, replayed) == (run_id, True)
    if second != "sse":
        assert answer.status_code == 201
        assert answer.json() == await live.get(answer.headers["location"])
    assert len((await live.get(thread))["messages"]) == 2


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
async def test_a_retry_joins_the_run_in_progress(live: Live, gate: str, first: str, second: str) -> None:
    thread = await live.scripted_thread()
    script = f"say a\nhold {gate}\nsay b"
    posting = asyncio.create_task(ask(live, thread, first, script, "k"))
    await live.gates.reached(gate)
    joining = asyncio.create_task(ask(live, thread, second, script, "k"))
    if second == "202":
        assert (await joining)[2].status_code == 202
    async with live.watching(thread) as watcher:
        await anext(watcher)
        live.gates.release(gate)
        end = await ended(watcher)
    assert (await posting)[:2] == (end.data["message"]["id"], False)
    assert (await joining)[:2] == (end.data["message"]["id"], True)
    assert [message["content"] for message in (await live.get(thread))["messages"]] == [script, "ab"]


async def test_a_replayed_stream_is_the_same_bytes(live: Live) -> None:
    thread = await live.scripted_thread()
    whole = [frame.raw for frame in await live.streamed(thread, "count 20", **{"Idempotency-Key": "k"})]
    await live.post(thread, "say between")
    assert [frame.raw for frame in await live.streamed(thread, "count 20", **{"Idempotency-Key": "k"})] == whole


@pytest.mark.parametrize("form", FORMS)
async def test_a_key_with_another_body_is_refused(live: Live, form: str) -> None:
    thread = await live.scripted_thread()
    await ask(live, thread, "json", "say a", "k")
    headers = {"Idempotency-Key": "k", "Accept": "text/event-stream" if form == "sse" else "*/*"}
    answer = await live.post(thread, "say b", **headers, Prefer="respond-async" if form == "202" else "")
    is_problem(answer, 422, "idempotency_mismatch")
    assert len((await live.get(thread))["messages"]) == 2


async def test_bodies_are_compared_after_parsing(live: Live) -> None:
    thread = await live.scripted_thread()
    body = {"content": "say ü", "metadata": {"x": 1, "y": [2]}}
    key = {"Idempotency-Key": "k", "Content-Type": "application/json"}
    first = await live.http.post(f"{thread}/messages", json=body, headers=key)
    spelled = b'{"metadata": {"y": [2],\n"x": 1}, "role": "user", "content": "say \\u00fc", "attachments": []}'
    again = await live.http.post(f"{thread}/messages", content=spelled, headers=key)
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json() == first.json()


@pytest.mark.parametrize("form", FORMS)
async def test_a_failure_that_may_be_retried_frees_its_key(live: Live, form: str) -> None:
    thread = await live.scripted_thread()
    script = "say half\noverload Come back later."
    first, _, _ = await ask(live, thread, "json", script, "k")
    async with live.watching(thread) as watcher:
        await anext(watcher)
        second, replayed, _ = await ask(live, thread, form, script, "k")
        await ended(watcher)
    assert (second != first, replayed) == (True, False)
    question, one, two = (await live.get(thread))["messages"]
    assert (one["id"], two["id"]) == (first, second)
    assert [message["metadata"]["run"]["in_reply_to"] for message in (one, two)] == [question["id"]] * 2


@pytest.mark.parametrize("form", FORMS)
async def test_a_failure_that_may_not_be_retried_is_replayed(live: Live, form: str) -> None:
    thread = await live.scripted_thread()
    first, _, _ = await ask(live, thread, "json", "fail It is broken.", "k")
    again, replayed, answer = await ask(live, thread, form, "fail It is broken.", "k")
    assert (again, replayed) == (first, True)
    assert answer.status_code == (200 if form == "sse" else 502)
    assert len((await live.get(thread))["messages"]) == 2


async def test_a_key_is_checked_before_busy_and_archived(live: Live, gate: str) -> None:
    thread = await live.scripted_thread()
    done, _, _ = await ask(live, thread, "json", "say a", "k")
    await live.post(thread, f"hold {gate}", Prefer="respond-async")
    assert (await ask(live, thread, "json", "say a", "k"))[:2] == (done, True)
    await live.http.patch(thread, json={"archived": True})
    assert (await ask(live, thread, "json", "say a", "k"))[:2] == (done, True)
    live.gates.release(gate)


async def test_a_refusal_is_not_remembered(live: Live, gate: str) -> None:
    thread = await live.scripted_thread()
    await live.post(thread, f"hold {gate}", Prefer="respond-async")
    is_problem(await live.post(thread, "say a", **{"Idempotency-Key": "k"}), 409, "thread_busy", "message_id")
    async with live.watching(thread) as watcher:
        await anext(watcher)
        live.gates.release(gate)
        await ended(watcher)
    _, replayed, answer = await ask(live, thread, "json", "say a", "k")
    assert (answer.status_code, replayed) == (201, False)


async def test_a_key_of_a_message_that_is_only_stored_stores_it_once(live: Live) -> None:
    thread = await live.scripted_thread()
    key = {"Idempotency-Key": "k"}
    body = {"content": "x", "role": "system"}
    first = await live.http.post(f"{thread}/messages", json=body, headers=key)
    again = await live.http.post(f"{thread}/messages", json=body, headers=key)
    assert (again.status_code, again.headers["idempotency-replayed"]) == (201, "true")
    assert again.json() == first.json()
    assert (await live.get(thread))["messages"] == [first.json()]


async def test_a_busy_thread_refuses_or_is_interrupted(live: Live, gate: str) -> None:
    thread = await live.scripted_thread()
    first = await live.post(thread, f"say half\nhold {gate}", Prefer="respond-async")
    await live.gates.reached(gate)
    problem = is_problem(await live.post(thread, "say b"), 409, "thread_busy", "message_id")
    assert problem["message_id"] == first.json()["id"]
    answer = await live.http.post(f"{thread}/messages", params={"if_busy": "interrupt"}, json={"content": "say b"})
    assert (answer.status_code, answer.json()["content"]) == (201, "b")
    stopped = await live.get(first.headers["location"])
    assert (stopped["content"], stopped["metadata"]["run"]["status"]) == ("half", "cancelled")
    assert [message["role"] for message in (await live.get(thread))["messages"]] == ["user", "assistant"] * 2


async def test_a_cancelled_run_stores_its_text_and_is_returned_to_the_waiting_client(live: Live, gate: str) -> None:
    thread = await live.scripted_thread()
    waiting = asyncio.create_task(live.post(thread, f"say half\nopen x\nhold {gate}"))
    await live.gates.reached(gate)
    answer = await live.http.post(f"{await running(live, thread)}/cancel")
    assert answer.status_code == 200
    message = is_message(answer.json())
    assert (message["content"], message["metadata"]["run"]["status"]) == ("half", "cancelled")
    assert message["tool_calls"][0]["error"]
    waited = await waiting
    assert (waited.status_code, waited.json()) == (201, message)
    assert await live.get(waited.headers["location"]) == message
    again = await live.http.post(f"{waited.headers['location']}/cancel")
    assert (again.status_code, again.json()) == (200, message)
    assert (await live.post(thread, "say on")).status_code == 201


async def test_cancelling_a_finished_run_changes_nothing(live: Live) -> None:
    thread = await live.scripted_thread()
    done = await live.post(thread, "say a")
    before = await live.get(thread)
    answer = await live.http.post(f"{done.headers['location']}/cancel")
    assert (answer.status_code, answer.json()) == (200, done.json())
    assert await live.get(thread) == before


async def test_a_message_is_found_under_its_own_thread_only(live: Live) -> None:
    thread = await live.scripted_thread()
    other = await live.thread(thread.split("/")[4])
    message_id = (await live.post(thread, "say a")).json()["id"]
    for path in (f"{other}/messages/{message_id}", f"{thread}/messages/{NOBODY}", f"{thread}/messages/nonsense"):
        is_problem(await live.http.get(path), 404, "message_not_found")
        is_problem(await live.http.post(f"{path}/cancel"), 404, "message_not_found")
    for before in (NOBODY, "nonsense"):
        is_invalid(await live.http.get(f"{thread}/messages", params={"before": before}), "before")
    is_invalid(await live.http.get(f"{other}/messages", params={"before": message_id}), "before")


@pytest.mark.parametrize(
    ("body", "html"),
    [
        ({"content": "*x* <b>"}, '<p dir="auto"><em>x</em> &lt;b&gt;</p>\n'),
        ({"content": "[a](javascript:alert(1))"}, '<p dir="auto">[a](javascript:alert(1))</p>\n'),
        ({"content": "x", "content_html": "<b onclick=a()>x</b><script>y</script>"}, "<b>x</b>"),
        ({"content": "x", "content_html": ""}, ""),
    ],
)
async def test_html_is_rendered_from_the_content_or_the_clients_own_sanitized(
    live: Live, body: dict[str, Any], html: str
) -> None:
    thread = await live.scripted_thread()
    answer = await live.http.post(f"{thread}/messages", json={**body, "role": "system"})
    assert is_message(answer.json())["content_html"] == html
    asked = await live.http.post(f"{thread}/messages", json=body)
    assert asked.status_code == 201
    assert (await live.get(thread))["messages"][1]["content_html"] == html


async def test_an_empty_message_and_the_servers_metadata_are_refused(live: Live) -> None:
    thread = await live.scripted_thread()
    path = f"{thread}/messages"
    is_invalid(await live.http.post(path, json={"content": ""}), "content")
    is_invalid(await live.http.post(path, json={"content": "x", "metadata": {"run": None}}), "metadata.run")
    is_invalid(await live.http.post(path, json={"content": "x", "attachments": [{"id": NOBODY}]}), "attachments[0].id")
    assert await live.get(path) == []


async def test_a_post_with_an_empty_last_event_id_is_an_ordinary_message(live: Live) -> None:
    thread = await live.scripted_thread()
    for headers in ({"Accept": "text/event-stream"}, {}):
        sent = {"Last-Event-ID": "", **headers}
        response = await live.http.post(f"{thread}/messages", json={"content": "say stored"}, headers=sent)
        assert "stored" in response.text
    assert [message["content"] for message in await live.get(f"{thread}/messages")] == ["say stored", "stored"] * 2


async def test_a_post_with_a_last_event_id_is_a_resume_and_never_a_message(live: Live) -> None:
    thread = await live.scripted_thread()
    stream = await live.streamed(thread, "count 5")
    before = await live.get(thread)
    rest = await live.streamed(thread, "say more", **{"Last-Event-ID": stream[2].id})
    assert [frame.raw for frame in rest] == [frame.raw for frame in stream[3:]]
    assert await live.streamed(thread, "say more", **{"Last-Event-ID": stream[-1].id}) == []
    [snapshot, *_] = await live.streamed(thread, "say more", **{"Last-Event-ID": "nonsense"})
    assert snapshot.event == "thread.snapshot"
    assert await live.get(thread) == before


async def test_watching_begins_with_a_snapshot_and_the_header_wins_over_the_query(live: Live) -> None:
    thread = await live.scripted_thread()
    stream = await live.streamed(thread, "count 5")
    async with live.watching(thread) as watcher:
        snapshot = await anext(watcher)
    assert snapshot.event == "thread.snapshot"
    assert is_thread(snapshot.data["thread"]) == await live.get(thread)
    path = f"{thread}/events?after={stream[1].id}"
    for headers, index in (({"Last-Event-ID": stream[3].id}, 4), ({}, 2)):
        async with live.http.stream("GET", path, headers=headers) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert (await anext(frames(answer))).raw == stream[index].raw


async def test_head_answers_as_get_would_without_a_body(live: Live) -> None:
    thread = await live.scripted_thread()
    position = (await live.streamed(thread, "say a"))[1].id
    for path in (thread, f"{thread}/messages", f"{thread}/events", f"{thread}/events?after={position}"):
        answer = await live.http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


async def test_a_watcher_receives_title_changes_and_the_deletion(live: Live) -> None:
    thread = await live.scripted_thread()
    async with live.watching(thread) as watcher:
        await anext(watcher)
        patched = await live.http.patch(thread, json={"title": "x"})
        updated = await anext(watcher)
        await live.http.delete(thread)
        deleted = [frame async for frame in watcher]
    assert (updated.event, updated.data["thread"]) == ("thread.updated", {**patched.json(), "messages": []})
    assert [(frame.event, frame.data["thread_id"]) for frame in deleted] == [
        ("thread.deleted", thread.rpartition("/")[2])
    ]
