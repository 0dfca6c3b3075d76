"""Any invalid request gets a 4xx problem that names the field, and the server still works.

Every test also sees that nothing was logged as an error: an answer of 422 with a stack trace in the log is a bug too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from agent_chat.server import inputs
from tests.support.client import KEY, frames
from tests.support.servers import Live, live_server
from tests.support.shapes import PROBLEM_KEYS, is_invalid, is_problem

NOBODY = "00000000-0000-4000-8000-000000000000"
MEGABYTE = 2**20
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
AGENTS, AGENT, THREADS, THREAD, MESSAGES = "agents", "agent", "threads", "thread", "messages"


class Place(msgspec.Struct, frozen=True):
    """A route that takes a body: a body that it accepts, and for each field values that it doesn't."""

    method: str
    path: str
    good: dict[str, Any]
    bad: dict[str, list[Any]]


_AGENT_FIELDS: dict[str, list[Any]] = {
    "name": ["", "x" * 201, None, 1, []],
    "kind": [None, 1, "nothing", ""],
    "model": ["", "x" * 201, 1, {}],
    "instructions": [None, 1, "x" * 200_001],
    "mcp_servers": [None, "demo", {}],
    "tools": ["calculate", {}, 1],
    "max_tokens": [0, -1, 1_000_001, 10**30, 1.5, "1", True],
    "is_default": [None, 1, "true"],
    "metadata": [None, [], "x"],
}
PLACES = {
    AGENTS: Place("POST", "/api/v1/agents", {"name": "x", "kind": "scripted"}, _AGENT_FIELDS),
    AGENT: Place("PATCH", "/api/v1/agents/{agent_id}", {}, _AGENT_FIELDS),
    THREADS: Place(
        "POST",
        "/api/v1/chat/{agent_id}/threads",
        {},
        {
            "agent_id": [None, 1, "", "nonsense", NOBODY, "default", []],
            "title": [None, 1, "x" * 501, ["x"]],
            "external_id": [None, 1, "", "x" * 256, ["x"]],
            "metadata": [None, [], "x", 1],
        },
    ),
    THREAD: Place(
        "PATCH",
        "/api/v1/chat/{agent_id}/threads/{thread_id}",
        {},
        {"title": [None, 1, "x" * 501, {}], "archived": [None, 0, 1, "false", "true", []]},
    ),
    MESSAGES: Place(
        "POST",
        "/api/v1/chat/{agent_id}/threads/{thread_id}/messages",
        {"content": "x", "role": "system"},
        {
            "content": ["", None, 1, [], {"text": "x"}],
            "content_html": [None, 1, []],
            "role": ["tool", "User", "", None, 1],
            "metadata": [None, [], "x", 1],
            "attachments": [None, {}, "x"],
        },
    ),
}
ALL = pytest.mark.parametrize("name", PLACES)


class World(msgspec.Struct, frozen=True):
    live: Live
    ids: dict[str, str]

    def path(self, name: str) -> str:
        return PLACES[name].path.format(**self.ids)

    async def send(self, name: str, content: bytes, **headers: str) -> httpx.Response:
        headers = {"Content-Type": "application/json", **headers}
        return await self.live.http.request(PLACES[name].method, self.path(name), content=content, headers=headers)

    async def send_fields(self, name: str, /, **fields: Any) -> httpx.Response:
        """A good body with these fields in it, everything escaped that JSON can escape."""
        return await self.send(name, json.dumps({**PLACES[name].good, **fields}).encode())


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with live_server(tmp_path_factory.mktemp("bad_input")) as live:
        thread = await live.scripted_thread()
        yield World(live, {"agent_id": thread.split("/")[4], "thread_id": thread.rpartition("/")[2]})


@pytest.fixture
async def world(server: World, caplog: pytest.LogCaptureFixture) -> AsyncIterator[World]:
    """The server; afterwards it still takes a message, and logged no error."""
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).addHandler(caplog.handler)
    try:
        yield server
        assert (await server.send_fields(MESSAGES)).status_code == 201
    finally:
        for name in ("uvicorn", "uvicorn.error"):
            logging.getLogger(name).removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_the_places_are_all_the_routes_that_have_fields() -> None:
    fields = {
        struct: set(struct.__struct_fields__)
        for struct in (
            inputs.AgentCreate,
            inputs.AgentUpdate,
            inputs.ThreadCreate,
            inputs.ThreadUpdate,
            inputs.MessageCreate,
        )
    }
    assert [set(place.bad) for place in PLACES.values()] == list(fields.values())


