"""A live server does what its OpenAPI document describes."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
from jsonschema import Draft202012Validator, FormatChecker  # type: ignore[import-untyped]

from agent_chat.stores.models import JSONObject
from tests.support.servers import Live, live_server

SCRIPT = """think hm
say Before
tool current_time {}
result lookup {"a": [1]}
say after"""


@pytest.fixture(scope="module")
async def live(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    async with live_server(tmp_path_factory.mktemp("data")) as live:
        yield live


class Validator:
    """Validates values against the document's schemas; members that are not declared are refused too."""

    def __init__(self, document: JSONObject) -> None:
        self._components = document["components"]
        for name, schema in self._components["schemas"].items():
            if schema.get("properties") and name != "MessageMetadata":
                schema["additionalProperties"] = False

    def check_event(self, event: JSONObject) -> None:
        reference = self._components["schemas"]["Event"]["discriminator"]["mapping"][event["type"]]
        self.check(reference.rpartition("/")[2], event)

    def check(self, name: str, value: object) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": self._components}
        Draft202012Validator(schema, format_checker=FormatChecker()).validate(value)


async def test_responses_events_and_problems_fit_their_schemas(live: Live) -> None:
    validator = Validator(await live.get("/openapi.json"))
    agent = await live.agent(mcp_servers=["demo"], metadata={"a": {"b": 1}})
    validator.check("Agent", agent)
    thread = await live.thread(agent["id"])
    frames = [*await live.streamed(thread, SCRIPT), *await live.streamed(thread, "say x\nfail broken")]
    seen = {frame.event for frame in frames}
    assert seen >= {"message.created", "run.started", "message.delta", "reasoning.delta", "tool_call.started"}
    assert seen >= {"tool_call.completed", "run.completed", "run.failed"}
    for frame in frames:
        validator.check_event(frame.data)
    validator.check("Thread", await live.get(thread))
    for message in await live.get(f"{thread}/messages"):
        validator.check("Message", message)
    files = {"files": ("a.txt", b"text")}
    for attachment in (await live.http.post(f"{thread}/attachments", files=files)).json():
        validator.check("Attachment", attachment)
    async with live.watching(thread) as watched:
        validator.check_event((await anext(watched)).data)
    failed = await live.post(thread, "fail broken")
    assert failed.status_code == 502
    validator.check("Problem", failed.json())
    validator.check("Readiness", await live.get("/readyz"))
    validator.check("Liveness", await live.get("/healthz"))


_UNDECLARED = {"content-type", "content-length", "date", "cache-control", "x-accel-buffering", "transfer-encoding"}
"""Headers of the transport and for proxies. Security headers (`X-Content-Type-Options` and others) are not listed."""
_SECURITY = {"x-content-type-options", "content-security-policy", "referrer-policy", "x-frame-options"}


async def test_every_header_of_a_response_is_declared(live: Live) -> None:
    document: JSONObject = await live.get("/openapi.json")
    thread = await live.scripted_thread()
    pattern = "/api/v1/chat/{agent_id}/threads/{thread_id}"
    files = {"files": ("a.txt", b"text")}
    uploaded = await live.http.post(f"{thread}/attachments", files=files)
    file = f"{thread}/attachments/{uploaded.json()[0]['id']}"
    threads = thread.rpartition("/")[0]
    await live.http.post(threads)
    keyed = {"Idempotency-Key": "headers"}
    asked = [
        ("post", f"{pattern}/messages", await live.post(thread, "say hello", **keyed)),
        ("post", f"{pattern}/messages", await live.post(thread, "say hello", **keyed)),
        ("post", f"{pattern}/messages", await live.post(thread, "say hello", Prefer="respond-async")),
        ("post", f"{pattern}/attachments", uploaded),
        ("get", f"{pattern}/attachments/{{attachment_id}}", await live.http.get(file)),
        ("get", f"{pattern}/attachments/{{attachment_id}}", await live.http.get(file, headers={"Range": "bytes=0-1"})),
        ("post", "/api/v1/chat/{agent_id}/threads", await live.http.post(threads, headers=keyed)),
        ("post", "/api/v1/chat/{agent_id}/threads", await live.http.post(threads, headers=keyed)),
        ("get", "/api/v1/chat/{agent_id}/threads", await live.http.get(threads, params={"limit": 1})),
        ("get", pattern, await live.http.get(thread)),
        ("get", pattern, await live.http.get(f"{threads}/{uuid4()}")),
    ]
    seen = set[str]()
    for method, path, response in asked:
        responses = document["paths"][path][method]["responses"]
        declared = {name.lower() for name in responses[str(response.status_code)]["headers"]}
        found = set(response.headers.keys()) - _UNDECLARED - _SECURITY
        assert found <= declared, (method, path, response.status_code)
        seen |= found
    assert seen >= {"location", "link", "idempotency-replayed", "preference-applied", "content-range", "x-request-id"}


async def test_every_declared_query_parameter_is_checked_by_its_endpoint(live: Live) -> None:
    document: JSONObject = await live.get("/openapi.json")
    [_, agent_id, _, thread_id] = (await live.scripted_thread()).rsplit("/", 3)
    checked = 0
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            filled = path.format(agent_id=agent_id, thread_id=thread_id, message_id=uuid4(), attachment_id=uuid4())
            for parameter in operation["parameters"]:
                if parameter["in"] != "query" or parameter["schema"] == {"type": "string"}:
                    continue
                for value in _bad_values(parameter["schema"]):
                    json = {"content": "x"} if method == "post" else None
                    refused = await live.http.request(method, filled, params={parameter["name"]: value}, json=json)
                    assert (refused.status_code, refused.json()["field"]) == (422, parameter["name"]), (path, value)
                    checked += 1
    assert checked > 10


def _bad_values(schema: JSONObject) -> list[Any]:
    """Values that the schema refuses; none for free text."""
    bad = [schema[bound] + step for bound, step in (("minimum", -1), ("maximum", 1)) if bound in schema]
    free = schema["type"] == "string" and not {"enum", "format"} & set(schema)
    return bad if free else [*bad, "x", ""]


async def test_the_docs_page_loads_everything_from_this_server(live: Live) -> None:
    page = await live.http.get("/docs", headers={"Authorization": ""})
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert "unsafe" not in page.headers["Content-Security-Policy"]
    loaded = re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page.text)
    assert loaded
    for path in loaded:
        assert (await live.http.get(f"/{path}", headers={"Authorization": ""})).status_code == 200, path
