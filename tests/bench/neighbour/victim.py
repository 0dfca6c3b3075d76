"""What an ordinary organization notices: the delay of each streamed token, and how long its requests take."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence

import aiohttp
import msgspec

from tests.bench.neighbour.model import TOKENS_A_SECOND

STREAMS = 20
_MARKDOWN = "Some *emphasis*, a [link](https://example.org) and a line of `code`.\n\n" * 360  # 25 KB


class Noticed(msgspec.Struct):
    """Milliseconds, sorted, by what took them: `token`, `read`, `upload`, `render`; `failed` counts other statuses."""

    took: dict[str, list[float]]
    failed: int = 0
    missing_tokens: int = 0

    def percentile(self, name: str, share: float) -> float:
        values = self.took.get(name) or [float("nan")]
        return values[min(len(values) - 1, int(len(values) * share))]

    @classmethod
    def together(cls, rounds: Sequence[Noticed]) -> Noticed:
        """What was noticed in all of these rounds."""
        names = sorted({name for each in rounds for name in each.took})
        took = {name: sorted(value for each in rounds for value in each.took.get(name, [])) for name in names}
        return cls(took, sum(each.failed for each in rounds), sum(each.missing_tokens for each in rounds))


class Victim:
    def __init__(self, http: aiohttp.ClientSession, seconds: float) -> None:
        self._http = http
        self._seconds = seconds
        self._took: defaultdict[str, list[float]] = defaultdict(list)
        self._failed = 0
        self._missing = 0

    async def measure(self) -> Noticed:
        """Stream and ask for that many seconds."""
        threads = await asyncio.gather(*(self._thread() for _ in range(STREAMS + 1)))
        until = time.monotonic() + self._seconds
        async with asyncio.TaskGroup() as group:
            for thread in threads[1:]:
                group.create_task(self._stream(thread))
            group.create_task(self._repeat(until, 0.02, "read", self._read))
            group.create_task(self._repeat(until, 0.25, "upload", lambda: self._upload(threads[0])))
            group.create_task(self._repeat(until, 0.5, "render", lambda: self._render(threads[0])))
        return Noticed({name: sorted(values) for name, values in self._took.items()}, self._failed, self._missing)

    async def _thread(self) -> str:
        async with self._http.post("/api/v1/chat/default/threads") as response:
            assert response.status == 201, await response.text()
            return f"/api/v1/chat/default/threads/{(await response.json())['id']}"

    async def _stream(self, thread: str) -> None:
        tokens = int(self._seconds * TOKENS_A_SECOND)
        seen = 0
        headers = {"Accept": "text/event-stream"}
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):  # then tokens are missing
            async with self._http.post(
                f"{thread}/messages", json={"content": f"tokens {tokens}"}, headers=headers
            ) as response:
                async for line in response.content:
                    if line.startswith(b'data: {"type":"message.delta"'):
                        now = time.monotonic()
                        for word in json.loads(line[6:])["text"].split():
                            seen += 1
                            self._took["token"].append((now - int(word) / 1_000_000) * 1000)
        self._missing += tokens - seen

    async def _repeat(self, until: float, every: float, name: str, ask: Callable[[], Awaitable[int]]) -> None:
        due = time.monotonic()
        while due < until:
            began = time.monotonic()
            try:
                status = await ask()
            except (aiohttp.ClientError, TimeoutError):
                status = 0
            self._took[name].append((time.monotonic() - began) * 1000)
            self._failed += status not in (200, 201)
            due += every
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _read(self) -> int:
        async with self._http.get("/api/v1/agents/default") as response:
            await response.read()
            return response.status

    async def _upload(self, thread: str) -> int:
        form = aiohttp.FormData()
        form.add_field("files", b"hello", filename="b.txt", content_type="text/plain")
        async with self._http.post(f"{thread}/attachments", data=form) as response:
            return response.status

    async def _render(self, thread: str) -> int:
        async with self._http.post(f"{thread}/messages", json={"role": "system", "content": _MARKDOWN}) as response:
            html = (await response.json()).get("content_html", "")
            return response.status if "<em>" in html else 0  # not rendered: noticed as well


async def notice(url: str, key: str, seconds: float) -> Noticed:
    async with aiohttp.ClientSession(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"},
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=240),
        read_bufsize=2**20,
    ) as http:
        return await Victim(http, seconds).measure()
