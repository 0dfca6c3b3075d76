"""What a model is told of a thread: valid history, the same bytes every time, no more than fits.

One function makes the model's turns from a stored message, and the run in progress uses it too, so that the prefix a
provider has cached stays the same from round to round and from message to message. Nothing in a thread can make the
history invalid: every tool use has a result, an interrupted one has an error; empty text is left out.

The form is that of the Anthropic Messages API: https://platform.claude.com/docs/en/api/messages
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from stores.models import JSONObject, Message, ToolCall

Turn = JSONObject
"""`{"role": "user" | "assistant", "content": [blocks]}`."""

LEFT_OUT = "[Earlier messages of this thread are left out here.]"
CHARACTERS_PER_TOKEN = 3
_ANCHORS = 4


def model_name(tool_name: str) -> str:
    """A tool's name as the model knows it: the API allows letters, digits, `_` and `-`, 128 at most."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", tool_name)[:128]


def turns_of(message: Message) -> list[Turn]:
    """One stored message as the model's turns; an answer with tool calls is several.

    Calls of one round stand together behind the text that came before them, then their results.
    """
    if message.role != "assistant":
        text = message.content if message.role == "user" else f"[A note by the system of this chat]\n{message.content}"
        return _turn("user", [_text(text)])
    turns: list[Turn] = []
    known: list[JSONObject] = (message.run or {}).get("tool_calls", [])
    calls = [(call, known[index] if index < len(known) else {}) for index, call in enumerate(message.tool_calls)]
    said = 0
    for first, last in _rounds([info.get("round", index) for index, (_, info) in enumerate(calls)]):
        blocks: list[JSONObject] = []
        results: list[JSONObject] = []
        for index in range(first, last):
            call, info = calls[index]
            offset = max(said, int(info.get("offset", said)))
            call_id = f"toolu_{message.id.replace('-', '')}_{index}"
            blocks += [_text(message.content[said:offset]), _use(call_id, call)]
            results.append(_result(call_id, call))
            said = offset
        turns += _turn("assistant", blocks) + _turn("user", results)
    return turns + _turn("assistant", [_text(message.content[said:])])


def history(messages: Sequence[Message], budget: int) -> list[Turn]:
    """The newest whole messages that fit `budget` tokens, as turns that alternate and begin with the user.

    Where some are left out, that is said, and the cut is made at one of few places that move rarely, so that the
    prefix stays cached while a thread grows.
    """
    start = _start(messages, budget * CHARACTERS_PER_TOKEN)
    turns: list[Turn] = []
    if start > 0:
        turns += _turn("user", [_text(LEFT_OUT)])
    for message in messages[start:]:
        if not message.in_progress:
            turns += turns_of(message)
    if turns and turns[0]["role"] == "assistant":
        turns = _turn("user", [_text("[The assistant begins.]")]) + turns
    return merged(turns)


def merged(turns: Sequence[Turn]) -> list[Turn]:
    """The same with neighbours of one role as one turn: some servers insist on alternation."""
    out: list[Turn] = []
    for turn in turns:
        if out and out[-1]["role"] == turn["role"]:
            out[-1] = {"role": turn["role"], "content": [*out[-1]["content"], *turn["content"]]}
        else:
            out.append(turn)
    return out


def _start(messages: Sequence[Message], characters: int) -> int:
    """Where the newest messages that fit begin: at a user's message, and if half the room allows, at an anchor.

    An anchor is a user's message chosen by its id: as the thread grows, the same one is chosen until it is too far
    back. The last message is always in.
    """
    first = len(messages) - 1
    size = 0
    for index in range(len(messages) - 1, -1, -1):
        size += len(msgspec.json.encode(turns_of(messages[index])))
        if size > characters and index < len(messages) - 1:
            break
        first = index
    if first == 0:
        return 0
    starts = [index for index in range(first, len(messages)) if messages[index].role == "user"]
    anchors = [index for index in starts[: len(starts) // 2 + 1] if int(messages[index].id[:2], 16) % _ANCHORS == 0]
    return next(iter(anchors or starts), len(messages) - 1)


def _rounds(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches of equal numbers, as (first, behind the last)."""
    edges = [index for index in range(len(numbers)) if index == 0 or numbers[index] != numbers[index - 1]]
    return list(zip(edges, [*edges[1:], len(numbers)], strict=True))


def _turn(role: str, blocks: Sequence[JSONObject]) -> list[Turn]:
    """The turn, or none if nothing is in it: the API refuses empty ones and blank text."""
    content = [block for block in blocks if block["type"] != "text" or block["text"].strip()]
    return [{"role": role, "content": content}] if content else []


def _text(text: str) -> JSONObject:
    return {"type": "text", "text": text}


def _use(call_id: str, call: ToolCall) -> JSONObject:
    return {"type": "tool_use", "id": call_id, "name": model_name(call.tool_name), "input": call.arguments}


def _result(call_id: str, call: ToolCall) -> JSONObject:
    if call.error is not None or call.result is None:
        error = call.error or "The call was interrupted."
        return {"type": "tool_result", "tool_use_id": call_id, "content": [_text(error)], "is_error": True}
    return {"type": "tool_result", "tool_use_id": call_id, "content": _result_blocks(call.result)}


def _result_blocks(result: JSONObject) -> list[JSONObject]:
    """MCP's text and image blocks as the API's; anything else as JSON."""
    blocks = result.get("content")
    if set(result) != {"content"} or not isinstance(blocks, list):
        return [_text(msgspec.json.encode(result).decode())]
    return [_result_block(block) for block in blocks] or [_text("(The tool returned nothing.)")]


def _result_block(block: object) -> JSONObject:
    match block:
        case {"type": "text", "text": str(text)} if text.strip():
            return _text(text)
        case {"type": "image", "data": str(data), "mimeType": str(mime)}:
            return {"type": "image", "source": {"type": "base64", "media_type": mime, "data": data}}
        case _:
            return _text(msgspec.json.encode(block).decode())
