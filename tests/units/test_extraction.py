"""Extraction: every kind of file is read, refused or given up in words, and nothing it does harms the server.

Real workers, and files that real programs made (tests/files) or that are broken here.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
import zipfile
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Iterable
from io import BytesIO
from pathlib import Path

import pytest
from msgspec.structs import replace
from PIL import Image

from agent_chat.server.files.extraction import LIMITS, TEXT_CHARS, Extracted, Extractor
from agent_chat.server.files.file_types import BINARY, DOCX, EML, EPUB, ODT, OLE, PDF, PPTX, XLSX
from agent_chat.server.files.worker import WorkerLimits
from tests.support.documents import CODE, CSV, DANISH, FILES, ORG, Hanging, image, mail
from tests.support.gaps import gaps
from tests.support.peak_memory import Peak

HTML = (FILES / "report.html").read_text()

CPU_SECONDS = 0.2
"""A seventh of what the heavy document takes here, and some hundred times what a small text does."""

SERVER = """
import asyncio, os, sys
from pathlib import Path
from agent_chat.server.files.extraction import Extractor

async def main():
    extractor = Extractor()
    assert (await extractor.extract("a", Path("tests/files/report.html"), "a.html", None)).status == "ready"
    if BUSY:
        task = asyncio.create_task(extractor.extract("a", Path(sys.argv[1]), "a.txt", None))
        await asyncio.to_thread(os.open, sys.argv[1], os.O_WRONLY)  # returns when the worker has opened it as well
    print("here", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

Make = Callable[[str, bytes], Path]


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[Extractor]:
    """For tests that cost no worker: starting one takes more than most files."""
    extractor = Extractor(limits=replace(LIMITS, requests=1_000))
    yield extractor
    async with asyncio.timeout(5):
        await extractor.close()


@pytest.fixture
async def extractor() -> AsyncIterator[Extractor]:
    extractor = Extractor()
    yield extractor
    async with asyncio.timeout(5):
        await extractor.close()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a file under a name that says nothing, as an upload lies on the disk."""

    def making(name: str, data: bytes) -> Path:
        path = tmp_path / f"upload-{len(os.listdir(tmp_path))}"
        path.write_bytes(data)
        return path

    return making


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A docx of 60 KB that takes seconds and 450 MB: 400,000 paragraphs."""
    path = tmp_path_factory.mktemp("heavy") / "heavy.docx"
    return docx(path, [b"<w:p><w:r><w:t>another line of the log</w:t></w:r></w:p>" * 20_000] * 20)


def docx(path: Path, body: Iterable[bytes]) -> Path:
    """The report with another body."""
    with zipfile.ZipFile(FILES / "report.docx") as report, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name in report.namelist():
            if name != "word/document.xml":
                made.writestr(name, report.read(name))
        with made.open("word/document.xml", "w") as document:
            document.write(report.read("word/document.xml").partition(b"<w:body>")[0] + b"<w:body>")
            for piece in body:
                document.write(piece)
            document.write(b"</w:body></w:document>")
    return path


def workers(extractor: Extractor) -> list[int]:
    return [worker.pid for worker in extractor._workers._alive if worker.returncode is None]


@pytest.mark.parametrize(
    ("name", "content_type", "lines"),
    [
        (
            "report.docx",
            DOCX,
            ["# Harbour report", "**417 herons**", "Ærøskøbing", "| 8 | Østerlund | 9.0 |", "- Order 30 metres"],
        ),
        ("report.odt", ODT, ["# Harbour report", "**417 herons**", "Ærøskøbing", "| 8 | Østerlund | 9.0 |"]),
        ("report.pdf", PDF, ["# Harbour report", "417 herons", "Ærøskøbing", "Østerlund"]),
        ("report.epub", EPUB, ["Harbour report", "417 herons", "Ærøskøbing", "Østerlund"]),
        ("report.html", "text/html", ["# Harbour report", "**417 herons**", "Ærøskøbing", "Østerlund"]),
        ("berths.xlsx", XLSX, ["## berths", "| 8 | Østerlund | 9 |"]),
        ("slides.pptx", PPTX, ["## Harbour report", "417 herons", "## Berths", "Berth 8: Østerlund"]),
    ],
)
async def test_a_document_becomes_markdown(shared: Extractor, name: str, content_type: str, lines: list[str]) -> None:
    found = await shared.extract(ORG, FILES / name, name, None)
    assert (found.content_type, found.status, found.error, found.truncated) == (content_type, "ready", None, False)
    for line in lines:
        assert line in found.text
    assert "never shown" not in found.text
    assert "title:" not in found.text


@pytest.mark.parametrize("html_only", [False, True], ids=["text", "html"])
async def test_a_mail_is_read_with_its_headers(shared: Extractor, make: Make, html_only: bool) -> None:
    found = await shared.extract(ORG, make("mail", mail(html_only)), "mail.eml", None)
    assert (found.content_type, found.status) == (EML, "ready")
    assert found.text.startswith("From: Keeper <keeper@harbour.example>\nTo: office@harbour.example\n")
    assert "\nSubject: Heron count at Ærøskøbing\nAttached: berths.csv\n\n" in found.text
    body = "# Herons\n\nWe counted **417**.\n\nAt the café." if html_only else "> how many?\n417, at the café."
    assert body in found.text


@pytest.mark.parametrize(
    ("name", "text", "content_type"),
    [
        ("a.txt", DANISH, "text/plain"),
        ("a.md", "# Title\n\n* one\n    * two\n", "text/markdown"),
        ("a.csv", CSV, "text/csv"),
        ("a.json", '{\n    "a": [1, 2]\n}\n', "application/json"),
        ("a.py", CODE, "text/x-python"),
        ("a.rs", 'fn main() {\n\tprintln!("%PDF-");\r\n}\n', "text/plain"),
        ("Makefile", "all:\n\techo æ\n", "text/plain"),
        ("a.ts", "const a: string = 'é'\n", "text/plain"),
        ("a.php", "<html><?php echo 1 ?></html>\n", "text/plain"),
        ("a.svg", "<svg xmlns='http://www.w3.org/2000/svg'/>", "application/xml"),
        ("log", "\x1b[31mred\x1b[0m 😀 \N{BYTE ORDER MARK}\n", "text/plain"),
    ],
)
async def test_what_is_text_is_left_as_it_is(
    shared: Extractor, make: Make, name: str, text: str, content_type: str
) -> None:
    found = await shared.extract(ORG, make(name, text.encode()), name, None)
    assert found == Extracted(content_type, "ready", text)


@pytest.mark.parametrize("prefix", ["", "One line of plain English, and another.\n" * 20_000], ids=["short", "long"])
@pytest.mark.parametrize(
    ("text", "charset"),
    [
        (DANISH, "utf-8"),
        (DANISH, "utf-8-sig"),
        (DANISH, "latin-1"),
        (CSV, "latin-1"),
        (CODE, "cp1252"),
        (DANISH, "utf-16"),
        (DANISH, "utf-16-le"),
        (DANISH, "utf-16-be"),
        (DANISH, "utf-32"),
        ("Смотритель маяка насчитал 417 цапель во вторник.\n", "koi8-r"),
        ("灯台守は火曜日に417羽のサギを数えた。港の近くのカフェで。\n", "shift_jis"),
        ("灯台守は火曜日に417羽のサギを数えた。港の近くのカフェで。\n", "iso2022_jp"),
    ],
)
async def test_the_charset_is_found(shared: Extractor, make: Make, text: str, charset: str, prefix: str) -> None:
    found = await shared.extract(ORG, make("a", (prefix + text).encode(charset)), "a.txt", "text/plain; charset=utf-8")
    assert found.status == "ready"
    assert found.text == (prefix + text)[:TEXT_CHARS]
    assert found.truncated == (len(prefix + text) > TEXT_CHARS)


@pytest.mark.parametrize("charset", ["latin-1", "utf-8", "utf-16"])
async def test_html_is_decoded_by_its_own_word(shared: Extractor, make: Make, charset: str) -> None:
    source = HTML.replace('charset="utf-8"', f'charset="{charset}"')
    found = await shared.extract(ORG, make("a", source.encode(charset)), "a.html", None)
    assert "near the café at Ærøskøbing" in found.text


@pytest.mark.parametrize(("kind", "content_type"), [("PNG", "png"), ("JPEG", "jpeg"), ("GIF", "gif"), ("WEBP", "webp")])
@pytest.mark.parametrize("name", ["a.png", "a.txt", "a.docx", "a"])
async def test_an_image_is_known_by_its_content_whatever_its_name(
    shared: Extractor, make: Make, kind: str, content_type: str, name: str
) -> None:
    found = await shared.extract(ORG, make(name, image(kind)), name, "application/pdf")
    assert found == Extracted(f"image/{content_type}", "ready")


@pytest.mark.parametrize(
    ("name", "data", "content_type", "text"),
    [
        ("a.png", DANISH.encode(), "text/plain", "417 hejrer"),
        ("a.pdf", HTML.encode(), "text/html", "# Harbour report"),
        ("a.txt", (FILES / "report.pdf").read_bytes(), PDF, "417 herons"),
        ("a.pdf", (FILES / "report.docx").read_bytes(), DOCX, "**417 herons**"),
        ("a.docx", (FILES / "report.odt").read_bytes(), ODT, "**417 herons**"),
        ("a", mail(False), EML, "417, at the café."),
        ("../../etc/passwd\n\"';.csv", CSV.encode(), "text/csv", "Marigold"),
        ("\ud800.md", b"# a", "text/markdown", "# a"),
    ],
    ids=lambda given: ascii(given)[:20] if isinstance(given, str) else "bytes",
)
async def test_a_file_with_a_false_name_is_what_it_holds(
    shared: Extractor, make: Make, name: str, data: bytes, content_type: str, text: str
) -> None:
    found = await shared.extract(ORG, make(name, data), name, None)
    assert (found.content_type, found.status) == (content_type, "ready")
    assert text in found.text


async def test_what_was_declared_counts_where_nothing_else_tells(shared: Extractor, make: Make) -> None:
    path = make("a", CSV.encode())
    assert (await shared.extract(ORG, path, "berths", "Text/CSV; header=present")).content_type == "text/csv"
    assert (await shared.extract(ORG, path, "berths", "application/pdf")).content_type == "text/plain"


@pytest.mark.parametrize(
    ("name", "content_type", "status", "error"),
    [
        ("a.txt", "text/plain", "failed", "The file is empty."),
        ("__init__.py", "text/x-python", "failed", "The file is empty."),
        ("a", "text/plain", "failed", "The file is empty."),
        ("a.pdf", PDF, "failed", "The file is empty."),
        ("a.png", "image/png", "failed", "The file is empty."),
    ],
)
async def test_an_empty_file_has_failed(
    shared: Extractor, make: Make, name: str, content_type: str, status: str, error: str | None
) -> None:
    found = await shared.extract(ORG, make(name, b""), name, None)
    assert (found.content_type, found.status, found.text, found.error) == (content_type, status, "", error)


def encrypted_odt() -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("mimetype", ODT)
        archive.writestr("META-INF/manifest.xml", "<manifest:encryption-data/>")
        archive.writestr("content.xml", os.urandom(100))
    return out.getvalue()


REPORT_DOCX = (FILES / "report.docx").read_bytes()
REPORT_PDF = (FILES / "report.pdf").read_bytes()
OLE_HEAD = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504)


