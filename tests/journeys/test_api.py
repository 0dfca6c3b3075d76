"""What holds for all paths: health, removed and unknown paths, wrong methods, draining."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from starlette.routing import BaseRoute, Route

from agent_chat.agents import AgentError, Run
from agent_chat.agents.registry import Kind
from agent_chat.server import app
from tests.support.scripted import Scripted
from tests.support.servers import Live, live_server
from tests.support.shapes import is_problem

NOBODY = "00000000-0000-4000-8000-000000000000"
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def methods_by_path(routes: Sequence[BaseRoute]) -> dict[str, set[str]]:
    methods: defaultdict[str, set[str]] = defaultdict(set)
    for route in routes:
        if isinstance(route, Route):
            methods[route.path] |= route.methods or set()
    return methods


@pytest.fixture(scope="module")
async def live(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    async with live_server(tmp_path_factory.mktemp("api")) as live:
        yield live


async def test_health_and_readiness_need_no_key(live: Live) -> None:
    tools = {"idle": 1, "connecting": 0, "ready": 0, "unavailable": 0}
    for path, body in (
        ("/healthz", {"status": "ok"}),
        ("/readyz", {"ready": True, "database": True, "events": True, "draining": False, "tools": tools}),
    ):
        answer = await live.http.get(path, headers={"Authorization": ""})
        assert (answer.status_code, answer.json()) == (200, body)
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", ["", "/", "/x", "/x/messages", f"/{NOBODY}/threads/{NOBODY}"])
@pytest.mark.parametrize("method", METHODS)
async def test_the_old_paths_return_410_and_name_the_new_one(live: Live, method: str, path: str) -> None:
    answer = await live.http.request(method, f"/api/v1/chat/conversations{path}")
    problem = is_problem(answer, 410, "gone", "use")
    assert problem["use"] == "/api/v1/chat/{agent_id}/threads"
    assert problem["use"] in problem["detail"]


@pytest.mark.parametrize("path", ["/nothing", "/api/v1/nothing", "/api/v1/chat", f"/api/v1/chat/{NOBODY}/thread"])
@pytest.mark.parametrize("method", METHODS)
async def test_an_unknown_path_is_a_problem(live: Live, method: str, path: str) -> None:
    is_problem(await live.http.request(method, path), 404, "not_found")


@pytest.mark.parametrize("path", sorted(methods_by_path(app.ROUTES)))
async def test_a_wrong_method_is_a_problem_that_names_the_right_ones(live: Live, path: str) -> None:
    right = methods_by_path(app.ROUTES)[path]
    ids = {"thread_id": NOBODY, "message_id": NOBODY, "attachment_id": NOBODY}
    url = path.replace("{rest:path}", "x").format(agent_id="default", **ids)
    for method in {*METHODS, "OPTIONS"} - right:
        answer = await live.http.request(method, url)
        is_problem(answer, 405, "method_not_allowed")
        assert set(answer.headers["allow"].split(", ")) == right


async def test_a_draining_server_reports_it_and_starts_no_runs(tmp_path: Path) -> None:
    async with live_server(tmp_path) as live:
        thread = await live.scripted_thread()
        await live.app.state.drain()
        assert (await live.http.get("/healthz")).status_code == 200
        ready = await live.http.get("/readyz")
        assert (ready.status_code, ready.json()["ready"], ready.json()["draining"]) == (503, False, True)
        answer = await live.post(thread, "say hello", **{"Idempotency-Key": "k"})
        is_problem(answer, 503, "draining")
        assert int(answer.headers["retry-after"]) > 0
        assert (await live.get(thread))["messages"] == []


async def test_an_agent_that_can_not_make_a_title_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_title(run: Run) -> str:
        raise AgentError("No words today.", code="agent_overloaded", retryable=True)

    monkeypatch.setitem(app.KINDS, "untitled", Kind(Scripted(), no_title))
    async with live_server(tmp_path) as live:
        thread = await live.scripted_thread(kind="untitled")
        await live.post(thread, "say hello")
        answer = await live.http.post(f"{thread}/generate_title")
        assert is_problem(answer, 503, "agent_overloaded", "retryable")["detail"] == "No words today."
        assert (await live.get(thread))["title"] == ""