@ALL
@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"{'content': 'x'}",
        b'{"a": 1,}',
        b"nonsense",
        b"\x00",
        b"{} {}",
        b'{"title": NaN}',
        b'\xef\xbb\xbf{"a": 1}',
        b'{"title": "\xff\xfe", "content": "\xff", "name": "\xff"}',
        b'{"metadata": {"\xed\xa0\x80": 1}}',
        b'{"title": "\\ud800", "content": "\\ud800", "name": "\\ud800"}',
        b'{"metadata": {"a": "\\udc00x"}, "title": "\\ud83d\\ud83d", "content": "\\udfff", "name": "\\ud800x"}',
        b'{"title": "a\nb", "content": "a\nb", "name": "a\nb"}',
        '{"content": "x"}'.encode("utf-16"),
    ],
)
async def test_what_is_not_json_in_utf8_is_malformed(world: World, name: str, content: bytes) -> None:
    answer = await world.send(name, content)
    if answer.status_code == 422:  # seen first: a field that this route doesn't have, or one that it must have
        assert "field `" in is_problem(answer, 422, "invalid_request", "field")["detail"]
    else:
        is_problem(answer, 400, "malformed_body")


@ALL
@pytest.mark.parametrize("content", [b"null", b"[]", b'"x"', b"1", b"true", b"[" * 100_000])
async def test_a_body_that_is_no_object_is_refused(world: World, name: str, content: bytes) -> None:
    is_invalid(await world.send(name, content), "body")


@pytest.mark.parametrize("name", [AGENTS, AGENT, THREAD, MESSAGES])
async def test_a_body_that_must_be_there_is_missed(world: World, name: str) -> None:
    is_problem(await world.send(name, b""), 400, "malformed_body")


@pytest.mark.parametrize(("name", "field"), [(AGENTS, "name"), (MESSAGES, "content")])
async def test_a_field_that_must_be_there_is_named(world: World, name: str, field: str) -> None:
    is_invalid(await world.send(name, b"{}"), field)


@ALL
@pytest.mark.parametrize("field", ["unknown", "id", "Title", "größe", "$.x", "a`b", "", "run", "organization_id"])
async def test_an_unknown_field_is_named(world: World, name: str, field: str) -> None:
    is_invalid(await world.send_fields(name, **{field: 1}), field or "body")


@ALL
async def test_a_very_long_unknown_field_is_cut_in_the_answer(world: World, name: str) -> None:
    answer = await world.send_fields(name, **{"x" * MEGABYTE: 1})
    assert is_problem(answer, 422, "invalid_request", "field")["field"].startswith("xxxx")
    assert len(answer.content) < 2_000


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, place in PLACES.items() for field in place.bad])
async def test_a_bad_value_is_refused_by_its_field(world: World, name: str, field: str) -> None:
    for value in PLACES[name].bad[field]:
        is_invalid(await world.send_fields(name, **{field: value}), field)


@pytest.mark.parametrize(
    ("name", "fields", "field"),
    [
        (AGENTS, {"mcp_servers": [1]}, "mcp_servers[0]"),
        (AGENTS, {"tools": ["x", None]}, "tools[1]"),
        (MESSAGES, {"attachments": [{}]}, "attachments[0].id"),
        (MESSAGES, {"attachments": [{"id": NOBODY, "x": 1}]}, "attachments[0].x"),
        (MESSAGES, {"attachments": [{"id": "nonsense"}]}, "attachments[0].id"),
        (MESSAGES, {"attachments": [{"id": 1}]}, "attachments[0].id"),
        (MESSAGES, {"metadata": {"run": {}}}, "metadata.run"),
    ],
)
async def test_a_bad_value_inside_a_field_is_named(world: World, name: str, fields: dict[str, Any], field: str) -> None:
    is_invalid(await world.send_fields(name, **fields), field)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        (name, field)
        for name, place in PLACES.items()
        for field in place.bad
        if field in ("name", "model", "instructions", "title", "content", "content_html", "kind", "agent_id")
    ],
)
async def test_a_nul_in_text_is_refused(world: World, name: str, field: str) -> None:
    is_invalid(await world.send_fields(name, **{field: "a\0b"}), field)