@pytest.mark.parametrize(
    ("name", "data", "content_type", "error"),
    [
        ("cut.pdf", REPORT_PDF[:9000], PDF, "The file is damaged."),
        ("a.pdf", b"%PDF-1.7\n" + bytes(range(256)) * 40, PDF, "The file is damaged."),
        ("a.pdf", (FILES / "encrypted.pdf").read_bytes(), PDF, "The file is protected with a password."),
        ("a.docx", OLE_HEAD + "EncryptedPackage".encode("utf-16-le"), DOCX, "The file is protected with a password."),
        ("a.odt", encrypted_odt(), ODT, "The file is protected with a password."),
        ("a.docx", REPORT_DOCX[:3000], DOCX, "The file is damaged."),
        ("cut.png", image("PNG", (200, 200))[:5000], "image/png", "The image is damaged."),
        ("cut.jpg", image("JPEG", (200, 200))[:5000], "image/jpeg", "The image is damaged."),
        ("a.gif", b"GIF89a", "image/gif", "The image is damaged."),
        ("scan.pdf", image("PDF"), PDF, "No text was found in the file."),
        ("deep.html", b"<div>" * 100_000 + b"a", "text/html", "No text was found in the file."),
    ],
    ids=lambda given: None if isinstance(given, str) else "bytes",
)
async def test_a_broken_or_locked_file_fails_and_says_why(
    shared: Extractor, make: Make, name: str, data: bytes, content_type: str, error: str
) -> None:
    before = workers(shared)
    found = await shared.extract(ORG, make(name, data), name, None)
    assert found == Extracted(content_type, "failed", error=error)
    assert not before or workers(shared) == before  # it cost no worker


