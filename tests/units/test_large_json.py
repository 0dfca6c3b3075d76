"""JSON of megabytes is encoded and sent in pieces, with turns for others in between."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.types import Message as Sent

from agent_chat.server.encoding import PIECE_BYTES, encode_list, encode_thread
from agent_chat.server.http.large_json import LargeResponse
from agent_chat.stores.models import Message, Thread

WHEN = "2026-01-31T12:00:00.000Z"
MESSAGES = [Message(str(n), "t", "ü" * 500_000, "", "user", [], [], {}, WHEN) for n in range(8)]


class Turns:
    """Counts the turns that other tasks get."""

    def __init__(self) -> None:
        self.count = 0

    async def __aenter__(self) -> Turns:
        self._task = asyncio.create_task(self._run())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            self.count += 1
            await asyncio.sleep(0)


async def test_a_list_is_encoded_as_it_would_be_whole_with_a_turn_after_each_large_value() -> None:
    async with Turns() as turns:
        assert b"".join(await encode_list(MESSAGES)) == msgspec.json.encode(MESSAGES)
        assert turns.count >= len(MESSAGES)
    assert await encode_list([]) == [b"[]"]


async def test_a_thread_is_encoded_as_it_would_be_whole() -> None:
    for messages in ([], MESSAGES[:1], MESSAGES):
        thread = Thread("t", "a", "u", "o", "[]}", {"[]}": "[]}"}, WHEN, WHEN, False, messages)
        assert b"".join(await encode_thread(thread)) == msgspec.json.encode(thread)
        assert b"".join(await encode_list([thread, thread])) == msgspec.json.encode([thread, thread])


async def test_a_large_body_is_sent_in_pieces() -> None:
    sent: list[Sent] = []

    async def send(message: Sent) -> None:
        sent.append(message)

    async def receive() -> Sent:
        raise NotImplementedError

    body = b"0123456789" * 100_000
    async with Turns() as turns:
        await LargeResponse([body[:10], body[10:]])({"type": "http"}, receive, send)
        assert turns.count >= 4
    assert b"".join(message.get("body", b"") for message in sent) == body
    assert max(len(message.get("body", b"")) for message in sent) == PIECE_BYTES
    assert [message.get("more_body") for message in sent] == [None, True, True, True, True, False]
