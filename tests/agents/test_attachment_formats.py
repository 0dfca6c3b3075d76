"""The content of an uploaded file reaches the model: each format, in the request that the stand-in receives."""

from __future__ import annotations

import asyncio
import base64
import time
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from tests.support.anthropic_api import StandIn, parts, says, text
from tests.support.claude_server import blocks, claude_thread
from tests.support.client import frames
from tests.support.documents import CODE, CSV, DANISH, FILES, image, mail
from tests.support.servers import Live, server_process

REPORT = ["Harbour report", "417 herons", "on Tuesday, near the café at Ærøskøbing.", "Order 30 metres of rope"]
TABLE = ["| 7 | Marigold | 12.5 |", "| 8 | Østerlund | 9.0 |"]
PLAIN_TABLE = ["| 7     | Marigold  | 12.5   |", "| 8     | Østerlund | 9.0    |"]
DOCUMENTS = {
    "report.docx": ["# Harbour report", "**417 herons**", *REPORT, *TABLE],
    "report.odt": ["# Harbour report", "**417 herons**", *REPORT, *TABLE],
    "report.html": ["# Harbour report", "**417 herons**", *REPORT, *PLAIN_TABLE],
    "report.epub": [*REPORT, *PLAIN_TABLE],
    "report.pdf": ["# Harbour report", *REPORT, "7 Marigold 12.5", "8 Østerlund 9.0"],
    "berths.xlsx": ["## berths", "| Berth | Boat | Length |", "| 7 | Marigold | 12.5 |", "| 8 | Østerlund | 9 |"],
    "slides.pptx": ["## Harbour report", "417 herons at Ærøskøbing.", "## Berths", "Berth 8: Østerlund"],
    "letter.eml": [
        "From: Keeper <keeper@harbour.example>\n",
        "Subject: Heron count at Ærøskøbing\n",
        "Attached: berths.csv\n",
        "> how many?\n417, at the café.",
    ],
}
"""Files written by real programs, and the text in each."""
TEXTS = {
    "notes.txt": DANISH,
    "notes.md": "# Herons at Ærøskøbing\n\n* 417 *grey* ones\n    * near the café\n",
    "table.csv": CSV,
    "data.json": '{\n    "boat": "Østerlund",\n    "herons": [4, 1, 7]\n}\n',
    "code.py": CODE,
    "code.rs": '// Fyrmesteren på Ærø tæller hejrer ved caféen.\nfn main() {\n\tprintln!("417");\r\n}\n',
}
"""Text files, which reach the model unchanged."""
SECRET = "never shown"
LARGEST_GAP_MS = 100
TRIES = 3
"""The smallest gap counts: other processes on the machine only add to it, and the server's own share is in each."""


def content_of(name: str) -> bytes:
    return mail(html_only=False) if name == "letter.eml" else (FILES / name).read_bytes()


async def asked_about(live: Live, service: StandIn, name: str, data: bytes) -> str:
    """Post a message with a file and stream the answer. Returns the file's text in the request to the model."""
    thread = await claude_thread(live)
    service.will(says(text("I ", "have ", "read ", "it.")))
    async with live.http.stream(
        "POST",
        f"{thread}/messages",
        data={"content": "What does it say?"},
        files=[("files", (name, data))],
        headers={"Accept": "text/event-stream"},
    ) as response:
        stream = [frame async for frame in frames(response)]
    assert "".join(frame.data["text"] for frame in stream if frame.event == "message.delta") == "I have read it."
    (attachment,) = stream[0].data["message"]["attachments"]
    assert (attachment["filename"], attachment["status"]) == (name, "ready")
    document, question = blocks(service.requests[-1])
    assert question["text"] == "What does it say?"
    words: str = document["text"]
    head, _, rest = words.partition("\n")
    assert head.startswith(f"[Attachment {attachment['id']}: '{name}'")
    shown, _, end = rest.rpartition("\n")
    assert end == f"[End of attachment {attachment['id']}]"
    return shown


@pytest.mark.parametrize("name", DOCUMENTS)
async def test_each_documents_text_is_in_the_request_and_the_answer_streams(
    live: Live, service: StandIn, name: str
) -> None:
    shown = await asked_about(live, service, name, content_of(name))
    for words in DOCUMENTS[name]:
        assert words in shown
    assert SECRET not in shown