@pytest.mark.parametrize(
    ("name", "data", "content_type", "words"),
    [
        ("a.bin", bytes(os.urandom(50_000)), BINARY, "Files of this kind can't be read."),
        ("a.txt", bytes(range(256)) * 20, BINARY, "not what its name says"),
        ("a.pdf", bytes(range(255, -1, -1)) * 20, BINARY, "not what its name says"),
        ("a.zip", b"PK\x05\x06" + bytes(18), "application/zip", "Files of this kind (application/zip) can't be read."),
        ("a.rtf", b"{\\rtf1\\ansi herons}", "application/rtf", "(application/rtf) can't be read"),
        ("a.doc", OLE_HEAD, OLE, "Save it as docx"),
        ("a.mp4", b"\0\0\0\x20ftypisom\0\0\2\0isomiso2" + bytes(50), "video/mp4", "(video/mp4) can't be read"),
        ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50), "image/heic", "(image/heic) can't be read"),
        ("a", Path(sys.executable).resolve().read_bytes()[:100_000], "application/x-elf", "can't be read"),
    ],
    ids=lambda given: None if isinstance(given, str) else "bytes",
)
async def test_any_other_kind_is_unsupported_in_words(
    shared: Extractor, make: Make, name: str, data: bytes, content_type: str, words: str
) -> None:
    found = await shared.extract(ORG, make(name, data), name, None)
    assert (found.content_type, found.status, found.text) == (content_type, "unsupported", "")
    assert words in (found.error or "")


