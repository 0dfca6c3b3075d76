"""Files in threads: upload, extraction, what the agent receives, download."""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import Any

import pytest

from tests.support.servers import Live

KEYS = [
    "id",
    "filename",
    "content_type",
    "size",
    "sha256",
    "status",
    "text_chars",
    "truncated",
    "error",
    "created_at",
]
NOTES = "# Notes\n\nThe launch is on 3 May. Ünïcode 🎈\n".encode()


def _part(kind: bytes, data: bytes) -> bytes:
    return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))


PNG = (
    b"\x89PNG\r\n\x1a\n"
    + _part(b"IHDR", struct.pack("!IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    + _part(b"IDAT", zlib.compress(b"\0\xff\0\0"))
    + _part(b"IEND", b"")
)


async def demo_thread(live: Live) -> str:
    agent = await live.agent(kind="demo", metadata={"demo": {"delay_ms": 0}})
    return await live.thread(agent["id"])


async def test_an_upload_reports_what_was_extracted(live: Live) -> None:
    thread = await demo_thread(live)
    notes, picture, garbage = await live.upload(
        thread, ("notes.md", NOTES), ("dot.png", PNG), ("data.bin", bytes(range(256)) * 4)
    )
    assert list(notes) == KEYS
    assert (notes["filename"], notes["size"], notes["status"], notes["error"]) == (
        "notes.md",
        len(NOTES),
        "ready",
        None,
    )
    assert notes["sha256"] == hashlib.sha256(NOTES).hexdigest()
    assert notes["text_chars"] == len(NOTES.decode())
    assert (picture["content_type"], picture["status"]) == ("image/png", "ready")
    assert garbage["status"] == "unsupported"
    assert garbage["error"]


async def test_a_download_is_unchanged_and_has_headers_that_make_it_harmless(live: Live) -> None:
    thread = await demo_thread(live)
    (page,) = await live.upload(thread, ('pa"ge.html', b"<script>alert(1)</script>"))
    answer = await live.http.get(f"{thread}/attachments/{page['id']}")
    assert (answer.status_code, answer.content) == (200, b"<script>alert(1)</script>")
    assert answer.headers["Content-Disposition"].startswith("attachment; ")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["ETag"] == f'"{page["sha256"]}"'


@pytest.mark.parametrize(
    ("asked", "status", "content", "told"),
    [
        ("bytes=0-3", 206, b"0123", "bytes 0-3/10"),
        ("bytes=4-", 206, b"456789", "bytes 4-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=8-100", 206, b"89", "bytes 8-9/10"),
        ("bytes=0-1,4-5", 200, b"0123456789", None),
        ("bytes=5-2", 200, b"0123456789", None),
        ("lines=1-2", 200, b"0123456789", None),
        ("bytes=10-", 416, None, "bytes */10"),
    ],
)
async def test_a_range_of_bytes_is_served(
    live: Live, asked: str, status: int, content: bytes | None, told: str | None
) -> None:
    thread = await demo_thread(live)
    (file,) = await live.upload(thread, ("digits.txt", b"0123456789"))
    answer = await live.http.get(f"{thread}/attachments/{file['id']}", headers={"Range": asked})
    assert answer.status_code == status
    assert content is None or answer.content == content
    assert answer.headers.get("Content-Range") == told


async def test_a_message_names_earlier_uploads_and_the_agent_knows_what_is_in_them(live: Live) -> None:
    thread = await demo_thread(live)
    (notes,) = await live.upload(thread, ("notes.md", NOTES))
    answer = await live.http.post(
        f"{thread}/messages", json={"content": "what is this?", "attachments": [{"id": notes["id"]}]}
    )
    assert answer.status_code == 201, answer.text
    assert "The launch is on 3 May" in answer.json()["content"]
    question = (await live.get(thread))["messages"][0]
    assert question["attachments"] == [notes]


@pytest.mark.parametrize("form", ["json", "stream", "async"])
async def test_files_come_with_the_message_in_one_request(live: Live, form: str) -> None:
    thread = await demo_thread(live)
    headers = {
        "json": {},
        "stream": {"Accept": "text/event-stream"},
        "async": {"Prefer": "respond-async"},
    }[form]
    answer = await live.http.post(
        f"{thread}/messages",
        data={"content": "", "metadata": '{"from": "a form"}'},
        files=[("files", ("notes.md", NOTES)), ("files", ("more.csv", b"a,b\n1,2\n"))],
        headers=headers,
    )
    assert answer.status_code == {"json": 201, "stream": 200, "async": 202}[form], answer.text
    if form == "async":
        run_id = answer.json()["id"]
        again = await live.http.get(f"{thread}/messages/{run_id}")
        assert again.status_code == 200
    question = (await live.get(thread))["messages"][0]
    assert [file["filename"] for file in question["attachments"]] == ["notes.md", "more.csv"]
    assert question["metadata"] == {"from": "a form"}


async def test_a_retried_form_with_its_key_stores_nothing_twice(live: Live) -> None:
    thread = await demo_thread(live)

    async def post(content: bytes) -> Any:
        return await live.http.post(
            f"{thread}/messages",
            data={"content": "see"},
            files=[("files", ("a.txt", content))],
            headers={"Idempotency-Key": "k"},
        )

    first, again, other = await post(b"one"), await post(b"one"), await post(b"two")
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json()["id"] == first.json()["id"]
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    assert len((await live.get(thread))["messages"]) == 2


async def test_a_download_claims_no_charset(live: Live) -> None:
    thread = await demo_thread(live)
    (table,) = await live.upload(thread, ("a.csv", "bird\nJägare\n".encode("latin-1")))
    for method in ("GET", "HEAD"):
        answer = await live.http.request(method, f"{thread}/attachments/{table['id']}")
        assert answer.headers["Content-Type"] == "text/csv"


async def test_the_files_of_a_refused_message_are_taken_back(live: Live) -> None:
    thread = await live.scripted_thread()
    (kept,) = await live.upload(thread, ("kept.txt", b"k"))
    running = (await live.post(thread, "hold here", Prefer="respond-async")).json()
    await live.gates.reached("here")
    files = [("files", ("a.txt", b"a")), ("files", ("b.txt", b"b"))]
    refused = await live.http.post(f"{thread}/messages", data={"content": "say x"}, files=files)
    assert (refused.status_code, refused.json()["message_id"]) == (409, running["id"])
    assert [path.name for path in (live.data_dir / "blobs").rglob("*") if path.is_file()] == [kept["id"]]


NAMES = [
    ("../../etc/passwd", "passwd"),
    ("C:\\temp\\report.txt", "report.txt"),
    ("two\nlines.txt", "twolines.txt"),
    ("..", "file"),
    ("ünï 🎈.txt", "ünï 🎈.txt"),
    ("x" * 400 + ".txt", "x" * 251 + ".txt"),
]


@pytest.mark.parametrize(("given", "kept"), NAMES)
async def test_a_file_name_is_a_label_and_nothing_more(live: Live, given: str, kept: str) -> None:
    thread = await demo_thread(live)
    (file,) = await live.upload(thread, (given, b"text"))
    assert file["filename"] == kept
    assert (await live.http.get(f"{thread}/attachments/{file['id']}")).content == b"text"


async def test_what_is_refused_names_the_field(live: Live) -> None:
    thread = await demo_thread(live)
    path = f"{thread}/attachments"
    big = await live.http.post(path, files=[("files", ("big.bin", bytes(25 * 2**20 + 1)))])
    assert (big.status_code, big.json()["code"], big.json()["field"]) == (413, "too_large", "files[0]")
    many = await live.http.post(path, files=[("files", (f"{index}.txt", b"x")) for index in range(11)])
    assert (many.status_code, many.json()["field"]) == (422, "files")
    wrong = await live.http.post(path, files=[("document", ("a.txt", b"x"))])
    assert (wrong.status_code, wrong.json()["field"]) == (422, "document")
    assert (await live.http.post(path, json={})).status_code == 415
    none = await live.http.post(path, files=[], data={"content": "x"}, headers={"Content-Type": "multipart/form-data"})
    assert none.status_code == 400
    torn = await live.http.post(
        path, content=b"--b\r\nContent-Dis", headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert (torn.status_code, torn.json()["code"]) == (400, "malformed_body")
    assert (await live.get(thread))["messages"] == []


async def test_a_deleted_thread_takes_its_files_along(live: Live) -> None:
    thread = await demo_thread(live)
    (notes,) = await live.upload(thread, ("notes.md", NOTES))
    assert list(live.data_dir.rglob(notes["id"]))
    assert (await live.http.delete(thread)).status_code == 204
    assert not list(live.data_dir.rglob(notes["id"]))
    assert (await live.http.get(f"{thread}/attachments/{notes['id']}")).status_code == 404
