"""What is written in a form's own syntax: its boundary, the file names, the JSON in its fields."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.journeys.live import Live
from tests.journeys.shapes import is_problem

_PART = b'Content-Disposition: form-data; name="files"; filename="%b"\r\n\r\nhello\r\n'


def form(filename: str, boundary: str = "b") -> tuple[bytes, dict[str, str]]:
    """A form with one file, its name as it stands between the quotes."""
    edge = b"--" + boundary.encode()
    body = edge + b"\r\n" + _PART % filename.encode() + edge + b"--\r\n"
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


@pytest.mark.parametrize("length", [257, 5_000])
async def test_a_boundary_that_is_too_long_is_malformed_and_leaves_nothing(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(uploads))
    thread = await live.thread()
    body, headers = form("a.txt", "x" * length)
    for path in ("attachments", "messages"):
        is_problem(await live.http.post(f"{thread}/{path}", content=body, headers=headers), 400, "malformed_body")
    assert list(uploads.iterdir()) == []


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("a %22b%22.txt", 'a "b".txt'),
        ("a%0D%0Ab.txt", "ab.txt"),
        ("100%25 %2f %c3.txt", "100%25 %2f %c3.txt"),
        ("%22", '"'),
        ("%0a.txt", "%0a.txt"),
    ],
)
async def test_a_file_s_name_is_what_the_browser_escaped_and_no_more(live: Live, written: str, kept: str) -> None:
    body, headers = form(written)
    answer = await live.http.post(f"{await live.thread()}/attachments", content=body, headers=headers)
    assert answer.status_code == 201, answer.text
    assert answer.json()[0]["filename"] == kept


async def test_a_form_field_that_breaks_out_of_its_json_is_refused(live: Live) -> None:
    thread = await live.thread()
    fields = {"content": "mine", "role": "system", "metadata": '{"x":1},"content":"other"'}
    answer = await live.http.post(f"{thread}/messages", data=fields, files={"files": ("a.txt", b"x")})
    assert is_problem(answer, 422, "invalid_request", "field")["field"] == "metadata"
    assert (await live.get(thread))["messages"] == []