@pytest.mark.parametrize("name", [AGENTS, AGENT, THREADS, MESSAGES])
@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"a": "\0"}, "metadata.a"),
        ({"a": [1, {"b": "x\0"}]}, "metadata.a[1].b"),
        ({"a\0b": 1}, "metadata"),
        ({"a": {"\0": 1}}, "metadata.a"),
    ],
)
async def test_a_nul_in_metadata_is_refused(world: World, name: str, metadata: dict[str, Any], field: str) -> None:
    is_invalid(await world.send_fields(name, metadata=metadata), field)


@pytest.mark.parametrize("name", [AGENTS, AGENT, THREADS, MESSAGES])
@pytest.mark.parametrize("opening", ['{"a":', "["])
async def test_deep_nesting_is_refused(world: World, name: str, opening: str) -> None:
    closing = "}" if opening[0] == "{" else "]"
    for depth, fits in ((50, True), (70, False), (5_000, False), (100_000, False)):
        deep = f'{{"a":{opening * depth}1{closing * depth}}}'
        body = json.dumps({**PLACES[name].good, "metadata": "HERE"}).replace('"HERE"', deep).encode()
        answer = await world.send(name, body)
        if fits:
            assert answer.is_success, answer.text
        else:
            assert is_problem(answer, 422, "invalid_request", "field")["field"] in ("metadata", "body")


@pytest.mark.parametrize("name", [AGENTS, AGENT, THREADS, MESSAGES])
async def test_metadata_is_returned_unchanged(world: World, name: str) -> None:
    metadata: dict[str, Any] = {"": [0, -1, 10**30, 1.5, 1e300, True, None, "ü🎈\u2028", {}, []], "$a.b": {"c": [[]]}}
    answer = await world.send_fields(name, metadata=metadata)
    assert answer.is_success, answer.text
    assert answer.json()["metadata"] == metadata


@pytest.mark.parametrize("number", ["1" + "0" * 5_000, "1e999", "-1e999"])
async def test_numbers_outside_the_range_of_a_double_are_refused(world: World, number: str) -> None:
    answer = await world.send(THREADS, f'{{"metadata": {{"a": {number}}}}}'.encode())
    assert is_problem(answer, 422, "invalid_request", "field")["field"].startswith("metadata")


@pytest.mark.parametrize("name", [AGENTS, AGENT, THREADS, MESSAGES])
async def test_metadata_above_16_kb_is_too_large(world: World, name: str) -> None:
    answer = await world.send_fields(name, metadata={"a": "x" * (16 * 1024)})
    assert is_problem(answer, 413, "too_large", "field")["field"] == "metadata"
    assert (await world.send_fields(name, metadata={"a": "x" * (16 * 1024 - 8)})).is_success


@pytest.mark.parametrize("field", ["content", "content_html"])
async def test_content_above_a_megabyte_is_too_large(world: World, field: str) -> None:
    fields = {"content": "x", "content_html": "", "role": "system"}
    for text in ("x" * (MEGABYTE + 1), "ü" * (MEGABYTE // 2 + 1)):
        answer = await world.send(MESSAGES, json.dumps({**fields, field: text}, ensure_ascii=False).encode())
        assert is_problem(answer, 413, "too_large", "field")["field"] == field
    assert (await world.send_fields(MESSAGES, **{**fields, "content": "x" * MEGABYTE})).is_success


@ALL
@pytest.mark.parametrize("size", [2 * MEGABYTE + 1, 8 * MEGABYTE])
async def test_a_body_above_two_megabytes_is_too_large(world: World, name: str, size: int) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(0, size, 65_536):
            yield b" " * 65_536

    answer = await world.send(name, b" " * size)
    assert is_problem(answer, 413, "too_large", "field")["field"] == "body"
    chunked = await world.live.http.request(PLACES[name].method, world.path(name), content=parts())
    assert is_problem(chunked, 413, "too_large", "field")["field"] == "body"


@ALL
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "text/json", "nonsense", "a/b; c"])
async def test_another_content_type_is_refused(world: World, name: str, kind: str) -> None:
    answer = await world.send(name, json.dumps(PLACES[name].good).encode() or b"{}", **{"Content-Type": kind})
    is_problem(answer, 415, "unsupported_media_type")


