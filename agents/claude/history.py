"""What a model is told of a thread: valid history, the same bytes every time, no more than fits.

One function makes the model's turns from a stored message, and the run in progress uses it too, so that the prefix a
provider has cached stays the same from round to round and from message to message. Nothing in a thread can make the
history invalid: every tool use has a result, an interrupted one has an error; blank text and pictures that are none are
told in words.

The form is that of the Anthropic Messages API: https://platform.claude.com/docs/en/api/messages
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import groupby

import msgspec

from agent_chat.agents.claude.attachments import CHARACTERS_PER_TOKEN, PICTURE_TOKENS, Attached
from agent_chat.agents.claude.blocks import image_block, json_block, steady_start, text_block
from agent_chat.agents.rounds import without_separator
from agent_chat.stores.models import JSONObject, Message, ToolCall

Turn = JSONObject
"""`{"role": "user" | "assistant", "content": [blocks]}`."""

LEFT_OUT = "[Earlier messages of this thread are left out here.]"
NAME_LENGTH = 64


def model_name(tool_name: str) -> str:
    """A tool's name as the model knows it: letters, digits, `_` and `-`, 64 at most, and no two tools share one."""
    plain = re.sub(r"[^a-zA-Z0-9_-]", "_", tool_name)[:NAME_LENGTH]
    if plain and plain == tool_name:
        return plain
    return f"{plain[: NAME_LENGTH - 9]}_{hashlib.sha256(tool_name.encode()).hexdigest()[:8]}"


def turns_of(message: Message, files: Attached | None = None, budget: int = 0) -> list[Turn]:
    """One stored message as the model's turns; an answer with tool calls is several.

    Attachments (`files`, as far as the budget goes) stand before the text that came with them. Calls of one round
    stand together behind the text that came before them, then their results.
    """
    if message.role != "assistant":
        note = "[A note by the system of this chat]\n" if message.role == "system" else ""
        given = files.blocks(message.attachments, budget) if files else []
        text = message.content if message.content.strip() else "[No text.]"
        return _turn("user", [*given, text_block(f"{note}{text}")])
    turns: list[Turn] = []
    known: list[JSONObject] = (message.run or {}).get("tool_calls", [])
    calls = [
        (index, call, known[index] if index < len(known) else {"round": index})
        for index, call in enumerate(message.tool_calls)
    ]
    said = 0
    for _, together in groupby(calls, key=lambda each: each[2]["round"]):
        blocks: list[JSONObject] = []
        results: list[JSONObject] = []
        for index, call, info in together:
            offset = max(said, info.get("offset", said))
            call_id = f"toolu_{message.id.replace('-', '')}_{index}"
            blocks += [text_block(_text(message.content, said, offset)), _use(call_id, call)]
            results.append(_result(call_id, call))
            said = offset
        turns += _turn("assistant", blocks) + _turn("user", results)
    return turns + _turn("assistant", [text_block(_text(message.content, said))])


def _text(content: str, start: int, end: int | None = None) -> str:
    """The text behind the call at `start` up to the next one, as the model generated it."""
    return without_separator(content[start:end], content[:start])


def history(
    messages: Sequence[Message],
    budget: int,
    *,
    earlier: bool = False,
    files: Attached | None = None,
) -> list[Turn]:
    """The newest whole messages that fit `budget` tokens, as turns that alternate and begin with the user.

    Where some are left out, that is said. The last message is always in. `earlier`: there are older ones than these.
    """
    room = budget * CHARACTERS_PER_TOKEN
    fitting: list[tuple[Message, list[Turn]]] = []
    for message in reversed(messages):
        turns = [] if message.in_progress else turns_of(message, files, budget)
        room -= _extent(turns)
        if room < 0 and fitting:
            break
        fitting.append((message, turns))
    fitting.reverse()
    cut = earlier or len(fitting) < len(messages)
    start = _start([message for message, _ in fitting]) if cut else 0
    out = _turn("user", [text_block(LEFT_OUT)]) if cut else []
    for _, turns in fitting[start:]:
        out += turns
    if out and out[0]["role"] == "assistant":
        out = _turn("user", [text_block("[The assistant begins.]")]) + out
    return merged(out)