async def test_a_pdf_of_a_hundred_pages_is_read_whole(shared: Extractor) -> None:
    found = await shared.extract(ORG, FILES / "pages.pdf", "pages.pdf", None)
    numbers = [int(page) for page in re.findall(r"Page (\d+) of the harbour log", found.text)]
    assert numbers == list(range(1, 101))


@pytest.mark.slow
async def test_a_zip_bomb_in_a_docx_is_refused(shared: Extractor, tmp_path: Path) -> None:
    bomb = docx(tmp_path / "bomb.docx", (b"<w:p/>" * 200_000 for _ in range(90)))
    assert bomb.stat().st_size < 2**20
    found = await shared.extract(ORG, bomb, "bomb.docx", None)
    assert found == Extracted(DOCX, "failed", error="The file unpacks to more than can be read.")


@pytest.mark.slow
async def test_a_bomb_that_lies_about_its_size_costs_one_worker_at_most(extractor: Extractor, tmp_path: Path) -> None:
    bomb = docx(tmp_path / "bomb.docx", (b"<w:p/>" * 200_000 for _ in range(90)))
    with zipfile.ZipFile(bomb) as archive:
        size = archive.getinfo("word/document.xml").file_size.to_bytes(4, "little")
    bomb.write_bytes(bomb.read_bytes().replace(size, (1000).to_bytes(4, "little")))
    found = await extractor.extract(ORG, bomb, "bomb.docx", None)
    assert found.status == "failed" or len(found.text) < 2000
    assert found.content_type == DOCX
    assert (await extractor.extract(ORG, FILES / "report.docx", "report.docx", None)).status == "ready"


async def test_an_image_of_too_many_pixels_is_not_decoded(shared: Extractor, make: Make) -> None:
    out = BytesIO()
    Image.new("1", (11_000, 10_000)).save(out, "PNG")
    found = await shared.extract(ORG, make("a", out.getvalue()), "a.png", None)
    assert found == Extracted("image/png", "failed", error="The image is too large: 11000 by 10000 pixels.")