@ALL
@pytest.mark.parametrize("kind", ["APPLICATION/JSON; charset=utf-8", "application/merge-patch+json"])
async def test_json_by_another_name_is_taken(world: World, name: str, kind: str) -> None:
    answer = await world.send(name, json.dumps(PLACES[name].good).encode(), **{"Content-Type": kind})
    assert answer.is_success, answer.text


def form(*parts: tuple[str, bytes]) -> bytes:
    """A multipart body with the boundary `b`; each part has this rest of its Content-Disposition."""
    body = b"".join(
        b"--b\r\nContent-Disposition: form-data" + disposition.encode() + b"\r\n\r\n" + data + b"\r\n"
        for disposition, data in parts
    )
    return body + b"--b--\r\n"


def field(name: str, data: bytes | str) -> tuple[str, bytes]:
    return f'; name="{name}"', data.encode() if isinstance(data, str) else data


CONTENT = field("content", "x")
NAMED: list[tuple[str, list[tuple[str, bytes]]]] = [
    *[
        ("metadata", [CONTENT, field("metadata", data)])
        for data in (
            *(
                '{"a":',
                "",
                "{'a': 1}",
                "nonsense",
                '{"a": NaN}',
                "{} {}",
                '{}, "role": "system"',
                "\0",
                b'{"a": "\xff"}',
            ),
            *("null", "[]", '"x"', "1", '{"a":' * 100_000, "[" * 100_000),
        )
    ],
    *[
        ("attachments", [CONTENT, field("attachments", data)])
        for data in ("nonsense", "", "{}", '"x"', "null", "[", '[], "role": "system"', f'[{{"id": "{NOBODY}"}}')
    ],
    ("metadata.run", [CONTENT, field("metadata", '{"run": {}}')]),
    ("metadata.a", [CONTENT, field("metadata", '{"a": "\\u0000"}')]),
    ("attachments[0]", [CONTENT, field("attachments", "[1]")]),
    ("attachments[0].id", [CONTENT, field("attachments", "[{}]")]),
    ("attachments[0].id", [CONTENT, field("attachments", '[{"id": "nonsense"}]')]),
    ("attachments[0].x", [CONTENT, field("attachments", f'[{{"id": "{NOBODY}", "x": 1}}]')]),
    *[("role", [CONTENT, field("role", role)]) for role in ("tool", "", "true", "User")],
    ("content", [field("role", "system")]),
    *[("content", [field("content", data)]) for data in ("", "a\0b", b"\xff", b"\xed\xa0\x80")],
    ("content_html", [CONTENT, field("content_html", "a\0b")]),
    *[(name, [CONTENT, field(name, "1")]) for name in ("unknown", "id", "größe", "run", "files", "message", "a`b")],
    *[(name, [CONTENT, field(name, "{}"), field(name, "{}")]) for name in ("content", "metadata", "unknown")][1:],
    ("content", [CONTENT, CONTENT]),
    ("content", [('; name="content"; filename="a.txt"', b"x")]),
    ("body", [CONTENT, ("", b"x")]),
    ("body", [CONTENT, ("; name", b"x")]),
    ("body", [CONTENT, ('; filename="a.txt"', b"x")]),
    ("body", [CONTENT, ("", b"x"), ("", b"x")]),
    ("f50", [field(f"f{number}", "x") for number in range(51)]),
]


@pytest.mark.parametrize(("name", "parts"), NAMED, ids=lambda given: given if isinstance(given, str) else "form")
async def test_what_is_wrong_in_a_form_is_named_by_its_field(
    world: World, name: str, parts: list[tuple[str, bytes]]
) -> None:
    answer = await world.send(MESSAGES, form(*parts), **FORM)
    is_invalid(answer, name)


