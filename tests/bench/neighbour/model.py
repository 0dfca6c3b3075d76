"""A model API whose every word is the time at which it was sent: who reads it knows how long it was on its way."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

TOKENS_A_SECOND = 50
_USAGE = {"input_tokens": 10, "output_tokens": 1}


def _frame(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


async def _answer(model: str, tokens: int) -> AsyncIterator[bytes]:
    """A streamed answer of that many words, paced; each word is `time.monotonic()` in microseconds."""
    message = {"id": "msg_1", "type": "message", "role": "assistant", "content": [], "model": model, "usage": _USAGE}
    yield _frame({"type": "message_start", "message": {**message, "stop_reason": None, "stop_sequence": None}})
    yield _frame({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
    due = time.monotonic()
    for _ in range(tokens):
        word = f"{int(time.monotonic() * 1_000_000)} "
        yield _frame({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}})
        due += 1 / TOKENS_A_SECOND
        await asyncio.sleep(max(0.0, due - time.monotonic()))
    yield _frame({"type": "content_block_stop", "index": 0})
    delta = {"stop_reason": "end_turn", "stop_sequence": None}
    yield _frame({"type": "message_delta", "delta": delta, "usage": {"output_tokens": tokens}})
    yield _frame({"type": "message_stop"})


async def _messages(request: Request) -> Response:
    """`tokens N` in the last message asks for that many; anything else gets one word."""
    body = await request.json()
    asked = re.search(r"tokens (\d+)", json.dumps(body["messages"][-1]))
    if not body.get("stream"):
        content = [{"type": "text", "text": "A title"}]
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "content": content}
        return JSONResponse({**message, "stop_reason": "end_turn", "stop_sequence": None, "usage": _USAGE})
    return StreamingResponse(
        _answer(body["model"], int(asked[1]) if asked else 1), media_type="text/event-stream; charset=utf-8"
    )


app = Starlette(routes=[Route("/v1/messages", _messages, methods=["POST"])])
