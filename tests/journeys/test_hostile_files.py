"""Hostile files over HTTP: each is stored or refused with a reason, other streams are not delayed, memory is bounded.

The server is a process of its own: what it holds is its own, and so is the loop that other answers go through.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from email.message import Message
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import msgspec
import pytest
from PIL import Image

from agent_chat.server.files.extraction import TEXT_CHARS
from agent_chat.server.files.file_types import BINARY, DOCX, PDF
from agent_chat.server.inputs import FILE_BYTES
from tests.support.client import frames
from tests.support.servers import Process, server_process
from tests.support.shapes import is_problem

FILES = Path(__file__).parents[1] / "files"
REPORT_PDF = (FILES / "report.pdf").read_bytes()
GROWN_MB = 60
"""How much the server process may grow while all that is below is uploaded; measured: 20 to 28 MB."""
GAP_SECONDS = 0.1
ROUNDS = 3
"""A loop that is held up is so in every round; one that this machine gave no core to, in some. Measured: 18 to 75 ms
by the clock with four processes that wanted each core, 300 ms with seven, which is why waiting for a core is left out.
"""


def bomb() -> bytes:
    """A docx of less than a megabyte that unpacks to 108."""
    out = BytesIO()
    with zipfile.ZipFile(FILES / "report.docx") as report, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        for name in report.namelist():
            if name != "word/document.xml":
                made.writestr(name, report.read(name))
        with made.open("word/document.xml", "w") as document:
            document.write(report.read("word/document.xml").partition(b"<w:body>")[0] + b"<w:body>")
            for _ in range(90):
                document.write(b"<w:p/>" * 200_000)
            document.write(b"</w:body></w:document>")
    return out.getvalue()


def picture() -> bytes:
    out = BytesIO()
    Image.effect_noise((40, 30), 50).save(out, "PNG")
    return out.getvalue()


File = tuple[str, bytes, str, str, str | None]
"""A name, a file, and what is found: the content type, the status, the reason."""


def hostile() -> Iterator[File]:
    csv = b"7,Marigold,12.5\n" * (FILE_BYTES // 16)
    yield from [
        ("cut.pdf", REPORT_PDF[:9000], PDF, "failed", "The file is damaged."),
        ("nonsense.pdf", b"%PDF-1.7\n" + bytes(range(256)) * 40, PDF, "failed", "The file is damaged."),
        (
            "locked.pdf",
            (FILES / "encrypted.pdf").read_bytes(),
            PDF,
            "failed",
            "The file is protected with a password.",
        ),
        ("bomb.docx", bomb(), DOCX, "failed", "The file unpacks to more than can be read."),
        ("pages.pdf", (FILES / "pages.pdf").read_bytes(), PDF, "ready", None),
        *[(f"large{number}.csv", csv, "text/csv", "ready", None) for number in range(3)],
        ("picture.docx", picture(), "image/png", "ready", None),
        ("text.png", b"No picture.", "text/plain", "ready", None),
        ("empty.txt", b"", "text/plain", "failed", "The file is empty."),
        ("empty.pdf", b"", PDF, "failed", "The file is empty."),
        (
            "noise.pdf",
            bytes(range(255, -1, -1)) * 20,
            BINARY,
            "unsupported",
            "The file is not what its name says, but of a kind that can't be read.",
        ),
    ]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Process]:
    async with server_process(tmp_path_factory.mktemp("hostile")) as server:
        yield server


def peak_mb(server: Process) -> float:
    """The most that the server process held since `forget_peak`."""

    found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{server.pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def forget_peak(server: Process) -> None:

    Path(f"/proc/{server.pid}/clear_refs").write_text("5")


class Heard(msgspec.Struct, frozen=True):
    """When a delta arrived, and for how many seconds so far server and test had waited for a core of this machine."""

    at: float
    server: float
    test: float

    def since(self, earlier: Heard) -> float:
        """The time between two deltas, less what this machine let one of the two processes wait."""
        return self.at - earlier.at - max(self.server - earlier.server, self.test - earlier.test)


def waited(pid: int) -> float:
    """Seconds that a process' main thread was ready to run and did not; 0 where the kernel doesn't count them."""
    counted = Path(f"/proc/{pid}/schedstat")
    return int(counted.read_text().split()[1]) / 1e9 if counted.exists() else 0.0


class Talk:
    """The deltas of a run in progress, as they arrive."""

    def __init__(self, pid: int) -> None:
        self.heard: list[Heard] = []
        self._pid = pid

    async def read(self, response: httpx.Response) -> None:
        async for frame in frames(response, seconds=50):
            if frame.event == "message.delta":
                self.heard.append(Heard(time.monotonic(), waited(self._pid), waited(os.getpid())))

    async def more(self, count: int) -> None:
        """Wait for so many further deltas."""
        wanted = len(self.heard) + count
        async with asyncio.timeout(10):
            while len(self.heard) < wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    def longest_gap(self, first: int) -> float:
        return max(later.since(earlier) for earlier, later in pairwise(self.heard[first:]))


@asynccontextmanager
async def talking(server: Process) -> AsyncIterator[Talk]:
    """A run that publishes a delta every five milliseconds until it is cancelled at the end."""
    thread = await server.scripted_thread()

    talk = Talk(server.pid)
    async with server.posting(thread, "count 1000000 5") as response:
        reading = asyncio.create_task(talk.read(response))
        await talk.more(20)
        yield talk
        await talk.more(20)
        run = (await server.get(thread))["messages"][-1]["id"]
        assert (await server.http.post(f"{thread}/messages/{run}/cancel")).status_code == 200
        await reading


async def upload(server: Process, thread: str, name: str, data: bytes) -> dict[str, Any]:
    answer = await server.http.post(
        f"{thread}/attachments", files=[("files", (name, BytesIO(data), "application/pdf"))]
    )
    assert answer.status_code == 201, answer.text
    (attachment,) = answer.json()
    return dict(attachment)


async def understood(server: Process, thread: str, files: list[File], talk: Talk) -> float:
    """Upload every file and check what was extracted; the longest gap between two deltas of the other run."""
    begun = len(talk.heard) - 1
    for name, data, content_type, status, error in files:
        before = len(talk.heard)
        kept = await upload(server, thread, name, data)
        assert (kept["filename"], kept["size"]) == (name, len(data))
        assert (kept["content_type"], kept["status"], kept["error"]) == (content_type, status, error)
        if name.startswith("large"):
            assert (kept["text_chars"], kept["truncated"]) == (TEXT_CHARS, True)
            assert len(talk.heard) > before, "heard while it was read"
    await talk.more(5)
    return talk.longest_gap(begun)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of another process's memory is read from /proc")
@pytest.mark.slow
@pytest.mark.alone
async def test_hostile_files_neither_delay_other_streams_nor_exceed_the_memory_limit(
    server: Process,
) -> None:
    thread = await server.scripted_thread()
    await upload(server, thread, "first.pdf", REPORT_PDF)  # a reader is there
    forget_peak(server)
    before, files, gaps = peak_mb(server), list(hostile()), list[float]()
    async with talking(server) as talk:
        while len(gaps) < ROUNDS and not any(gap < GAP_SECONDS for gap in gaps):
            gaps.append(await understood(server, thread, files, talk))
    grown = peak_mb(server) - before
    print(f"grown by {grown:.0f} MB from {before:.0f}, longest gaps {[round(gap * 1000) for gap in gaps]} ms")  # noqa: T201
    assert grown < GROWN_MB
    assert min(gaps) < GAP_SECONDS
    assert (await server.post(thread, "say on")).json()["content"] == "on"


NAMES: list[tuple[bytes, str | None]] = [
    (b'"../../../../etc/passwd"', "passwd"),
    (b'"..\\\\..\\\\secret.txt"', "secret.txt"),
    (b'".."', "file"),
    (b'""', "file"),
    (b'"quo\\"te\'s; x=y.txt"', "quo\"te's; x=y.txt"),
    (b'"two%0D%0Alines%22.txt"', 'twolines".txt'),
    (b'"two\r\nlines.txt"', None),
    (b'"x.txt"\r\nX-Evil: "1', "x.txt"),
    (b'"two\nlines.txt"', "twolines.txt"),
    (b'"two\rlines.txt"', None),
    (b'"nul\0.txt"', "nul.txt"),
    (b'"\xff\xfe.txt"', "\ufffd\ufffd.txt"),
    ('"gnp.\u202etxt"'.encode(), "gnp.txt"),
    ('"ünï 🎈.txt"'.encode(), "ünï 🎈.txt"),
    (b'"' + b"x" * 2_000 + b'.txt"', "x" * 251 + ".txt"),
    (b'"' + b"x" * 200_000 + b'.txt"', None),
    (b"plain.txt", "plain.txt"),
]
DISPOSITION = re.compile(r"attachment; filename=\"([ !#-\[\]-~]*)\"; filename\*=UTF-8''([\w!#$&+.^`|~%-]*)", re.ASCII)


def raw_form(filename: bytes) -> bytes:
    """A form with one file, its name to the byte."""
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename=' + filename
    return head + b"\r\nContent-Type: text/plain\r\n\r\ntext\r\n--b--\r\n"


def named(answer: httpx.Response) -> str:
    """The file name in a download's Content-Disposition, as two parsers read it."""
    (header,) = answer.headers.get_list("content-disposition")
    found = DISPOSITION.fullmatch(header)
    assert found, header
    message = Message()
    message["Content-Disposition"] = header
    assert message.get_content_disposition() == "attachment"
    assert message.get_filename() in (found[1], unquote(found[2])), header
    return unquote(found[2], errors="strict")


async def test_any_file_name_is_stored_as_a_harmless_label_or_refused(server: Process) -> None:
    thread = await server.scripted_thread()
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    for filename, kept in NAMES:
        answer = await server.http.post(f"{thread}/attachments", content=raw_form(filename), headers=form)
        if kept is None:
            assert is_problem(answer, 400, "malformed_body"), filename
            continue
        assert answer.status_code == 201, (filename, answer.text)
        (attachment,) = answer.json()
        assert (attachment["filename"], attachment["size"]) == (kept, 4), filename
        download = await server.http.get(f"{thread}/attachments/{attachment['id']}")
        assert (download.content, named(download)) == (b"text", kept)
        assert "x-evil" not in download.headers
    assert (await server.post(thread, "say on")).json()["content"] == "on"