@pytest.mark.parametrize(("name", "size"), [("metadata", 16 * 1024), ("content", MEGABYTE), ("content", 3 * MEGABYTE)])
async def test_a_field_of_a_form_that_is_too_large_is_named(world: World, name: str, size: int) -> None:
    text = json.dumps({"a": "x" * size}) if name == "metadata" else "x" * (size + 1)
    parts = [CONTENT, field(name, text)] if name == "metadata" else [field(name, text)]
    answer = await world.send(MESSAGES, form(*parts), **FORM)
    assert is_problem(answer, 413, "too_large", "field")["field"] == name


GOOD_FORM = form(field("content", "x"), field("role", "system"), field("metadata", '{"a": 1}'))


@pytest.mark.parametrize(
    ("content", "boundary"),
    [
        (GOOD_FORM, ""),
        (GOOD_FORM, "; boundary="),
        (GOOD_FORM, "; boundary=another"),
        (GOOD_FORM, "; boundary=" + "b" * 300),
        (b"", "; boundary=b"),
        (b"nonsense", "; boundary=b"),
        (json.dumps({"content": "x"}).encode(), "; boundary=b"),
        (b"--b\r\nno header\r\n\r\nx\r\n--b--\r\n", "; boundary=b"),
        (b"--b\r\n" + b"X: y\r\n" * 1_000 + b"\r\nx\r\n--b--\r\n", "; boundary=b"),
        (b"--b\r\nX: " + b"y" * 100_000 + b"\r\n\r\nx\r\n--b--\r\n", "; boundary=b"),
    ],
)
async def test_what_is_no_form_is_malformed(world: World, content: bytes, boundary: str) -> None:
    answer = await world.send(MESSAGES, content, **{"Content-Type": f"multipart/form-data{boundary}"})
    is_problem(answer, 400, "malformed_body")


async def test_a_form_that_is_torn_anywhere_is_malformed_and_stores_nothing(world: World) -> None:
    thread = await world.live.thread(world.ids["agent_id"])
    for length in range(0, len(GOOD_FORM) - 4, 5):
        answer = await world.live.http.post(f"{thread}/messages", content=GOOD_FORM[:length], headers=FORM)
        is_problem(answer, 400, "malformed_body")
    assert (await world.live.get(thread))["messages"] == []
    whole = await world.live.http.post(f"{thread}/messages", content=GOOD_FORM, headers=FORM)
    assert (whole.status_code, whole.json()["metadata"]) == (201, {"a": 1})


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("threads", "limit"),
        ("threads", "offset"),
        ("threads", "message_limit"),
        ("threads/{thread_id}", "message_limit"),
        ("threads/{thread_id}/messages", "limit"),
    ],
)
async def test_invalid_and_out_of_range_numbers_are_refused(world: World, path: str, query: str) -> None:
    path = f"/api/v1/chat/{world.ids['agent_id']}/{path.format(**world.ids)}"
    bad = ["", "-1", "x", "1.0", "1e3", "٣", "0x1", "+1", " 1", "1 ", "1_0", "9" * 30, "9" * 5_000, "null", "\0", "1,2"]
    if query != "offset":
        bad += ["101"]
    if path.endswith(world.ids["thread_id"]) or query == "limit":
        bad += ["0"]
    for value in bad:
        is_invalid(await world.live.http.get(path, params={query: value}), query)
    is_invalid(await world.live.http.get(f"{path}?{query}=%ff"), query)
    assert (await world.live.http.get(path, params={query: "1", "unknown": "x"})).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [("GET", "threads", "archived"), ("POST", "threads/{thread_id}/messages", "stream")],
)
async def test_a_boolean_is_true_or_false(world: World, method: str, path: str, query: str) -> None:
    path = f"/api/v1/chat/{world.ids['agent_id']}/{path.format(**world.ids)}"
    for value in ("", "True", "1", "yes", "null", "\0"):
        answer = await world.live.http.request(
            method, path, params={query: value}, json={"content": "x"} if method == "POST" else None
        )
        is_invalid(answer, query)


