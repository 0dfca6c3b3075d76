"""Attachments in the model's requests: within the budget and the limits, the same bytes every time, lost or not."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from agent_chat.agents import Run, RunTools
from agent_chat.agents.claude.attachments import PICTURES, LoadedFiles, load_files
from agent_chat.agents.claude.history import build_history
from agent_chat.stores.models import Agent, Attachment, Message, Principal, new_id
from tests.support.anthropic_api import StandIn, says, text
from tests.support.claude_runs import AGENT, Tools, png
from tests.support.claude_server import blocks, claude_thread
from tests.support.documents import image
from tests.support.servers import Live

JSON = dict[str, Any]


def attachment(content_type: str = "text/plain", length: int = 0) -> Attachment:
    return Attachment(new_id(), "a", content_type, length, "", "ready", length, False, None, "")


def message(content: str, *attachments: Attachment) -> Message:
    return Message(new_id(), "t", content, "", "user", [], list(attachments), {}, "")


class Files:
    """Files whose contents match their attachments' metadata. They count what is read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    async def text(self, attachment: Attachment) -> str | None:
        self.read.append(attachment.id)
        return "x" * attachment.text_chars

    async def picture(self, attachment: Attachment) -> bytes | None:
        self.read.append(attachment.id)
        return base64.b64decode(png())


async def read(messages: list[Message], budget: int, agent: Agent = AGENT) -> tuple[LoadedFiles, list[str]]:
    files = Files()
    found = await load_files(
        Run(new_id(), Principal("o", "u"), agent, messages, RunTools(Tools()), False, files), budget
    )
    return found, files.read


async def test_the_texts_of_one_message_share_the_budget_and_each_cut_is_marked(live: Live, service: StandIn) -> None:
    service.overlong = 600_000
    thread = await claude_thread(live)
    files = [(f"{number}.txt", b"word " * 40_000) for number in range(5)]
    uploaded = await live.upload(thread, ("short.txt", b"short"), *files)
    service.will(says(text("Much.")))
    body = {"content": "read them", "attachments": [{"id": file["id"]} for file in uploaded]}
    answer = await live.http.post(f"{thread}/messages", json=body)
    assert (answer.status_code, answer.json()["content"]) == (201, "Much.")
    short, *long, _ = blocks(service.requests[-1])
    assert "\nshort\n" in short["text"]
    assert all("characters, the rest is cut" in block["text"][:200] for block in long)
    assert len({len(block["text"]) for block in long}) == 1


async def test_a_text_is_cut_to_the_budget_of_a_small_model(live: Live, service: StandIn) -> None:
    thread = await live.thread((await live.agent(kind="claude", metadata={"context_tokens": 8000}))["id"])
    (file,) = await live.upload(thread, ("long.txt", b"word " * 12_000))
    service.overlong = 24_000
    body = {"content": "read it", "attachments": [{"id": file["id"]}]}
    assert (await live.http.post(f"{thread}/messages", json=body)).status_code == 201
    assert "the first 16000 characters, the rest is cut" in blocks(service.requests[0])[0]["text"]


async def test_a_request_that_is_too_long_is_repeated_with_less_text(live: Live, service: StandIn) -> None:
    thread = await claude_thread(live)
    (file,) = await live.upload(thread, ("long.txt", "鷺".encode() * 190_000))
    service.overlong = 400_000
    body = {"content": "read it", "attachments": [{"id": file["id"]}]}
    assert (await live.http.post(f"{thread}/messages", json=body)).status_code == 201
    assert "the rest is cut" in blocks(service.requests[-1])[0]["text"][:200]


async def test_a_lost_picture_is_replaced_by_a_note_and_the_thread_goes_on(live: Live, service: StandIn) -> None:
    thread = await claude_thread(live)
    (picture,) = await live.upload(thread, ("a.png", image("png")))
    next(live.data_dir.rglob(picture["id"])).unlink()
    body = {"content": "What is it?", "attachments": [{"id": picture["id"]}]}
    assert (await live.http.post(f"{thread}/messages", json=body)).status_code == 201
    assert "a picture that can't be shown" in blocks(service.requests[-1])[0]["text"]
    gone = await live.http.get(f"{thread}/attachments/{picture['id']}")
    assert (gone.status_code, gone.json()["code"]) == (404, "attachment_not_found")


@pytest.mark.parametrize(("kind", "sent"), [("JPEG", "jpeg"), ("PNG", "jpeg"), ("see-through", "png")])
async def test_the_model_gets_a_large_picture_scaled_down_and_upright_and_clients_get_the_original(
    live: Live, service: StandIn, kind: str, sent: str
) -> None:
    thread = await claude_thread(live)
    photo = Image.effect_noise((2000, 1500), 90).convert("RGB")
    if kind == "see-through":
        photo = Image.new("RGBA", (2000, 1500), (255, 0, 0, 128))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    data = BytesIO()
    photo.save(data, "JPEG" if kind == "JPEG" else "PNG", exif=exif)
    (picture,) = await live.upload(thread, ("photo", data.getvalue()))
    body = {"content": "What is it?", "attachments": [{"id": picture["id"]}]}
    assert (await live.http.post(f"{thread}/messages", json=body)).status_code == 201
    source = blocks(service.requests[-1])[0]["source"]
    shown = base64.b64decode(source["data"])
    assert source["media_type"] == f"image/{sent}"
    assert len(shown) <= 2**20
    assert Image.open(BytesIO(shown)).size == (1176, 1568)
    assert (await live.http.get(f"{thread}/attachments/{picture['id']}")).content == data.getvalue()
    assert (await live.http.delete(thread)).status_code == 204
    assert not list(live.data_dir.rglob(f"{picture['id']}*"))


async def test_only_attachments_that_may_fit_are_read() -> None:
    messages = [message("m", *(attachment(length=60_000) for _ in range(5))) for _ in range(100)]
    found, ids = await read(messages, 160_000)
    assert len(ids) == len(found.texts) == 10
    turns = build_history(messages, 160_000, files=found)
    assert "its text is not there" not in str(turns)
    assert [each.id for each in messages[-1].attachments] == ids[-5:]


async def test_of_too_many_pictures_the_newest_are_included_and_the_first_of_them_rarely_changes() -> None:
    messages = [message("m", attachment("image/png", 9)) for _ in range(100)]
    firsts = []
    for end in range(PICTURES + 1, 101):
        found, _ = await read(messages[:end], 10**6)
        shown = [at for at, each in enumerate(messages[:end]) if each.attachments[0].id in found.pictures]
        assert shown == list(range(shown[0], end))
        assert PICTURES // 2 <= len(shown) <= PICTURES
        firsts.append(shown[0])
    assert len(set(firsts)) < len(firsts) / 2