@pytest.mark.parametrize("charset", ["utf-8", "latin-1"])
@pytest.mark.parametrize("name", TEXTS)
async def test_a_text_is_in_the_request_as_it_is_and_the_answer_streams(
    live: Live, service: StandIn, name: str, charset: str
) -> None:
    assert await asked_about(live, service, name, TEXTS[name].encode(charset)) == TEXTS[name]


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp"])
async def test_a_picture_reaches_the_model_with_the_bytes_that_were_sent(
    live: Live, service: StandIn, kind: str
) -> None:
    sent = image(kind)
    thread = await claude_thread(live)
    (picture,) = await live.upload(thread, (f"photo.{kind}", sent))
    service.will(says(text("Noise.")))
    body = {"content": "What do you see?", "attachments": [{"id": picture["id"]}]}
    assert (await live.http.post(f"{thread}/messages", json=body)).status_code == 201
    shown, question = blocks(service.requests[-1])
    assert (shown["type"], shown["source"]["type"], shown["source"]["media_type"]) == (
        "image",
        "base64",
        f"image/{kind}",
    )
    assert base64.b64decode(shown["source"]["data"], validate=True) == sent
    assert question["text"] == "What do you see?"


async def test_a_file_remains_in_the_context_with_its_message(live: Live, service: StandIn) -> None:
    thread = await claude_thread(live)
    (notes,) = await live.upload(thread, ("notes.md", TEXTS["notes.md"].encode()))
    service.will(says(text("One.")), says(text("Two.")))
    await live.http.post(f"{thread}/messages", json={"content": "first", "attachments": [{"id": notes["id"]}]})
    await live.post(thread, "second")
    first, second = (parts(body) for body in service.bodies[-2:])
    assert "417 *grey* ones" in first["messages"].decode()
    assert second["messages"].startswith(first["messages"].removesuffix(b"]") + b",")


@pytest.mark.parametrize("name", ["encrypted.pdf", "garbage.bin", "false.png"])
async def test_the_model_is_informed_of_a_file_that_could_not_be_read(live: Live, service: StandIn, name: str) -> None:
    data = (FILES / name).read_bytes() if name == "encrypted.pdf" else bytes(range(256)) * 9
    thread = await claude_thread(live)
    (file,) = await live.upload(thread, (name, data))
    assert file["status"] in ("failed", "unsupported")
    service.will(says(text("A pity.")))
    await live.http.post(f"{thread}/messages", json={"content": "read it", "attachments": [{"id": file["id"]}]})
    document, _ = blocks(service.requests[-1])
    assert "could not be read" in document["text"]
    assert file["error"] in document["text"]


async def test_a_long_text_is_cut_and_the_model_is_informed(live: Live, service: StandIn) -> None:
    thread = await claude_thread(live)
    (file,) = await live.upload(thread, ("long.txt", b"word " * 200_000))
    assert (file["truncated"], file["text_chars"]) == (True, 200_000)
    service.will(says(text("Long.")))
    await live.http.post(f"{thread}/messages", json={"content": "read it", "attachments": [{"id": file["id"]}]})
    document, _ = blocks(service.requests[-1])
    assert "the first 200000 characters, the rest is cut" in document["text"][:300]
    assert len(document["text"]) < 201_000


class Listener:
    """When a run published text, in milliseconds by the server's clock."""

    def __init__(self) -> None:
        self.published: list[int] = []
        self._news = asyncio.Condition()

    async def listen(self, response: httpx.Response) -> None:
        async for frame in frames(response, seconds=60):
            if frame.event == "message.delta":
                self.published.append(int(frame.id.partition("-")[0]))
                async with self._news:
                    self._news.notify_all()

    async def hears(self, after: float) -> None:
        """Wait until text was published after that moment."""
        async with asyncio.timeout(10), self._news:
            await self._news.wait_for(lambda: bool(self.published) and self.published[-1] > after)

    def largest_gap(self, begun: float, over: float) -> int:
        """The gaps in milliseconds that are at least partly between two moments."""
        assert self.published[0] <= begun
        assert [moment for moment in self.published if begun < moment < over]
        assert self.published[-1] > over
        return max(later - earlier for earlier, later in pairwise(self.published) if later > begun and earlier < over)


async def test_reading_large_files_hardly_delays_another_run(tmp_path: Path) -> None:
    """The run streams from before the upload until after it; the server is a process of its own."""
    large = [("big.csv", b"a,b,c,d\n" * (3 * 2**20)), ("pages.pdf", (FILES / "pages.pdf").read_bytes())]
    listener, largest = Listener(), [LARGEST_GAP_MS]
    async with server_process(tmp_path) as server:
        talking, reading = await server.scripted_thread(), await server.scripted_thread()
        async with server.posting(talking, "count 100000 10") as response:
            listening = asyncio.create_task(listener.listen(response))
            await listener.hears(0)
            while largest[-1] >= LARGEST_GAP_MS and len(largest) <= TRIES:
                begun = time.time() * 1000
                uploaded = await server.http.post(f"{reading}/attachments", files=[("files", file) for file in large])
                over = time.time() * 1000
                assert [file["status"] for file in uploaded.json()] == ["ready", "ready"]
                await listener.hears(over)
                largest.append(listener.largest_gap(begun, over))
            listening.cancel()
    assert largest[-1] < LARGEST_GAP_MS, largest