async def test_other_parameters_are_refused_by_name(world: World) -> None:
    messages = world.path(MESSAGES)
    body = {"content": "x"}
    for value in ("", "Reject", "cancel", "\0"):
        is_invalid(await world.live.http.post(messages, params={"if_busy": value}, json=body), "if_busy")
    for value in ("", "x", NOBODY, NOBODY.upper(), "\0"):
        is_invalid(await world.live.http.get(messages, params={"before": value}), "before")


@pytest.mark.parametrize("key", ["", "x" * 256, "a\u00adb", b"\x80", b"\xa0"])
@pytest.mark.parametrize("name", [THREADS, MESSAGES])
async def test_a_bad_idempotency_key_is_refused(world: World, name: str, key: str | bytes) -> None:
    headers = [(b"Idempotency-Key", key if isinstance(key, bytes) else key.encode("latin-1"))]
    answer = await world.live.http.post(world.path(name), json=PLACES[name].good, headers=headers)
    is_invalid(answer, "Idempotency-Key")


@pytest.mark.parametrize("position", [b"nonsense", b"\xff\xfe", b"-", b"9" * 5_000, b"1-1", b"0-0", b"$", b"*", b"%00"])
async def test_an_invalid_position_gets_a_snapshot_and_no_error(world: World, position: bytes) -> None:
    path = world.path(MESSAGES).removesuffix("/messages") + "/events"
    headers = [(b"Last-Event-ID", position)]
    async with world.live.http.stream("GET", path, headers=headers) as answer:
        assert answer.status_code == 200
        assert (await anext(frames(answer))).event == "thread.snapshot"
    async with world.live.http.stream("GET", path, params={"after": position.decode("latin-1")}) as answer:
        assert answer.status_code == 200
        assert (await anext(frames(answer))).event == "thread.snapshot"
    async with world.live.http.stream("POST", world.path(MESSAGES), headers=headers, content=b"{") as answer:
        assert answer.status_code == 200
        assert (await anext(frames(answer))).event == "thread.snapshot"


@pytest.mark.parametrize(
    "value", [b"", b"Bearer", b"Bearer \xff\xfe", b"Basic eDp5", b"\xff", b"Bearer " + b"x" * 20_000, b","]
)
async def test_a_bad_authorization_is_401(world: World, value: bytes) -> None:
    headers = [(b"Authorization", value)]
    is_problem(await world.live.http.get("/api/v1/agents", headers=headers), 401, "unauthenticated")
    is_problem(await world.live.http.post("/api/v1/agents", content=b"{", headers=headers), 401, "unauthenticated")


async def test_nonsense_in_other_headers_is_no_reason_to_fail(world: World) -> None:
    for prefer in (b"wait=x", b"wait=-1", b"wait=" + b"9" * 500, b"wait", b",;=,", b"\xff", b'wait="', b""):
        headers = [(b"Prefer", prefer), (b"Accept", b"\xff;q=x"), (b"Cookie", b"\xff=;;"), (b"Origin", b"\xff")]
        answer = await world.live.http.post(world.path(MESSAGES), json=PLACES[MESSAGES].good, headers=headers)
        assert answer.status_code == 201, answer.text


@pytest.mark.parametrize(
    "bad",
    [
        "nonsense",
        "%00",
        "%ff",
        "%F0%9F%8E%88",
        "..%2f..",
        NOBODY.upper(),
        "x" * 10_000,
        "'; DROP TABLE x",
        "{x}",
        "$ne",
    ],
)
async def test_a_bad_id_in_a_path_is_not_found(world: World, bad: str) -> None:
    agents, chat = "/api/v1/agents", f"/api/v1/chat/{world.ids['agent_id']}/threads"
    thread = f"{chat}/{world.ids['thread_id']}"
    for method, path, body in (
        ("GET", f"{agents}/{bad}", None),
        ("PATCH", f"{agents}/{bad}", {}),
        ("DELETE", f"{agents}/{bad}", None),
        ("GET", f"/api/v1/chat/{bad}/threads", None),
        ("POST", f"/api/v1/chat/{bad}/threads", {}),
        ("GET", f"/api/v1/chat/{bad}/threads/{world.ids['thread_id']}", None),
        ("GET", f"{chat}/{bad}", None),
        ("PATCH", f"{chat}/{bad}", {"title": "x"}),
        ("DELETE", f"{chat}/{bad}", None),
        ("POST", f"{chat}/{bad}/generate_title", None),
        ("POST", f"{chat}/{bad}/messages", {"content": "x"}),
        ("GET", f"{chat}/{bad}/messages", None),
        ("GET", f"{chat}/{bad}/events", None),
        ("GET", f"{thread}/messages/{bad}", None),
        ("POST", f"{thread}/messages/{bad}/cancel", None),
        ("GET", f"/{bad}", None),
    ):
        answer = await world.live.http.request(method, path, json=body)
        assert is_problem(answer, 404, answer.json()["code"])["code"].endswith("not_found")


