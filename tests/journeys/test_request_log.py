"""Request ids, lines per request and per security event, and the metrics that they are counted for."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import InvalidStatus

from agent_chat.server.log_lines import OURS, LineFormatter
from tests.support.client import KEY
from tests.support.servers import Live, live_server
from tests.support.sockets import socket

SECRET = "what nobody may read in a log"


class Lines(logging.Handler):
    """The records as they would be written, with the ids of the task that logged them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.lines: list[str] = []
        self.setFormatter(LineFormatter("json"))

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.lines.append(self.format(record))

    def of(self, name: str) -> list[dict[str, Any]]:
        return [vars(record) for record in self.records if record.name == name]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    for name in OURS:
        caplog.set_level(logging.INFO, name)
    handler = Lines()
    logging.getLogger().addHandler(handler)
    return handler


@pytest.fixture(autouse=True)
def unhandled(lines: Lines) -> Any:
    yield
    logging.getLogger().removeHandler(lines)


async def test_a_well_formed_request_id_is_returned_and_any_other_replaced(live: Live) -> None:
    for path in ("/healthz", "/api/v1/agents", "/no/such/path"):
        response = await live.http.get(path, headers={"X-Request-Id": "trace-1:a/b"})
        assert response.headers["X-Request-Id"] == "trace-1:a/b"
        for bad in ("", "two words", "a" * 129, "é"):
            made = (await live.http.get(path, headers=[(b"X-Request-Id", bad.encode())])).headers["X-Request-Id"]
            assert made != bad
            assert len(made) == 36


async def test_each_request_is_one_line_without_content_or_key(tmp_path: Path, lines: Lines) -> None:
    async with live_server(tmp_path, access_log=True) as live:
        thread = await live.scripted_thread()
        assert (await live.post(thread, f"say {SECRET}")).status_code == 201
        assert (await live.http.get(f"/?key={KEY}")).status_code < 500
        assert (await live.http.post(f"{thread}/messages", content=SECRET)).status_code in (400, 415, 422)
        async with socket(live.url, thread) as connection:
            await connection.receive()
        async with asyncio.timeout(5):
            while not any(line["method"] == "WEBSOCKET" for line in lines.of("chat.access")):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    requests = lines.of("chat.access")
    assert [(line["method"], line["status"]) for line in requests[:3]] == [("POST", 201)] * 3
    assert requests[2]["path"] == f"{thread}/messages"
    assert requests[2]["duration_ms"] > 0
    assert requests[2]["organization_id"]
    ours = [line for line in lines.lines if '"logger":"asyncio' not in line and '"logger":"http' not in line]
    assert not [line for line in ours if SECRET in line or KEY in line]


async def test_what_an_agent_raises_is_logged_with_its_ids_and_without_its_text(live: Live, lines: Lines) -> None:
    thread = await live.scripted_thread()
    response = await live.http.post(
        f"{thread}/messages", json={"content": "crash"}, headers={"X-Request-Id": "trace-2"}
    )
    assert response.status_code == 502
    (line,) = [line for line in lines.lines if "its agent failed unexpectedly" in line]
    assert '"request_id":"trace-2"' in line
    assert f'"thread_id":"{thread.rpartition("/")[2]}"' in line
    assert f'"run_id":"{response.json()["message_id"]}"' in line
    assert "RuntimeError" in line
    assert "secret internal text" not in line


async def test_deletions_are_security_events(live: Live, lines: Lines) -> None:
    agent = (await live.agent())["id"]
    thread = (await live.thread(agent)).rpartition("/")[2]
    assert (await live.http.delete(f"/api/v1/chat/{agent}/threads/{thread}")).status_code == 204
    assert (await live.http.delete(f"/api/v1/agents/{agent}")).status_code == 204
    deleted = [line for line in lines.of("chat.security") if "deleted" in line["msg"]]
    assert [(line["msg"], line.get("deleted_thread_id") or line.get("agent_id")) for line in deleted] == [
        ("thread deleted", thread),
        ("agent deleted", agent),
    ]
    assert all(line["organization_id"] and line["user_id"] for line in deleted)


def samples(live: Live) -> dict[tuple[str, str], float]:
    """Every metric by its name and its labels' values."""
    text = live.server.lifespan.state["metrics"].text().decode()
    return {
        (sample.name, " ".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.slow
async def test_metrics_count_requests_runs_calls_and_connections(live: Live) -> None:
    thread = await live.scripted_thread(mcp_servers=["demo"])
    for content in ("say hi", 'tool current_time {"timezone": "UTC"}', "tool no_such_tool {}", "open it", "fail x"):
        await live.post(thread, content)
    for _ in range(3):
        await live.http.get(f"/nowhere/{SECRET}")
    found = samples(live)
    posts = "POST /api/v1/chat/{agent_id}/threads/{thread_id}/messages"
    assert found["chat_requests_total", f"{posts} 201"] == 4
    assert found["chat_requests_total", f"{posts} 502"] == 1
    assert found["chat_response_start_seconds_count", posts.split()[1]] == 5
    assert (found["chat_runs_ended_total", "completed"], found["chat_runs_ended_total", "failed"]) == (4, 1)
    assert found["chat_run_failures_total", "agent_failed"] == 1
    assert found["chat_tool_calls_total", "succeeded"] == 1
    assert found["chat_tool_calls_total", "failed"] == 1
    assert found["chat_tool_calls_total", "interrupted"] == 1
    assert found["chat_first_text_seconds_count", ""] >= 1
    assert found["chat_connections_open", ""] >= 1
    assert found["chat_log_disk_bytes", ""] > 1000
    assert {found["chat_worker_waiting", queue] for queue in ("render", "extract")} == {0}
    assert (found["chat_loops_failing", ""], found["chat_log_unavailable", ""]) == (0, 0)
    assert (found["chat_store_failures_total", ""], found["chat_log_failures_total", ""]) == (0, 0)
    assert not [labels for _, labels in found if SECRET in labels], "labels are bounded"


async def test_requests_refused_for_their_host_are_logged_and_counted(tmp_path: Path, lines: Lines) -> None:
    async with live_server(tmp_path, access_log=True, hosts=("127.0.0.1",)) as live:
        thread = await live.scripted_thread()
        host, port = "evil.example", int(live.url.rpartition(":")[2])
        refused = await live.http.get("/docs", headers={"Host": host, "X-Request-Id": "trace-3"})
        assert (refused.status_code, refused.headers["X-Request-Id"]) == (400, "trace-3")
        with pytest.raises(InvalidStatus, match="403"):
            async with socket(f"http://{host}:{port}", thread, host="127.0.0.1", port=port):
                pass
        found = samples(live)
    seen = [(line["method"], line["status"]) for line in lines.of("chat.access")]
    assert seen[-2:] == [("GET", 400), ("WEBSOCKET", 403)]
    assert found["chat_requests_total", "GET none 400"] == 1
    assert found["chat_requests_total", "WEBSOCKET none 403"] == 1