def _extent(turns: Sequence[Turn]) -> int:
    """Their size in characters; a picture counts as what it costs, whatever its bytes."""
    blocks = [block for turn in turns for block in turn["content"]]
    texts = [block for block in blocks if block["type"] != "image"]
    pictures = len(blocks) - len(texts)
    return len(msgspec.json.encode(texts)) + pictures * PICTURE_TOKENS * CHARACTERS_PER_TOKEN


def merged(turns: Sequence[Turn]) -> list[Turn]:
    """The same with neighbours of one role as one turn: some servers insist on alternation."""
    out: list[Turn] = []
    for turn in turns:
        if out and out[-1]["role"] == turn["role"]:
            out[-1] = {"role": turn["role"], "content": [*out[-1]["content"], *turn["content"]]}
        else:
            out.append(turn)
    return out


def has_tools(turns: Sequence[Turn]) -> bool:
    """Whether a tool was ever called in them."""
    return any(block["type"] == "tool_use" for turn in turns for block in turn["content"])


def without_images(turns: Sequence[Turn]) -> list[Turn]:
    """The same with a word in place of each picture: one that a model's service can't read is refused for ever."""

    def plain(block: JSONObject) -> JSONObject:
        match block:
            case {"type": "image"}:
                return text_block("[A picture, left out.]")
            case {"type": "tool_result"}:
                return {**block, "content": [plain(each) for each in block["content"]]}
        return block

    return [{"role": turn["role"], "content": [plain(block) for block in turn["content"]]} for turn in turns]


def _start(messages: Sequence[Message]) -> int:
    """Where the history begins when not all of it fits: at a user's message, and rarely at another than before."""
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    return users[steady_start([messages[index].id for index in users])] if users else len(messages) - 1


def _turn(role: str, blocks: Sequence[JSONObject]) -> list[Turn]:
    """The turn, or none if nothing is in it: the API refuses empty ones and blank text."""
    content = [block for block in blocks if block["type"] != "text" or block["text"].strip()]
    return [{"role": role, "content": content}] if content else []


def _use(call_id: str, call: ToolCall) -> JSONObject:
    return {"type": "tool_use", "id": call_id, "name": model_name(call.tool_name), "input": call.arguments}


def _result(call_id: str, call: ToolCall) -> JSONObject:
    if call.error is not None or call.result is None:
        error = call.error if call.error and call.error.strip() else "The call was interrupted."
        return {"type": "tool_result", "tool_use_id": call_id, "content": [text_block(error)], "is_error": True}
    return {"type": "tool_result", "tool_use_id": call_id, "content": _result_blocks(call.result)}


def _result_blocks(result: JSONObject) -> list[JSONObject]:
    """MCP's structured content as JSON and its blocks as the API's; anything else as JSON."""
    blocks = result.get("content", [])
    if not set(result) <= {"structuredContent", "content"} or not isinstance(blocks, list):
        return [json_block(result)]
    structured = [json_block(result["structuredContent"])] if "structuredContent" in result else []
    return structured + [_result_block(block) for block in blocks] or [text_block("(The tool returned nothing.)")]


def _result_block(block: object) -> JSONObject:
    match block:
        case {"type": "text", "text": str(text)} if text.strip():
            return text_block(text)
        case {"type": "image" | "audio" as kind, "data": str(data), **more}:
            return image_block(data) or text_block(f"[{kind} that can't be shown: {str(more.get('mimeType'))[:100]}]")
        case {"type": "resource", "resource": {"uri": str(uri), "text": str(text)}} if f"{uri}{text}".strip():
            return text_block(f"{uri}\n{text}")
        case {"type": "resource", "resource": {"uri": str(uri), "blob": str(blob)}}:
            return image_block(blob) or text_block(f"[{uri}: a file that can't be shown]")
    return json_block(block)