async def test_a_client_that_leaves_in_the_middle_of_its_body_does_no_harm(world: World) -> None:
    url = httpx.URL(world.live.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = (
        f"POST {world.path(MESSAGES)} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 99\r\n\r\n"
    )
    writer.write(head.encode() + b'{"content"')
    await writer.drain()
    writer.write_eof()
    async with asyncio.timeout(10):
        await reader.read()
    writer.close()


_ODD: list[Any] = [
    None, True, False, 0, -1, 2**63, 10**40, 1.5, -0.0, 1e308, "", "x", "say hello", "\0", "\ud800", "ü🎈", "default",
    "true", NOBODY, "x" * 600, "../..", "$where", [], [[]], [None], ["demo"], {}, {"id": NOBODY}, {"run": 1},
    {"": {"": []}}, {"$set": {"a.b": 1}}, [{"id": "x"}] * 3, "system", "user", "assistant", "scripted",
]  # fmt: skip
_OTHERS = [
    ("GET", "/api/v1/agents/{agent_id}"),
    ("GET", "/api/v1/chat/{agent_id}/threads"),
    ("GET", "/api/v1/chat/{agent_id}/threads/{thread_id}"),
    ("GET", "/api/v1/chat/{agent_id}/threads/{thread_id}/messages"),
    ("POST", "/api/v1/chat/{agent_id}/threads/{thread_id}/generate_title"),
    ("GET", "/api/v1/chat/{agent_id}/threads/{thread_id}/messages/{message_id}"),
    ("POST", "/api/v1/chat/{agent_id}/threads/{thread_id}/messages/{message_id}/cancel"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("POST", "/api/v1/chat/conversations"),
]
_QUERIES = ["limit", "offset", "message_limit", "archived", "before", "stream", "if_busy", "after", "unknown"]
_HEADERS = ["Idempotency-Key", "Prefer", "Accept", "Content-Type", "Last-Event-ID", "Origin", "Range"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.slow
async def test_random_values_everywhere_never_get_a_5xx(world: World, seed: int) -> None:
    chance = random.Random(seed)

    def text() -> str:
        return str(chance.choice(_ODD)).encode("ascii", "ignore").decode().replace("\0", "")

    agent = await world.live.agent()
    thread = (await world.live.thread(agent["id"])).rpartition("/")[2]
    ids = {"agent_id": agent["id"], "thread_id": thread, "message_id": NOBODY}
    for _ in range(200):
        place = PLACES[chance.choice(list(PLACES))]
        method, path = chance.choice((*_OTHERS, *[(place.method, place.path)] * len(_OTHERS), ("PUT", place.path)))
        names = chance.sample([*place.bad, "unknown"], chance.randint(1, 2))
        body = {**place.good, **{name: chance.choice(_ODD) for name in names}}
        query = {name: text() for name in chance.sample(_QUERIES, chance.randint(0, 2))}
        headers = {name: text() for name in chance.sample(_HEADERS, chance.choice((0, 0, 0, 1, 2)))}
        known = {name: text() or "x" if chance.random() < 0.05 else value for name, value in ids.items()}
        answer = await world.live.http.request(
            method,
            path.format(**{name: value.replace("/", "%2f") for name, value in known.items()}),
            content=json.dumps(body).encode(),
            params=query,
            headers=headers,
        )
        said = (method, path, body, query, headers, answer.text)
        assert answer.status_code < 500, said
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == "application/problem+json", said
            assert set(answer.json()) >= PROBLEM_KEYS, said
