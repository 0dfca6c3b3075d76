"""`agent-chat import` and `agent-chat export`, on both databases."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from agent_chat.server.command_line import main
from agent_chat.stores.models import new_id, timestamp
from tests.support.backends import mongo_server as mongo_server
from tests.support.backends import mongo_url as mongo_url
from tests.support.client import Client
from tests.support.samples import AWKWARD, an_attachment
from tests.support.servers import live_server

GUIDE = Path(__file__).parents[2] / "server" / "ai_chat_service.md"
START = datetime(2024, 5, 1, 12, tzinfo=UTC)
Line = dict[str, Any]


class Installation:
    """A data folder, or a database, with the organization `acme`. `key` is of its user `ada`."""

    def __init__(self, data_dir: Path, database_url: str | None = None) -> None:
        self.data_dir = data_dir
        self.environment = {"CHAT_DATA_DIR": str(data_dir), "CHAT_LOG_LEVEL": "warning"}
        if database_url:
            self.environment |= {
                "CHAT_DATABASE_URL": database_url,
                "CHAT_EVENTS_URL": "redis://127.0.0.1:1",  # required, but not opened
            }
        self.key = self.create_key("acme")

    def create_key(self, organization: str) -> str:
        return self.run("keys", "create", "--organization", organization, "--user", "ada").stdout.split()[-1]

    def run(self, *words: str, data: bytes | None = None, status: int = 0) -> Result:
        result = CliRunner().invoke(main, words, env=self.environment, input=data)
        assert result.exit_code == status, result.output
        return result

    def load(self, lines: list[Line], *options: str, organization: str = "acme", status: int = 0) -> Result:
        words = ("import", "-", "--organization", organization, *options)
        return self.run(*words, data=encode(lines), status=status)

    def export(self, *options: str, organization: str = "acme") -> list[Line]:
        result = self.run("export", "--organization", organization, *options)
        return [json.loads(line) for line in result.stdout_bytes.splitlines()]


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return Installation(tmp_path / "data")


@pytest.fixture(params=["sqlite", pytest.param("mongodb", marks=pytest.mark.slow)])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Installation:
    """An installation on each database."""
    url = request.getfixturevalue("mongo_url") if request.param == "mongodb" else None
    return Installation(tmp_path / "data", url)


def encode(lines: list[Line]) -> bytes:
    return b"".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for line in lines)


def at(seconds: float) -> str:
    return timestamp(START + timedelta(seconds=seconds))


def thread_line(**fields: object) -> Line:
    line: Line = {"id": new_id(), "user": "ada", "agent": "Demo", "title": "", "metadata": {}}
    return {"type": "thread", **line, "created_at": at(0), "updated_at": at(900), "archived": False, **fields}


def message_line(thread: Line, seconds: float, role: str = "user", **fields: object) -> Line:
    """A message as it is exported. The content is one word, so that its HTML is known."""
    html = f'<p dir="auto">{role}</p>\n'
    line = {"id": new_id(), "thread_id": thread["id"], "role": role, "content": role, "content_html": html}
    rest = {"tool_calls": [], "attachments": [], "metadata": {}, "created_at": at(seconds)}
    return {"type": "message", **line, **rest, **fields}


def a_run(question: Line, calls: int = 0, **fields: object) -> Line:
    """`metadata` of an answer."""
    places = [{"id": f"toolu_{index}", "round": 0, "offset": 0} for index in range(calls)]
    run: Line = {"status": "completed", "in_reply_to": question["id"], "model": "m", "usage": {"input_tokens": 1}}
    return {"run": {**run, "stop_reason": None, "error": None, "tool_calls": places, **fields}}


def of_every_shape() -> list[Line]:
    """Threads with everything that a server stores, as they are exported."""
    external = thread_line(metadata={"thread": {"external_id": "Order 66/ä"}, "a": [1, 1.5, None]}, title="Été 🌞")
    question = message_line(external, 1, attachments=[an_attachment()], metadata={"$set": {"a.b": ""}})
    calls: list[Line] = [
        {"tool_name": "look", "arguments": AWKWARD, "result": AWKWARD, "error": None},
        {"tool_name": "s__look", "arguments": {}, "result": None, "error": "It broke.\0"},
    ]
    calls = [{**call, "start_time": at(2), "end_time": at(3)} for call in calls]
    answer = message_line(external, 2, "assistant", tool_calls=calls, metadata=a_run(question, 2))
    answer["metadata"]["run"]["reasoning"] = [{"index": 0, "after": 0, "calls": 0, "text": "Hm." * 9000}]
    empty = thread_line(archived=True)
    long = thread_line()
    asked = message_line(long, 0)
    error = {"code": "agent_failed", "detail": "No.", "retryable": True}
    failed = message_line(long, 1, "assistant", content="", content_html="")
    failed["metadata"] = a_run(asked, status="failed", error=error)
    escaped = message_line(long, 2, "system", content="a\u00a0\r\n<b>", content_html="<pre>a\u00a0\r\n&lt;b&gt;</pre>")
    boxes = '<ul dir="auto">\n<li class="task-list-item"><input type="checkbox" disabled="" aria-label="To do">'
    checked = message_line(long, 3, "assistant", content_html=f"{boxes}a</li>\n</ul>\n")
    many = [message_line(long, 10 + index, "system") for index in range(200)]
    threads = [[external, question, answer], [empty], [long, asked, failed, escaped, checked, *many]]
    return [line for thread in sorted(threads, key=lambda lines: str(lines[0]["id"])) for line in thread]


def test_an_export_equals_the_import_and_a_second_import_changes_nothing(either: Installation) -> None:
    lines = of_every_shape()
    assert "3 threads, 206 messages" in either.load(lines).stdout
    assert either.export() == lines
    assert "0 threads, 0 messages, 3 threads already there" in either.load(lines).stdout
    assert either.export() == lines


def test_another_organization_gets_new_ids(either: Installation) -> None:
    lines = of_every_shape()
    either.load(lines)
    either.create_key("other")
    for _ in range(2):
        either.load(lines, organization="other")
        copies = either.export(organization="other")
        assert len(copies) == len(lines)
        taken = {line["id"] for line in lines}
        assert not taken & {line["id"] for line in copies}
        answer = next(line for line in copies if line.get("tool_calls"))
        question = copies[copies.index(answer) - 1]
        assert answer["metadata"]["run"]["in_reply_to"] == question["id"]
        assert answer["tool_calls"] == next(line for line in lines if line.get("tool_calls"))["tool_calls"]
    assert either.export() == lines


def test_a_repeated_import_adds_what_is_new(either: Installation) -> None:
    thread = thread_line(title="Old", archived=True, updated_at=at(1))
    first, second, third = (message_line(thread, index) for index in range(3))
    either.load([thread, first, second])
    changed = {**thread, "title": "New", "updated_at": at(5)}
    result = either.load([changed, first, second, third])
    assert "0 threads, 1 messages, 1 existing threads changed" in result.stdout
    exported = either.export()
    assert exported[1:] == [first, second, third]
    assert (exported[0]["title"], exported[0]["archived"]) == ("New", True)
    either.load([{**thread, "title": "Older"}, first, message_line(thread, 1)])  # earlier than the last one
    exported = either.export()
    assert exported[0]["title"] == "New"
    assert exported[4]["created_at"] == at(2.001)
    before = either.export()
    either.load(before)
    assert either.export() == before


def test_threads_are_found_by_their_external_id(either: Installation) -> None:
    thread = thread_line(id="conversation 17", metadata={"thread": {"external_id": "17"}})
    messages = [{**message_line(thread, index), "id": str(index)} for index in range(3)]
    either.load([thread, *messages[:2]])
    either.load([{**thread, "id": "renamed"}, *[{**each, "thread_id": "renamed"} for each in messages]])
    exported = either.export()
    assert [line["type"] for line in exported] == ["thread", "message", "message", "message"]
    assert len({line["id"] for line in exported}) == 4


def test_defaults_are_filled_in(installation: Installation) -> None:
    lines: list[Line] = [
        {"type": "thread", "id": "a", "created_at": "2024-01-01T00:00:00.1239+02:00"},
        {"type": "message", "id": "1", "role": "user", "content": "**x**", "created_at": "2024-01-01T00:00:01Z"},
        {"type": "message", "id": "2", "role": "assistant", "content": "<b>", "created_at": "2024-01-01T00:00:01Z"},
    ]
    result = installation.load(lines, status=2)
    assert "line 1: The thread names no user" in result.stderr
    installation.load(lines, "--user", "bob")
    thread, question, answer = installation.export()
    assert (thread["user"], thread["agent"], thread["updated_at"]) == ("bob", "Demo", "2024-01-01T00:00:01.001Z")
    assert thread["created_at"] == "2023-12-31T22:00:00.123Z"
    assert question["content_html"] == '<p dir="auto"><strong>x</strong></p>\n'
    assert answer["content_html"] == '<p dir="auto">&lt;b&gt;</p>\n'
    assert answer["created_at"] == "2024-01-01T00:00:01.001Z"
    assert installation.export("--user", "bob") == [thread, question, answer]
    assert installation.export("--user", "ada") == []
    assert installation.export("--agent", "default") == [thread, question, answer]


def test_html_is_sanitized(installation: Installation) -> None:
    thread = thread_line()
    installation.load([thread, message_line(thread, 1, content_html="<b onclick=x>a</b><script>1</script>")])
    assert installation.export()[1]["content_html"] == "<b>a</b>"


BAD: dict[str, tuple[str, Line]] = {
    "unknown member": ("unknown field `colour`", {"colour": 1}),
    "role": ("Invalid enum value", {"role": "tool"}),
    "no time zone": ("timezone", {"created_at": "2024-01-01T00:00:00"}),
    "before the message above": ("must be in order", {"created_at": "2020-01-01T00:00:00Z"}),
    "in the future": ("between 1970 and now", {"created_at": "9999-12-31T23:59:59Z"}),
    "long ago": ("between 1970 and now", {"created_at": "0001-01-01T00:00:00+14:00"}),
    "empty": ("may be empty only", {"content": ""}),
    "too large": ("larger than", {"content": "x" * (2**20 + 1)}),
    "metadata": ("larger than", {"metadata": {"x": "x" * 2**14}}),
    "NUL": ("NUL", {"metadata": {"a": "\0"}}),
    "in progress": ("in progress", {"metadata": a_run({"id": "1"}, status="in_progress")}),
    "branch": ("reserved", {"metadata": {"branch": {}}}),
    "run": ("metadata.run", {"metadata": {"run": 1}}),
    "places of calls": ("must match", {"metadata": a_run({"id": "1"}, 1)}),
    "call without result": ("result or an error", {"tool_calls": [{"tool_name": "a"}]}),
    "thread_id": ("not the id of the thread", {"thread_id": new_id()}),
    "attachment": ("UUID", {"attachments": [{**an_attachment(), "id": "../../x"}]}),
    "nested": ("nested", {"metadata": json.loads("[" * 70 + "]" * 70) and {"a": json.loads("[" * 70 + "]" * 70)}}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_reported_and_nothing_of_its_thread_is_stored(installation: Installation, name: str) -> None:
    words, fields = BAD[name]
    good, bad = thread_line(), thread_line()
    lines = [good, message_line(good, 1), bad, message_line(bad, 1), {**message_line(bad, 2), **fields}]
    result = installation.load([*lines, thread_line()], status=2)
    message = result.stderr.splitlines()[-1]
    assert message.startswith("line 5: ")
    assert words in message
    assert installation.export() == lines[:2]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\n", "line 1: This is not JSON in UTF-8"),
        (b"\n\n{}\n", "line 3: "),
        (b"[" * 100_000, "line 1: "),
        (encode([message_line(thread_line(), 1)]), "line 1: The file must begin with a thread."),
        (encode([thread_line(agent="Nobody")]), "line 1: The organization has no agent 'Nobody'."),
        (encode([thread_line(user=new_id())]), "line 1: The organization has no user"),
        (encode([thread_line(metadata={"thread": {"head": "x"}})]), "line 1: metadata.thread"),
        (b'"' + b"x" * (16 * 2**20), "line 1: The line is longer than"),
    ],
)
def test_a_file_that_cannot_be_read_is_reported(installation: Installation, data: bytes, words: str) -> None:
    result = installation.run("import", "-", "--organization", "acme", data=data, status=2)
    assert words in result.stderr.splitlines()[-1]
    assert installation.export() == []


def test_an_id_twice_in_a_thread_is_a_bad_line(installation: Installation) -> None:
    thread = thread_line()
    message = message_line(thread, 1)
    assert "line 3: The thread has a message" in installation.load([thread, message, message], status=2).stderr


def test_an_unknown_organization_is_not_created(installation: Installation) -> None:
    for command in ("import", "export"):
        result = installation.run(command, "-", "--organization", "acne", data=b"", status=2)
        assert "There is no organization 'acne'" in result.stderr


def make_threads(count: int, messages: int) -> list[Line]:
    lines: list[Line] = []
    for thread in sorted((thread_line() for _ in range(count)), key=lambda line: str(line["id"])):
        lines += [thread, *[message_line(thread, index) for index in range(messages)]]
    return lines


@pytest.mark.slow
def test_five_hundred_threads_are_imported_once(installation: Installation) -> None:
    lines = make_threads(500, 4)
    installation.load(lines)
    assert installation.export() == lines
    assert "500 threads already there" in installation.load(lines).stdout
    assert installation.export() == lines


@pytest.mark.slow
def test_an_import_that_is_killed_is_repeated(installation: Installation, tmp_path: Path) -> None:
    lines = make_threads(400, 20)
    file = tmp_path / "threads.jsonl"
    file.write_bytes(encode(lines))
    words = [sys.executable, "-m", "server", "import", str(file), "--organization", "acme"]
    environment = {**os.environ, **installation.environment}
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        with sqlite3.connect(installation.data_dir / "chat.db") as database:
            deadline = time.monotonic() + 40
            while not database.execute("SELECT COUNT(*) FROM threads").fetchone()[0]:
                assert process.poll() is None
                assert time.monotonic() < deadline
        process.kill()
    stored = installation.export()
    assert 0 < len(stored) < len(lines)
    threads = [line["id"] for line in stored if line["type"] == "thread"]
    assert stored == [line for line in lines if line.get("thread_id", line["id"]) in threads]
    installation.load(lines)
    assert installation.export() == lines


async def test_beside_a_running_server_only_the_export_works(installation: Installation) -> None:
    async with live_server(installation.data_dir) as live:
        ada = Client(live.url, installation.key)
        try:
            agent = await ada.agent()
            thread = (await ada.http.post(f"/api/v1/chat/{agent['id']}/threads", json={"title": "Live"})).json()
            messages = f"/api/v1/chat/default/threads/{thread['id']}/messages"
            posted = await ada.http.post(messages, json={"content": "hold it"}, headers={"Prefer": "respond-async"})
            assert posted.status_code == 202
            result = await asyncio.to_thread(installation.load, [thread_line()], status=2)
            assert re.fullmatch(r"another server is using the data folder \S+\n", result.stderr)
            exported = await asyncio.to_thread(installation.export)
        finally:
            await ada.http.aclose()
    assert [(line["type"], line.get("content", "")) for line in exported] == [("thread", ""), ("message", "hold it")]
    assert exported[0]["agent"] == "Scripted"


def convert(script: str, conversations: str) -> bytes:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, input=conversations.encode(), stdout=subprocess.PIPE, check=True).stdout


async def test_the_example_of_the_guide(installation: Installation) -> None:
    """Conversations in the old shape, converted by the script in the guide, are read and continued over the API."""
    text = GUIDE.read_text()
    (conversations,) = re.findall(r"```json\n(\{\"id\".*?)```", text, re.DOTALL)
    (script,) = re.findall(r"```python\n(import json.*?)```", text, re.DOTALL)
    converted = await asyncio.to_thread(convert, script, conversations)
    async with live_server(installation.data_dir) as live:
        ada = Client(live.url, installation.key)
        agent = await ada.agent(name="Support")
        await ada.http.aclose()
    words = ("import", "-", "--organization", "acme")
    for count in (1, 0):
        result = await asyncio.to_thread(installation.run, *words, data=converted)
        assert f"{count} threads" in result.stdout
    async with live_server(installation.data_dir) as live:
        ada = Client(live.url, installation.key)
        try:
            (thread,) = (await ada.http.get(f"/api/v1/chat/{agent['id']}/threads")).json()
            assert (thread["title"], thread["archived"], thread["created_at"]) == (
                "Ports",
                True,
                "2024-03-01T08:00:00.000Z",
            )
            assert thread["metadata"] == {"thread": {"external_id": "conv_17"}}
            question, answer = thread["messages"]
            assert (question["content"], question["created_at"]) == ("Which port is it?", "2024-03-01T08:00:00.250Z")
            assert answer["content_html"] == '<p dir="auto">It is <strong>8000</strong>.</p>\n'
            assert answer["tool_calls"][0]["result"] == {"text": "PORT=8000"}
            path = f"/api/v1/chat/default/threads/{thread['id']}"
            await ada.http.patch(path, json={"archived": False})
            reply = await ada.http.post(f"{path}/messages", json={"content": "Thanks!"})
            assert reply.status_code == 201, reply.text
        finally:
            await ada.http.aclose()
