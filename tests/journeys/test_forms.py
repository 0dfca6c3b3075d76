"""What is written in a form's own syntax: its boundary, the file names, the JSON in its fields."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from agent_chat.server.limits import Limits
from tests.support.client import KEY
from tests.support.servers import Live, live_server
from tests.support.shapes import is_problem

_PART = b'Content-Disposition: form-data; name="files"; filename="%b"\r\n\r\nhello\r\n'


def form(filename: str, boundary: str = "b") -> tuple[bytes, dict[str, str]]:
    """A form with one file, its name as it stands between the quotes."""
    edge = b"--" + boundary.encode()
    body = edge + b"\r\n" + _PART % filename.encode() + edge + b"--\r\n"
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


@pytest.mark.parametrize("length", [257, 5_000])
async def test_a_boundary_that_is_too_long_is_malformed_and_leaves_nothing(live: Live, length: int) -> None:
    uploads = live.data_dir / "uploads"
    thread = await live.thread()
    body, headers = form("a.txt", "x" * length)
    for path in ("attachments", "messages"):
        is_problem(await live.http.post(f"{thread}/{path}", content=body, headers=headers), 400, "malformed_body")
    assert [path.name for path in uploads.rglob("*") if path.is_file() and path.name != "lock"] == []


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


async def refusal(live: Live, thread: str) -> str:
    """What a form is answered of which only the first line comes."""
    url = httpx.URL(live.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = [
        f"POST {thread}/messages HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {KEY}",
        "Content-Length: 9999",
    ]
    writer.write("\r\n".join([*head, "Content-Type: multipart/form-data; boundary=b", "", "--b", ""]).encode())
    async with asyncio.timeout(10):
        answer = await reader.readuntil(b"}")
    writer.close()
    return answer.decode()


async def test_a_form_for_which_no_run_can_start_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async with live_server(tmp_path, limits=Limits(runs=1)) as live:
        thread, other = await live.scripted_thread(), await live.scripted_thread()
        asking = asyncio.create_task(live.post(thread, "hold it"))
        await live.gates.reached("it")
        assert "rate_limited" in await refusal(live, other)
        live.gates.release("it")
        first = await asking
        form = {"data": {"content": "say hi"}, "files": {"files": ("a.txt", b"x")}, "headers": {"Idempotency-Key": "k"}}
        answered = await live.http.post(f"{other}/messages", **form)  # type: ignore[arg-type]
        await live.app.state.drain()
        assert "draining" in await refusal(live, other)
        again = await live.http.post(f"{other}/messages", **form)  # type: ignore[arg-type]
        assert (first.status_code, again.status_code, again.json()) == (201, 201, answered.json())
