"""What is stored of a tool's result, and given to the model: all of it, but nothing twice, and not without an end."""

from __future__ import annotations

import msgspec

from agent_chat.agents import ToolCompleted
from agent_chat.agents.mcp.connection import Answer
from agent_chat.stores.models import JSONObject

RESULT_BYTES = 64 * 1024
ERROR_CHARACTERS = 4_000


def completed(call_id: str, answer: Answer) -> ToolCompleted:
    """The result in the form of ToolCall; beyond 64 KB of JSON what fits of it.

    A truncated result is `{"truncated": true, "full_bytes": size of the whole as JSON, "text": the beginning}`. In the
    text an image or a file is only named (half of one is of no use).
    """
    others = [block for block in answer.blocks if not _is_blank(block)]
    repeats = answer.structured is not None and _repeats(others, answer.structured)
    if answer.is_error:
        error = "\n".join(_in_words(block) for block in others)
        if not error and answer.structured is not None:
            error = msgspec.json.encode(answer.structured).decode()
        return ToolCompleted(call_id, error=cut(error or "The tool failed without saying why."))
    if answer.structured is not None:
        others = _without_own_text(others, answer.structured)
    result = _result(answer, others)
    whole = msgspec.json.encode(result)
    if len(whole) > RESULT_BYTES:
        words = [] if answer.structured is None or repeats else [msgspec.json.encode(answer.structured).decode()]
        words += [_in_words(block) for block in answer.blocks if not _is_blank(block)]
        result = _truncated("\n".join(words) or whole.decode(), len(whole))
    return ToolCompleted(call_id, result=result)


def cut(error: str) -> str:
    """The error, no longer than a record may hold."""
    if len(error) <= ERROR_CHARACTERS:
        return error
    return f"{error[:ERROR_CHARACTERS]}… (cut from {len(error)} characters)"


def _result(answer: Answer, others: list[JSONObject]) -> JSONObject:
    structured = answer.structured
    if structured is None:
        return {"content": answer.blocks}
    if isinstance(structured, dict) and not others:
        return structured
    return {"structuredContent": structured, **({"content": others} if others else {})}


def _is_blank(block: JSONObject) -> bool:
    return block.get("type") == "text" and not str(block.get("text", "")).strip()


def _without_own_text(blocks: list[JSONObject], structured: object) -> list[JSONObject]:
    """The blocks that are more than the structured content again, which SDKs add for clients that know only text."""
    if _repeats(blocks, structured):
        return []
    return [block for block in blocks if not _repeats([block], structured)]


def _repeats(blocks: list[JSONObject], structured: object) -> bool:
    """Whether the blocks are only the structured content as text: as JSON, or the value or values of its `result`."""
    if any(block.get("type") != "text" for block in blocks):
        return False
    texts = [str(block["text"]) for block in blocks]
    values: list[object] = [structured]
    if isinstance(structured, dict) and set(structured) == {"result"}:
        values.append(structured["result"])
        if isinstance(items := structured["result"], list) and len(items) == len(texts):
            return all(map(_is_text_of, texts, items))
    return len(texts) == 1 and any(_is_text_of(texts[0], value) for value in values)


def _is_text_of(text: str, value: object) -> bool:
    if text == value:
        return True
    try:
        return bool(msgspec.json.decode(text) == value)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return False


def _in_words(block: JSONObject) -> str:
    """A block in words: its text, or what it is and how large."""
    match block:
        case {"type": "text", "text": str(text)} | {"resource": {"text": str(text)}}:
            return text
        case {"resource": {"uri": str(uri), "blob": str(data)}}:
            return f"[{uri}: a file of {len(data)} base64 characters, left out]"
        case {"type": str(kind), "mimeType": str(mime), "data": str(data)}:
            return f"[{kind}, {mime}: {len(data)} base64 characters, left out]"
    return msgspec.json.encode(block).decode()


def _truncated(text: str, full_bytes: int) -> JSONObject:
    while True:
        kept: JSONObject = {"truncated": True, "full_bytes": full_bytes, "text": text}
        size = len(msgspec.json.encode(kept))
        if size <= RESULT_BYTES:
            return kept
        text = text[: min(int(len(text) * RESULT_BYTES / size), len(text) - 1)]
