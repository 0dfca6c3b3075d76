"""Plain text needs no worker, data with NULs is no text, and nothing without text is ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_chat.server.errors import RateLimited
from agent_chat.server.files.extraction import TEXT_CHARS, WAITING_FILES, Extractor
from agent_chat.server.files.file_types import BINARY
from agent_chat.server.files.reader import strip_head
from agent_chat.server.files.text_files import plain_text
from tests.support.documents import FILES, ORG, Hanging
from tests.support.gaps import STEP_SECONDS, gaps


@pytest.fixture
async def extractor() -> AsyncIterator[Extractor]:
    extractor = Extractor()
    yield extractor
    async with asyncio.timeout(5):
        await extractor.close()


@pytest.mark.parametrize("name", ["zeros.txt", "zeros", "zeros.csv", "zeros.html"])
async def test_zeros_are_no_text(extractor: Extractor, tmp_path: Path, name: str) -> None:
    path = tmp_path / "0"
    path.write_bytes(bytes(2_000_000))
    found = await extractor.extract(ORG, path, name, "text/plain")
    assert (found.content_type, found.status, found.text) == (BINARY, "unsupported", "")


@pytest.mark.parametrize("data", [b"a\0b" * 1000, b"words\n" * 1000 + b"\0", b"\n\0" * 500_000, b"\xff\xfe\0\0"])
async def test_data_with_nuls_is_no_text(extractor: Extractor, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "0"
    path.write_bytes(data)
    assert (await extractor.extract(ORG, path, "a.txt", None)).status != "ready"


@pytest.mark.parametrize("data", [b" \n\t\n", b"\xef\xbb\xbf", b"\xff\xfe \0\n\0", "\u3000".encode()])
async def test_a_file_of_white_space_has_failed(extractor: Extractor, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "0"
    path.write_bytes(data)
    found = await extractor.extract(ORG, path, "a.txt", None)
    assert (found.status, found.error) == ("failed", "No text was found in the file.")


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.csv", "a.json", "a.py", "README"])
async def test_a_text_is_read_while_every_worker_is_busy(extractor: Extractor, tmp_path: Path, name: str) -> None:
    async with asyncio.timeout(5):
        await extractor.turns._enter(ORG, 1, True)
        await extractor.turns._enter("another", 1, True)
        await extractor.turns._enter("a third", 1, True)
        found = await extractor.extract(ORG, FILES / "README.md", name, None)
        assert found.status == "ready"
        assert found.text == (FILES / "README.md").read_text()
    for organization in (ORG, "another", "a third"):
        extractor.turns._leave(organization)
    assert extractor._workers.processes == 0


@pytest.mark.alone
async def test_no_text_holds_up_the_event_loop(extractor: Extractor, tmp_path: Path) -> None:
    size = 4 * TEXT_CHARS
    texts = [b"\x01" * size, b"a:b\n" * size, "\ufffe".encode() * size, "é".encode() * size, b"<!---->" * size]
    texts += [b"a: b\n \n" * size, b" " * size, b"<?xml " + b" " * size, b"\n" * size, "😀".encode() * size]
    worst = 0.0
    for index, text in enumerate(texts):
        path = tmp_path / str(index)
        path.write_bytes(text[:size])
        stalls = []
        for _ in range(3):
            async with gaps() as late:
                await asyncio.to_thread(plain_text, path, "a", None, TEXT_CHARS)
                await asyncio.sleep(2 * STEP_SECONDS)  # until it has measured
            stalls.append(STEP_SECONDS + max(late))  # the sleep that it is late from passes meanwhile
        worst = max(worst, min(stalls))
    print(f"the loop stood still for {worst * 1000:.1f} ms at most")  # noqa: T201
    assert worst < 0.01


@pytest.mark.parametrize("unit", ["<head ", "<head>", "<head></head", "</head ", "<head><body", "<HEAD\n"])
def test_a_head_without_an_end_costs_no_time(unit: str) -> None:
    source = unit * (200_000 // len(unit))
    begun = time.process_time()
    strip_head(source)
    assert time.process_time() - begun < 0.2


@pytest.mark.parametrize(
    ("source", "body"),
    [
        ("<html><head><title>a</title></head ><body>b", "<html><body>b"),
        ("<html><HEAD a=b>c<Body>b", "<html><Body>b"),
        ("<header>a</header>", "<header>a</header>"),
        ("<head>a", "<head>a"),
        ("İ<head>a</head>b<head>c</head>", "İb<head>c</head>"),
    ],
)
def test_html_loses_its_first_head(source: str, body: str) -> None:
    assert strip_head(source) == body


async def test_one_organizations_files_do_not_delay_anothers(extractor: Extractor, tmp_path: Path) -> None:
    async with asyncio.timeout(40), Hanging(extractor, tmp_path) as first, Hanging(extractor, tmp_path) as second:
        third = asyncio.create_task(extractor.extract(ORG, FILES / "report.html", "a.html", None))
        found = await extractor.extract("another", FILES / "report.html", "a.html", None)
        assert found.status == "ready"
        assert not any(task.done() for task in (first, second, third))
        for task in (first, second, third):
            task.cancel()
        await asyncio.wait([first, second, third])


async def test_too_many_waiting_files_are_refused() -> None:
    extractor = Extractor(workers=1)
    await extractor.turns._enter(ORG, 1, True)
    path = FILES / "report.html"
    tasks = [asyncio.create_task(extractor.extract(ORG, path, "a.html", None)) for _ in range(WAITING_FILES + 1)]
    refused, waiting = await asyncio.wait(tasks, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    (error,) = [task.exception() for task in refused]
    assert isinstance(error, RateLimited)
    assert error.retry_after > 0
    assert extractor.turns.waiting == WAITING_FILES
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    extractor.turns._leave(ORG)
    await extractor.close()