async def test_a_csv_of_25_megabytes_is_cut_in_little_time_and_memory(shared: Extractor, tmp_path: Path) -> None:
    path = tmp_path / "large.csv"
    path.write_text(CSV * (25 * 2**20 // len(CSV.encode())))
    await shared.extract(ORG, FILES / "report.html", "a.html", None)  # a worker is there
    peak, begun = Peak(), time.monotonic()
    found = await shared.extract(ORG, path, "large.csv", None)
    seconds, grown = time.monotonic() - begun, peak.grown() / 2**20
    print(f"25 MB csv: {seconds:.2f} s, the parent grew by {grown:.0f} MB")  # noqa: T201
    assert (found.status, found.truncated, len(found.text)) == ("ready", True, TEXT_CHARS)
    assert found.text + (CSV * 10_000)[TEXT_CHARS:] == CSV * 10_000
    assert seconds < 5
    assert grown < 40


async def test_a_text_of_exactly_the_limit_is_not_cut(shared: Extractor, make: Make) -> None:
    exact = await shared.extract(ORG, make("a", "é".encode() * TEXT_CHARS), "a.txt", None)
    more = await shared.extract(ORG, make("a", "😀".encode() * (TEXT_CHARS + 1)), "a.txt", None)
    assert (len(exact.text), exact.truncated) == (TEXT_CHARS, False)
    assert (len(more.text), more.truncated, more.text[-1]) == (TEXT_CHARS, True, "😀")


@pytest.mark.slow
async def test_a_document_that_takes_too_much_memory_fails_alone(heavy: Path) -> None:
    extractor = Extractor(workers=1, limits=replace(LIMITS, memory_bytes=512 * 2**20))
    found = await extractor.extract(ORG, heavy, "heavy.docx", None)
    assert found == Extracted(DOCX, "failed", error="Reading the file took too much memory.")
    assert (await extractor.extract(ORG, FILES / "report.docx", "a.docx", None)).status == "ready"
    await extractor.close()


@pytest.mark.slow
async def test_a_document_that_takes_too_much_cpu_fails_alone(heavy: Path) -> None:
    extractor = Extractor(workers=1, document_seconds=CPU_SECONDS)
    found = await extractor.extract(ORG, heavy, "heavy.docx", None)
    assert found == Extracted(DOCX, "failed", error="Reading the file took too long.")
    assert (await extractor.extract(ORG, FILES / "report.md", "a.md", None)).status == "failed"  # there is no such file
    assert (await extractor.extract(ORG, FILES / "report.html", "a.html", None)).status == "ready"
    await extractor.close()


async def test_a_file_that_hangs_is_given_up(tmp_path: Path) -> None:
    extractor = Extractor(workers=1, limits=replace(LIMITS, wall_seconds=0.5))
    async with asyncio.timeout(20), Hanging(extractor, tmp_path) as hanging:
        next_one = asyncio.create_task(extractor.extract(ORG, FILES / "report.html", "a.html", None))
        assert (await hanging).error == "Reading the file took too long."
        assert (await next_one).status == "ready"
    await extractor.close()


async def test_a_worker_killed_in_the_middle_is_replaced(extractor: Extractor, tmp_path: Path) -> None:
    async with asyncio.timeout(20), Hanging(extractor, tmp_path) as hanging:
        (killed,) = workers(extractor)
        os.kill(killed, signal.SIGKILL)
        found = await hanging
        assert (found.status, found.error) == ("failed", "The file could not be read: its reader crashed.")
        assert (await extractor.extract(ORG, FILES / "report.docx", "a.docx", None)).status == "ready"
        assert killed not in workers(extractor)


async def test_a_worker_killed_while_idle_costs_no_file(extractor: Extractor) -> None:
    await extractor.extract(ORG, FILES / "report.html", "a.html", None)
    (killed,) = extractor._workers._alive
    os.kill(killed.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        await killed.wait()
    assert (await extractor.extract(ORG, FILES / "report.html", "a.html", None)).status == "ready"


async def test_a_cancelled_extraction_leaves_no_answer_for_the_next(tmp_path: Path) -> None:
    extractor = Extractor(workers=1)
    async with asyncio.timeout(20), Hanging(extractor, tmp_path) as hanging:
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        assert (await extractor.extract(ORG, FILES / "report.html", "a.html", None)).status == "ready"
    await extractor.close()


async def test_two_are_read_at_once_and_a_third_waits(extractor: Extractor, tmp_path: Path) -> None:
    async with asyncio.timeout(30), Hanging(extractor, tmp_path) as first:
        found = await extractor.extract(ORG, FILES / "report.pdf", "a.pdf", None)
        assert "417 herons" in found.text
        async with Hanging(extractor, tmp_path) as second:
            third = asyncio.create_task(extractor.extract(ORG, FILES / "report.odt", "a.odt", None))
            assert len(workers(extractor)) == 2
            assert not any(task.done() for task in (first, second, third))
            first.cancel()
            assert "417 herons" in (await third).text
            second.cancel()
            await asyncio.gather(first, second, return_exceptions=True)


async def test_many_at_once_get_their_own_texts(extractor: Extractor, make: Make) -> None:
    paths = [make("a", f"text {n}".encode()) for n in range(20)]
    async with asyncio.timeout(20):
        found = await asyncio.gather(*(extractor.extract(ORG, path, "a.txt", None) for path in paths))
    assert [one.text for one in found] == [f"text {n}" for n in range(20)]
    assert len(workers(extractor)) <= 2


@pytest.mark.parametrize(
    "limits", [replace(LIMITS, requests=2), replace(LIMITS, resident_bytes=1)], ids=["files", "memory"]
)
async def test_a_worker_that_has_done_enough_is_replaced(limits: WorkerLimits) -> None:
    extractor = Extractor(workers=1, limits=limits)
    seen: set[int] = set()
    for _ in range(4):
        assert (await extractor.extract(ORG, FILES / "report.html", "a.html", None)).status == "ready"
        seen.update(worker.pid for worker in extractor._workers._alive)
    assert len(seen) == (2 if limits.requests == 2 else 0)  # one that has done enough is gone before its file is
    assert not workers(extractor)
    await extractor.close()


@pytest.mark.slow
@pytest.mark.alone
async def test_the_event_loop_hardly_notices(extractor: Extractor, heavy: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.csv"
    large.write_text(CSV * (25 * 2**20 // len(CSV.encode())))
    paths = [heavy, large, FILES / "pages.pdf", FILES / "report.docx", large]
    async with asyncio.timeout(50), gaps() as late:
        found = await asyncio.gather(*(extractor.extract(ORG, path, path.name, None) for path in paths))
    print(f"the loop was late by {max(late) * 1000:.0f} ms at most")  # noqa: T201
    assert {one.status for one in found} == {"ready"}
    assert len(late) > 100
    assert max(late) < 0.1


async def test_a_worker_gives_way_to_the_server_and_knows_no_secret(
    extractor: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    await extractor.extract(ORG, FILES / "report.html", "a.html", None)
    (pid,) = workers(extractor)
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
    seen = await asyncio.to_thread(Path(f"/proc/{pid}/environ").read_bytes)
    assert b"MALLOC_ARENA_MAX=2" in seen
    assert b"sk-secret" not in seen


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_closing_leaves_no_process(extractor: Extractor, tmp_path: Path, busy: bool) -> None:
    await extractor.extract(ORG, FILES / "report.html", "a.html", None)
    if busy:
        async with Hanging(extractor, tmp_path) as hanging:
            pids = workers(extractor)
            async with asyncio.timeout(2):  # it doesn't wait for the file
                await extractor.close()
            assert (await hanging).error == "The server stopped before the file was read."
    else:
        pids = workers(extractor)
        async with asyncio.timeout(2):
            await extractor.close()
    assert len(pids) == 1
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert (await extractor.extract(ORG, FILES / "report.html", "a.html", None)).status == "failed"


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_no_worker_outlives_a_server_that_was_killed(tmp_path: Path, busy: bool) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVER.replace("BUSY", str(busy)), str(pipe)),
        stdout=PIPE,
        stderr=PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert server.stdout is not None
    assert server.stderr is not None
    holder = os.open(pipe, os.O_RDWR)  # the pipe's end is not what ends the worker
    try:
        async with asyncio.timeout(15):
            assert await server.stdout.readline() == b"here\n"
            server.kill()
            assert await server.stderr.read() == b""  # the worker holds it as well, so it ends with the last of the two
            await server.wait()
    finally:
        os.close(holder)
