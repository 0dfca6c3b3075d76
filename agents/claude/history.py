"""A thread as the model's messages: always valid, the same bytes every time, and within the token budget.

One function makes the turns of a stored message, and the run in progress uses it for its own message too, so that the
prefix that a provider has cached stays the same from round to round and from message to message. No thread yields an
invalid request: every tool use has a result, which for an interrupted call is an error; blank text and invalid pictures
are replaced by a sentence.

The form is that of the Anthropic Messages API: https://platform.claude.com/docs/en/api/messages
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import groupby

import msgspec

from agent_chat.agents.claude.attachments import CHARACTERS_PER_TOKEN, PICTURE_TOKENS, LoadedFiles
from agent_chat.agents.claude.blocks import image_block, json_block, steady_start, text_block
from agent_chat.agents.rounds import without_separator
from agent_chat.stores.models import JSONObject, Message, ToolCall

Turn = JSONObject
"""`{"role": "user" | "assistant", "content": [blocks]}`."""

OMITTED = "[Earlier messages of this thread are left out here.]"
NAME_LENGTH = 64


def model_name(tool_name: str) -> str:
    """A tool's name as the API accepts it: at most 64 letters, digits, `_` and `-`, and different for each tool."""
    plain = re.sub(r"[^a-zA-Z0-9_-]", "_", tool_name)[:NAME_LENGTH]
    if plain and plain == tool_name:
        return plain
    return f"{plain[: NAME_LENGTH - 9]}_{hashlib.sha256(tool_name.encode()).hexdigest()[:8]}"


def message_turns(message: Message, files: LoadedFiles | None = None, budget: int = 0) -> list[Turn]:
    """The turns of one stored message; an answer with tool calls has several.

    The blocks of a message's attachments, as many as fit the budget, come before its text. The calls of one round come
    together after the text before them; their results follow.
    """
    if message.role != "assistant":
        note = "[A note by the system of this chat]\n" if message.role == "system" else ""
        attached = files.blocks(message.attachments, budget) if files else []
        text = message.content if message.content.strip() else "[No text.]"
        return _turn("user", [*attached, text_block(f"{note}{text}")])
    turns: list[Turn] = []
    places: list[JSONObject] = (message.run or {}).get("tool_calls", [])
    calls = [
        (index, call, places[index] if index < len(places) else {"round": index})
        for index, call in enumerate(message.tool_calls)
    ]
    end = 0  # of the text that is in the turns so far
    for _, calls_of_round in groupby(calls, key=lambda each: each[2]["round"]):
        blocks: list[JSONObject] = []
        results: list[JSONObject] = []
        for index, call, place in calls_of_round:
            offset = max(end, place.get("offset", end))
            call_id = f"toolu_{message.id.replace('-', '')}_{index}"
            blocks += [text_block(_text_between(message.content, end, offset)), _tool_use(call_id, call)]
            results.append(_tool_result(call_id, call))
            end = offset
        turns += _turn("assistant", blocks) + _turn("user", results)
    return turns + _turn("assistant", [text_block(_text_between(message.content, end))])


def _text_between(content: str, start: int, end: int | None = None) -> str:
    """The text after the call at `start`, up to the next call at `end`, as the model generated it."""
    return without_separator(content[start:end], content[:start])


def build_history(
    messages: Sequence[Message],
    budget: int,
    *,
    earlier: bool = False,
    files: LoadedFiles | None = None,
) -> list[Turn]:
    """The newest messages that fit `budget` tokens, as turns that alternate and begin with the user.

    Messages are included as a whole; the last one always is. If some are omitted, the first turn says so.

    Args:
        earlier: whether the thread has older messages than these.
    """
    room = budget * CHARACTERS_PER_TOKEN
    fitting: list[tuple[Message, list[Turn]]] = []
    for message in reversed(messages):
        turns = [] if message.in_progress else message_turns(message, files, budget)
        room -= _count_characters(turns)
        if room < 0 and fitting:
            break
        fitting.append((message, turns))
    fitting.reverse()
    cut = earlier or len(fitting) < len(messages)
    start = _first_index([message for message, _ in fitting]) if cut else 0
    out = _turn("user", [text_block(OMITTED)]) if cut else []
    for _, turns in fitting[start:]:
        out += turns
    if out and out[0]["role"] == "assistant":
        out = _turn("user", [text_block("[The assistant begins.]")]) + out
    return merge_turns(out)


def _count_characters(turns: Sequence[Turn]) -> int:
    """The size of the turns in characters. A picture counts as much as its tokens, not its bytes."""
    blocks = [block for turn in turns for block in turn["content"]]
    texts = [block for block in blocks if block["type"] != "image"]
    pictures = len(blocks) - len(texts)
    return len(msgspec.json.encode(texts)) + pictures * PICTURE_TOKENS * CHARACTERS_PER_TOKEN


def merge_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Join adjacent turns of one role: some servers require that roles alternate."""
    out: list[Turn] = []
    for turn in turns:
        if out and out[-1]["role"] == turn["role"]:
            out[-1] = {"role": turn["role"], "content": [*out[-1]["content"], *turn["content"]]}
        else:
            out.append(turn)
    return out


def contains_tool_use(turns: Sequence[Turn]) -> bool:
    """Whether a tool is called in these turns."""
    return any(block["type"] == "tool_use" for turn in turns for block in turn["content"])


def replace_images(turns: Sequence[Turn]) -> list[Turn]:
    """Replace each picture by a note: a request with a picture that the service cannot read is always rejected."""

    def plain(block: JSONObject) -> JSONObject:
        match block:
            case {"type": "image"}:
                return text_block("[A picture, left out.]")
            case {"type": "tool_result"}:
                return {**block, "content": [plain(each) for each in block["content"]]}
        return block

    return [{"role": turn["role"], "content": [plain(block) for block in turn["content"]]} for turn in turns]


def _first_index(messages: Sequence[Message]) -> int:
    """Where the history begins if not all of it fits: at a user's message, which rarely changes."""
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    return users[steady_start([messages[index].id for index in users])] if users else len(messages) - 1


def _turn(role: str, blocks: Sequence[JSONObject]) -> list[Turn]:
    """One turn, or none without content: the API rejects empty turns and blank text."""
    content = [block for block in blocks if block["type"] != "text" or block["text"].strip()]
    return [{"role": role, "content": content}] if content else []


def _tool_use(call_id: str, call: ToolCall) -> JSONObject:
    return {"type": "tool_use", "id": call_id, "name": model_name(call.tool_name), "input": call.arguments}


def _tool_result(call_id: str, call: ToolCall) -> JSONObject:
    if call.error is not None or call.result is None:
        error = call.error if call.error and call.error.strip() else "The call was interrupted."
        return {"type": "tool_result", "tool_use_id": call_id, "content": [text_block(error)], "is_error": True}
    return {"type": "tool_result", "tool_use_id": call_id, "content": _result_blocks(call.result)}


def _result_blocks(result: JSONObject) -> list[JSONObject]:
    """A stored result as blocks: MCP's structured content as JSON, its blocks converted; anything else as JSON."""
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
