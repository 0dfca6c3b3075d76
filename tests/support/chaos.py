"""Random traffic on one thread: clients that post, cancel, and watch."""

from __future__ import annotations

import asyncio
import random

import httpx

from tests.support.client import frames
from tests.support.gates import Race
from tests.support.thread_view import View
from tests.support.viewers import Watcher, watcher

ALLOWED = {200, 201, 202, 204, 409}


class Chaos:
    """One thread, with the clients that post to it, cancel its runs and watch it."""

    def __init__(self, race: Race, rng: random.Random, thread: str, until: float) -> None:
        self.race = race
        self.rng = rng
        self.thread = thread
        self.until = until
        self.deleted = False
        self.runs: list[str] = []

    @property
    def goes_on(self) -> bool:
        return asyncio.get_running_loop().time() < self.until and not self.deleted

    def checked(self, answer: httpx.Response) -> httpx.Response:
        assert answer.status_code in ALLOWED or (self.deleted and answer.status_code == 404), answer.text
        return answer

    async def pause(self) -> None:
        await asyncio.sleep(self.rng.random() * 0.05)

    async def poster(self) -> None:
        while self.goes_on:
            count, pace = self.rng.randrange(1, 40), self.rng.choice([0, 1, 3])
            script = f"say 🎈\ncount {count} {pace}\nopen tool\ncount {count} {pace}"
            query = self.rng.choice(["", "?if_busy=interrupt"])
            headers = {"Idempotency-Key": f"key-{self.rng.randrange(10**9)}"} if self.rng.random() < 0.5 else {}
            for _ in range(self.rng.choice([1, 1, 2]) if headers else 1):
                await self.post(script, query, headers)
            await self.pause()

    async def post(self, script: str, query: str, headers: dict[str, str]) -> None:
        form = self.rng.choice(["json", "async", "sse"])
        if form != "sse":
            prefer = {"Prefer": "respond-async"} if form == "async" else {}
            answer = self.checked(await self.race.live.post(self.thread, script, query=query, **headers, **prefer))
            if answer.status_code in (201, 202):
                self.runs.append(answer.json()["id"])
            return
        leave = self.rng.choice([3, 10, 10**6])
        async with self.race.live.posting(self.thread, script, query=query, **headers) as response:
            self.checked(response)
            async for frame in frames(response):
                if frame.event == "run.started":
                    self.runs.append(frame.data["message"]["id"])
                if (leave := leave - 1) == 0:
                    break

    async def canceller(self) -> None:
        while self.goes_on:
            if self.runs and self.rng.random() < 0.5:
                self.checked(await self.race.live.cancel(self.thread, self.rng.choice(self.runs[-2:])))
            await self.pause()

    async def viewer(self) -> View:
        """Watch and disconnect at random until the thread is deleted or its traffic has ended; then read to the end."""
        view = View()
        position: str | None = None
        while True:
            leave = self.rng.randrange(1, 80) if self.goes_on else 10**6
            headers = {"Last-Event-ID": position} if position else {}
            async with self.race.live.http.stream("GET", f"{self.thread}/events", headers=headers) as response:
                if response.status_code == 404:
                    return view
                async for frame in frames(response):
                    view.apply(frame)
                    position = frame.id
                    if view.thread.get("title") == "over" or view.deleted:
                        return view
                    if (leave := leave - 1) <= 0:
                        break
            if self.rng.random() < 0.1:
                position = None

    async def whole(self, deleting: bool) -> tuple[list[View], Watcher]:
        async with watcher(self.race.live, self.thread) as watching, asyncio.TaskGroup() as group:
            viewers = [group.create_task(self.viewer()) for _ in range(4)]
            busy = [group.create_task(each) for each in (self.poster(), self.poster(), self.canceller())]
            if deleting:
                await asyncio.sleep((self.until - asyncio.get_running_loop().time()) / 2)
                self.deleted = True
                await self.race.live.http.delete(self.thread)
                await watching.ends()
            else:
                await asyncio.wait(busy)
                last = await self.race.live.post(self.thread, "say last", query="?if_busy=interrupt")
                assert (last.status_code, last.json()["content"]) == (201, "last")
                await self.race.live.http.patch(self.thread, json={"title": "over"})
                await watching.sees("thread.updated")
        return [viewer.result() for viewer in viewers], watching
