"""An API client for tests, on httpx: JSON, event streams, uploads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

KEY = "test-key-of-the-first-organization"


class Frame(msgspec.Struct, frozen=True):
    """One server-sent event as it came: the raw bytes too."""

    raw: bytes
    event: str
    data: dict[str, Any]
    id: str


def parse(raw: bytes) -> Frame:
    """Read a frame strictly: event, data and id in this order, LF line ends, nothing else."""
    event, data, position, *rest = raw.decode().split("\n")
    assert rest == ["", ""], raw
    assert event.startswith("event: ")
    assert data.startswith("data: ")
    assert position.startswith("id: ")
    body = json.loads(data.removeprefix("data: "))
    assert body["type"] == event.removeprefix("event: ")
    return Frame(raw, body["type"], body, position.removeprefix("id: "))


async def frames(response: httpx.Response, *, seconds: float = 40) -> AsyncIterator[Frame]:
    """The frames of an event stream, comments and `retry:` lines left out."""
    pending = b""
    async with asyncio.timeout(seconds):
        async for data in response.aiter_raw():
            pending += data
            while b"\n\n" in pending:
                raw, _, pending = pending.partition(b"\n\n")
                while raw.startswith(b":\n"):
                    raw = raw[2:]
                if raw and not raw.startswith(b"retry:"):
                    yield parse(raw + b"\n\n")


class Client:
    """An API client with one key. `url` is where its server is."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self.port = urlsplit(url).port or 80
        self.http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=60,
            verify=False,  # no TLS here, and reading the certificates takes each client 40 ms
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        )

    async def agent(self, **fields: object) -> dict[str, Any]:
        answer = await self.http.post("/api/v1/agents", json={"name": "Scripted", "kind": "scripted", **fields})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def thread(self, agent_id: str = "default", **fields: object) -> str:
        """Make a thread; its path."""
        answer = await self.http.post(f"/api/v1/chat/{agent_id}/threads", json=fields)
        assert answer.status_code == 201, answer.text
        return f"/api/v1/chat/{agent_id}/threads/{answer.json()['id']}"

    async def scripted_thread(self, **fields: object) -> str:
        """Make a scripted agent and a thread with it; the thread's path."""
        return await self.thread((await self.agent(**fields))["id"])

    async def get(self, path: str, **query: object) -> Any:
        answer = await self.http.get(path, params={name: str(value) for name, value in query.items()})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def post(self, thread: str, content: str, *, query: str = "", **headers: str) -> httpx.Response:
        """Post a user's message and wait for the JSON response."""
        return await self.http.post(f"{thread}/messages{query}", json={"content": content}, headers=headers)

    async def start_run(self, thread: str, content: str, *, query: str = "", **headers: str) -> str:
        """Post a user's message without waiting for the run; the run's id."""
        answer = await self.post(thread, content, query=query, Prefer="respond-async", **headers)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    async def cancel(self, thread: str, run_id: str) -> httpx.Response:
        return await self.http.post(f"{thread}/messages/{run_id}/cancel")

    async def finished(self, thread: str, run_id: str) -> dict[str, Any]:
        """Poll the run's message until the database has it finished; that message."""
        async with asyncio.timeout(20):
            while True:
                message = dict(await self.get(f"{thread}/messages/{run_id}"))
                if message["metadata"]["run"]["status"] != "in_progress":
                    return message
                await asyncio.sleep(0.05)

    async def upload(self, thread: str, *files: tuple[str, bytes]) -> list[dict[str, Any]]:
        """Upload files, each a name and its bytes; their attachments."""
        answer = await self.http.post(f"{thread}/attachments", files=[("files", file) for file in files])
        assert answer.status_code == 201, answer.text
        return list(answer.json())

    @asynccontextmanager
    async def posting(
        self, thread: str, content: str, *, query: str = "", **headers: str
    ) -> AsyncIterator[httpx.Response]:
        """Post a user's message and read the answer as an event stream."""
        headers = {"Accept": "text/event-stream", **headers}
        path = f"{thread}/messages{query}"
        async with self.http.stream("POST", path, json={"content": content}, headers=headers) as response:
            yield response

    async def streamed(self, thread: str, content: str, *, query: str = "", **headers: str) -> list[Frame]:
        """All frames of a post's event stream."""
        async with self.posting(thread, content, query=query, **headers) as response:
            assert response.status_code == 200, await response.aread()
            return [frame async for frame in frames(response)]

    @asynccontextmanager
    async def watching(self, thread: str, after: str | None = None) -> AsyncIterator[AsyncIterator[Frame]]:
        """Watch a thread; `after` goes as Last-Event-ID."""
        headers = {"Last-Event-ID": after} if after else {}
        async with self.http.stream("GET", f"{thread}/events", headers=headers) as response:
            assert response.status_code == 200, await response.aread()
            yield frames(response)
