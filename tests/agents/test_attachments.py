"""What is in an uploaded file reaches the model: each format, in the request that the stand-in was sent."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from tests.agents.standin import StandIn, says, text
from tests.journeys.live import Live, frames
from tests.journeys.test_attachments import upload
from tests.units.test_extraction import FILES, image, mail

JSON = dict[str, Any]

DOCUMENTS = [
    *(("berths.xlsx", "report.docx", "report.epub", "report.html", "report.odt", "report.pdf", "slides.pptx")),
    "notes.md",
    "table.csv",
    "data.json",
    "code.py",
    "letter.eml",
]
LARGEST_GAP_MS = 250
"""13 to 20 ms were measured; the rest is for a machine that does other things too."""
WRITTEN = {
    "notes.md": b"# Herons\n\n417 herons\n",
    "table.csv": "bird,count\nheron,417\n".encode("latin-1"),
    "data.json": b'{"herons": 417}',
    "code.py": b"def herons():\n    return 417\n",
}


def content_of(name: str) -> bytes:
    if name == "letter.eml":
        return mail(html_only=False)
    return WRITTEN[name] if name in WRITTEN else (FILES / name).read_bytes()


def blocks(request: JSON) -> list[JSON]:
    """The blocks of the last user turn."""
    last: list[JSON] = request["messages"][-1]["content"]
    return last


async def claude_thread(live: Live) -> str:
    return await live.thread((await live.agent(kind="claude"))["id"])


@pytest.mark.parametrize("name", DOCUMENTS)
async def test_each_formats_text_is_in_the_request_and_the_answer_streams(
    live: Live, service: StandIn, name: str
) -> None:
    thread = await claude_thread(live)
    service.will(says(text("I ", "have ", "read ", "it.")))
    async with live.http.stream(
        "POST",
        f"{thread}/messages",
        data={"content": "What does it say?"},
        files=[("files", (name, content_of(name)))],
        headers={"Accept": "text/event-stream"},
    ) as response:
        stream = [frame async for frame in frames(response)]
    assert "".join(frame.data["text"] for frame in stream if frame.event == "message.delta") == "I have read it."
    (attachment,) = stream[0].data["message"]["attachments"]
    assert (attachment["filename"], attachment["status"]) == (name, "ready")
    document, question = blocks(service.requests[-1])
    assert question["text"] == "What does it say?"
    assert "417" in document["text"] or name == "berths.xlsx"
    assert document["text"].startswith(f"[Attachment {attachment['id']}: '{name}'")
    assert document["text"].endswith(f"[End of attachment {attachment['id']}]")


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp"])
async def test_a_picture_reaches_the_model_as_a_picture(live: Live, service: StandIn, kind: str) -> None:
    thread = await claude_thread(live)
    (picture,) = await upload(live, thread, (f"photo.{kind}", image(kind)))
    service.will(says(text("Noise.")))
    body = {"content": "What do you see?", "attachments": [{"id": picture["id"]}]}
    assert (await live.http.post(f"{thread}/messages", json=body)).status_code == 201
    shown, question = blocks(service.requests[-1])
    assert (shown["type"], shown["source"]["media_type"]) == ("image", f"image/{kind}")
    assert question["text"] == "What do you see?"


async def test_a_file_stays_in_the_context_with_the_message_that_brought_it(live: Live, service: StandIn) -> None:
    thread = await claude_thread(live)
    (notes,) = await upload(live, thread, ("notes.md", WRITTEN["notes.md"]))
    service.will(says(text("One.")), says(text("Two.")))
    await live.http.post(f"{thread}/messages", json={"content": "first", "attachments": [{"id": notes["id"]}]})
    await live.say(thread, "second")
    first, second = service.requests[-2:]
    assert second["messages"][: len(first["messages"])] == first["messages"]


@pytest.mark.parametrize("name", ["encrypted.pdf", "garbage.bin", "false.png"])
async def test_what_could_not_be_read_is_told_to_the_model(live: Live, service: StandIn, name: str) -> None:
    data = (FILES / name).read_bytes() if name == "encrypted.pdf" else bytes(range(256)) * 9
    thread = await claude_thread(live)
    (file,) = await upload(live, thread, (name, data))
    assert file["status"] in ("failed", "unsupported")
    service.will(says(text("A pity.")))
    await live.http.post(f"{thread}/messages", json={"content": "read it", "attachments": [{"id": file["id"]}]})
    document, _ = blocks(service.requests[-1])
    assert "could not be read" in document["text"]
    assert file["error"] in document["text"]


async def test_a_long_text_is_cut_and_the_model_is_told(live: Live, service: StandIn) -> None:
    thread = await claude_thread(live)
    (file,) = await upload(live, thread, ("long.txt", b"word " * 200_000))
    assert (file["truncated"], file["text_chars"]) == (True, 200_000)
    service.will(says(text("Long.")))
    await live.http.post(f"{thread}/messages", json={"content": "read it", "attachments": [{"id": file["id"]}]})
    document, _ = blocks(service.requests[-1])
    assert "the first 200000 characters, the rest is cut" in document["text"][:300]
    assert len(document["text"]) < 201_000


async def test_other_runs_go_on_while_large_files_are_read(live: Live, service: StandIn) -> None:
    """The gap between a run's deltas, by the server's own clock, while a 25 MB csv and a long pdf come and are read."""
    scripted, thread = await live.scripted_thread(), await claude_thread(live)
    asking = asyncio.create_task(live.streamed(scripted, "count 150 10"))
    large = [("big.csv", b"a,b,c,d\n" * (3 * 2**20)), ("pages.pdf", (FILES / "pages.pdf").read_bytes())]
    kept = await upload(live, thread, *large)
    assert [file["status"] for file in kept] == ["ready", "ready"]
    said = [int(frame.id.partition("-")[0]) for frame in await asking if frame.event == "message.delta"]
    assert max(after - before for before, after in pairwise(said)) < LARGEST_GAP_MS
