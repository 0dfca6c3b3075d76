"""Records a server of another version: fills it through its HTTP API and prints what the API then returns, as JSON.

    python -m tests.support.recording URL KEY [OTHER_KEY]

The keys belong to two organizations. The last run is still in progress when this ends, so that the server can be killed
in it. A migration test reads everything again (`read`) from a server that has opened the same data, and compares.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import httpx

from tests.support.samples import AWKWARD

JSON = dict[str, Any]

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c4944415408d763f8cfc000000301010018dd8db00000000049454e44ae426082"
)
FILES = [
    ("files", ("notes.txt", "The crane lifts 40 t.\nÄußerst schwer. 🚢\n".encode(), "text/plain")),
    ("files", ("berths.csv", b"berth,length\nA,120\nB,300\n", "text/csv")),
    ("files", ("dot.png", PNG, "image/png")),
    ("files", ("firmware.bin", bytes(range(256)), "application/octet-stream")),
]
ODD = {name: value for name, value in AWKWARD.items() if "\0" not in name}  # the API refuses NUL
MANY = 220
"""More messages than a page has."""


def connect(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=f"{url}/api/v1", headers={"Authorization": f"Bearer {key}"}, timeout=30, verify=False)


# Reading


def read(http: httpx.Client, deleted_agent: str) -> JSON:
    """Everything of an organization that its API returns, by id."""
    agents = {agent["id"]: agent for agent in _get(http, "/agents")}
    threads = {}
    for agent_id in (*agents, deleted_agent):
        for thread in _pages(http, f"/chat/{agent_id}/threads", message_limit=0):
            threads[thread["id"]] = read_thread(http, thread["id"])
    return {"agents": agents, "default_agent": _get(http, "/agents/default")["id"], "threads": threads}


def read_thread(http: httpx.Client, thread_id: str) -> JSON:
    """The thread with all its messages, and the bytes of their attachments, as hex, by id."""
    path = f"/chat/default/threads/{thread_id}"
    thread: JSON = _get(http, path, message_limit=1)
    messages: list[JSON] = _get(http, f"{path}/messages", limit=100)
    while page := _get(http, f"{path}/messages", limit=100, before=messages[0]["id"]) if messages else []:
        messages = page + messages
    files = {}
    for attachment in (each for message in messages for each in message["attachments"]):
        answer = http.get(f"{path}/attachments/{attachment['id']}")
        answer.raise_for_status()
        files[attachment["id"]] = answer.content.hex()
    return {**thread, "messages": messages, "files": files}


def _pages(http: httpx.Client, path: str, **parameters: object) -> list[JSON]:
    found: list[JSON] = []
    while page := _get(http, path, limit=50, offset=len(found), **parameters):
        found += page
    return found


def _get(http: httpx.Client, path: str, **parameters: Any) -> Any:
    answer = http.get(path, params=parameters)
    answer.raise_for_status()
    return answer.json()


# Filling


def fill(http: httpx.Client) -> dict[str, str]:
    """Create threads, agents and attachments of every kind; the ids of some of them."""
    default = _get(http, "/agents/default")
    _send(http, "PATCH", f"/agents/{default['id']}", metadata={"demo": {"delay_ms": 0}, "odd": ODD})
    _fill_default_agent(http)
    return _fill_other_agents(http)


def _fill_default_agent(http: httpx.Client) -> None:
    empty = _thread(http, title="empty", metadata=ODD)
    _send(http, "PATCH", empty, title="renamed 🚢")
    words = _thread(http, title="words")
    for content in ("Hello there, 🚢 Ä", "Tell me more about this server"):
        _post(http, words, content)
    tools = _thread(http, metadata={"purpose": "tools"})
    for content in ("What time is it in Tokyo? And what is 2*(3+4)?", "Roll 3d6", "several", "please fail"):
        _post(http, tools, content)
    many = _thread(http, title="many")
    for number in range(MANY // 2):
        for role in ("user", "assistant"):
            _send(
                http, "POST", f"{many}/messages", content=f"{role} {number}", role="system" if role == "user" else role
            )
    odd = _thread(http, title="odd")
    _send(http, "POST", f"{odd}/messages", content="odd metadata", role="system", metadata=ODD)
    _send(
        http, "POST", f"{odd}/messages", content="with HTML", content_html="<p>with <b>HTML</b></p>", role="assistant"
    )
    files = _thread(http, title="files")
    uploaded = _check(http.post(f"{files}/attachments", files=FILES)).json()
    _post(http, files, "What are these?", attachments=[{"id": each["id"]} for each in uploaded])
    _check(http.post(f"{files}/messages", data={"content": "And this one?"}, files=FILES[:1]))
    archived = _thread(http, title="archived")
    _post(http, archived, "Hello")
    _send(http, "PATCH", archived, archived=True)
    deleted = _thread(http, title="deleted")
    _check(http.post(f"{deleted}/attachments", files=FILES[:1]))
    _post(http, deleted, "Hello")
    _check(http.delete(deleted))
    keyed = _thread(http, headers={"Idempotency-Key": "key of a thread"}, title="keyed")
    _post(http, keyed, "Hello once", headers={"Idempotency-Key": "key of a message"})
    _send(http, "POST", f"{keyed}/messages", headers={"Idempotency-Key": "stored only"}, content="noted", role="system")


def _fill_other_agents(http: httpx.Client) -> dict[str, str]:
    slow: JSON = {"name": "Slow", "kind": "demo", "mcp_servers": ["demo"], "metadata": {"demo": {"delay_ms": 100}}}
    other = _send(http, "POST", "/agents", **slow, instructions="Take your time. Äöü 🚢", max_tokens=1000)
    gone = _send(http, "POST", "/agents", name="Gone", kind="demo")
    lost = _thread(http, gone["id"], title="Its agent was deleted")
    _post(http, lost, "Hello")
    _check(http.delete(f"/agents/{gone['id']}"))
    cancelled = _thread(http, other["id"], title="cancelled")
    run = _send(
        http, "POST", f"{cancelled}/messages", headers={"Prefer": "respond-async"}, content="Explain everything"
    )
    time.sleep(1)
    _send(http, "POST", f"{cancelled}/messages/{run['id']}/cancel")
    dying = _thread(http, other["id"], title="dying", metadata={"dies": True})
    _post(http, dying, "What is 1+1?")
    return {"deleted_agent": gone["id"], "dying": dying.rpartition("/")[2]}


def begin_run(http: httpx.Client, thread_id: str) -> None:
    """Begin a run that calls tools for seconds, and wait until a call is stored."""
    thread = f"/chat/default/threads/{thread_id}"
    content = "go slow, show progress, and roll 2d6"
    _send(http, "POST", f"{thread}/messages", headers={"Prefer": "respond-async"}, content=content)
    deadline = time.monotonic() + 20
    while not _get(http, f"{thread}/messages", limit=1)[0]["tool_calls"] and time.monotonic() < deadline:
        time.sleep(0.05)


def _thread(http: httpx.Client, agent_id: str = "default", headers: dict[str, str] | None = None, **body: Any) -> str:
    return f"/chat/default/threads/{_send(http, 'POST', f'/chat/{agent_id}/threads', headers, **body)['id']}"


def _post(http: httpx.Client, thread: str, content: str, headers: dict[str, str] | None = None, **body: Any) -> JSON:
    return _send(http, "POST", f"{thread}/messages", headers, content=content, **body)


def _send(http: httpx.Client, method: str, path: str, headers: dict[str, str] | None = None, **body: Any) -> JSON:
    return dict(_check(http.request(method, path, json=body, headers=headers)).json())


def _check(answer: httpx.Response) -> httpx.Response:
    assert answer.is_success, f"{answer.request.method} {quote(answer.request.url.path)}: {answer.text}"
    return answer


def main(url: str, *keys: str) -> None:
    organizations = [connect(url, key) for key in keys]
    recorded = []
    for http, key in zip(organizations, keys, strict=True):
        ids = fill(http)
        recorded.append({"key": key, **ids, **read(http, ids["deleted_agent"])})
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda http, of: begin_run(http, of["dying"]), organizations, recorded))
    for http, of in zip(organizations, recorded, strict=True):
        of["threads"][of["dying"]] = read_thread(http, of["dying"])
    sys.stdout.write(json.dumps(recorded))


if __name__ == "__main__":
    main(*sys.argv[1:])
