"""Uploads under way: how many, how long they may be silent, and what a killed process leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from agent_chat.server.limits import Limits
from agent_chat.server.timing import Timing
from tests.support.client import KEY
from tests.support.gates import critical
from tests.support.servers import Live, live_server, server_process
from tests.support.shapes import is_problem


@asynccontextmanager
async def unfinished(url: str, thread: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """An upload of which the first megabyte has been sent, and the rest never is."""
    parsed = httpx.URL(url)
    reader, writer = await asyncio.open_connection(parsed.host, parsed.port)
    writer.write(
        f"POST {thread}/attachments HTTP/1.1\r\nHost: {parsed.host}:{parsed.port}\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 9000000\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n'.encode()
        + b"a" * 1_000_000
    )
    await writer.drain()
    try:
        yield reader, writer
    finally:
        writer.close()


def files_in(data_dir: Path) -> list[Path]:
    return [path for path in (data_dir / "uploads").rglob("*") if path.is_file() and path.name != "lock"]


async def arrived(data_dir: Path, count: int) -> None:
    async with asyncio.timeout(10):
        while len(files_in(data_dir)) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def upload(live: Live, thread: str) -> httpx.Response:
    return await live.http.post(f"{thread}/attachments", files=[("files", ("b.txt", b"b"))])


async def test_an_upload_that_falls_silent_is_ended(tmp_path: Path) -> None:
    async with live_server(tmp_path, timing=Timing(body_silence=0.3)) as live:
        thread = await live.scripted_thread()
        async with unfinished(live.url, thread) as (reader, _), asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 ")
            assert b"malformed_body" in await reader.read()  # to the end of the connection
        assert files_in(tmp_path) == []


async def test_concurrent_uploads_are_limited(tmp_path: Path) -> None:
    async with live_server(tmp_path, limits=Limits(uploads=2)) as live:
        thread = await live.scripted_thread()
        async with unfinished(live.url, thread), unfinished(live.url, thread):
            await arrived(tmp_path, 2)
            is_problem(await upload(live, thread), 429, "rate_limited")
            form = await live.http.post(f"{thread}/messages", files=[("files", ("b.txt", b"b"))])
            is_problem(form, 429, "rate_limited")
        async with asyncio.timeout(10):
            while (answer := await upload(live, thread)).status_code != 201:
                assert answer.status_code == 429
        assert files_in(tmp_path) == []


async def test_what_a_killed_process_had_received_is_removed_at_the_next_start(tmp_path: Path) -> None:
    async with server_process(tmp_path) as server:
        thread = await server.thread()
        async with unfinished(server.url, thread):
            await arrived(tmp_path, 1)
            await server.stop()
        assert files_in(tmp_path) != []
        await server.start()
        assert files_in(tmp_path) == []
        answer = await server.http.post(f"{thread}/attachments", files=[("files", ("b.txt", b"b"))])
        assert answer.status_code == 201


async def test_what_follows_a_form_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_chat.server.http.uploads._FORM_BYTES", 1_000_000)
    async with live_server(tmp_path) as live:
        thread = await live.scripted_thread()
        body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\na\r\n--x--\r\n'
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = await live.http.post(f"{thread}/attachments", content=body + b"z" * 2_000_000, headers=headers)
        is_problem(answer, 413, "too_large", "field")


async def test_a_form_for_a_busy_thread_is_refused_before_its_files_are_stored(tmp_path: Path) -> None:
    async with critical(tmp_path) as race, asyncio.timeout(10):
        thread = await race.live.scripted_thread()
        run = await race.live.start_run(thread, "hold it")
        race.store.hold("begin_upload", "before")
        files = [("files", ("a.txt", b"a"))]
        refused = await race.live.http.post(f"{thread}/messages", data={"content": "say x"}, files=files)
        assert is_problem(refused, 409, "thread_busy", "message_id")["message_id"] == run


async def test_the_files_of_an_upload_are_stored_concurrently_and_listed_in_their_order(tmp_path: Path) -> None:
    async with critical(tmp_path) as race, asyncio.timeout(10):
        thread = await race.live.scripted_thread()
        first, second = race.store.hold("begin_upload", "before"), race.store.hold("begin_upload", "before")
        files = [("files", (name, b"x")) for name in ("a.txt", "b.txt", "c.txt")]
        uploading = asyncio.create_task(race.live.http.post(f"{thread}/attachments", files=files))
        await first.reached()
        await second.passed()
        first.release()
        assert [file["filename"] for file in (await uploading).json()] == ["a.txt", "b.txt", "c.txt"]
