"""The result of a tool call as it is stored and sent to the model: complete but without repetition, up to a limit."""

from __future__ import annotations

import msgspec

from agent_chat.agents import ToolCompleted
from agent_chat.agents.mcp.connection import ToolResult
from agent_chat.stores.models import JSONObject

RESULT_BYTES = 64 * 1024
"""The largest stored result, as JSON."""
ERROR_CHARACTERS = 4_000


def build_completion(call_id: str, result: ToolResult) -> ToolCompleted:
    """Build the ToolCompleted of a call. A result of more than RESULT_BYTES is truncated.

    A truncated result is `{"truncated": true, "full_bytes": the size of the whole as JSON, "text": the beginning}`. Its
    text replaces images and files by a note, since a part of one is of no use.
    """
    blocks = [block for block in result.blocks if not _is_blank(block)]
    repeats = result.structured is not None and _repeats(blocks, result.structured)
    if result.is_error:
        error = "\n".join(_describe_block(block) for block in blocks)
        if not error and result.structured is not None:
            error = msgspec.json.encode(result.structured).decode()
        return ToolCompleted(call_id, error=truncate_error(error or "The tool failed without an error message."))
    if result.structured is not None:
        blocks = _without_repetition(blocks, result.structured)
    document = _build_document(result, blocks)
    encoded = msgspec.json.encode(document)
    if len(encoded) > RESULT_BYTES:
        texts = [] if result.structured is None or repeats else [msgspec.json.encode(result.structured).decode()]
        texts += [_describe_block(block) for block in result.blocks if not _is_blank(block)]
        document = _truncate("\n".join(texts) or encoded.decode(), len(encoded))
    return ToolCompleted(call_id, result=document)


def truncate_error(error: str) -> str:
    """Return the error, truncated to ERROR_CHARACTERS."""
    if len(error) <= ERROR_CHARACTERS:
        return error
    return f"{error[:ERROR_CHARACTERS]}… (truncated from {len(error)} characters)"


def _build_document(result: ToolResult, blocks: list[JSONObject]) -> JSONObject:
    structured = result.structured
    if structured is None:
        return {"content": result.blocks}
    if isinstance(structured, dict) and not blocks:
        return structured
    return {"structuredContent": structured, **({"content": blocks} if blocks else {})}


def _is_blank(block: JSONObject) -> bool:
    return block.get("type") == "text" and not str(block.get("text", "")).strip()


def _without_repetition(blocks: list[JSONObject], structured: object) -> list[JSONObject]:
    """Drop the blocks that repeat the structured content, which SDKs add for clients that only read text."""
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


def _describe_block(block: JSONObject) -> str:
    """Return a block's text, or a note with its type and size."""
    match block:
        case {"type": "text", "text": str(text)} | {"resource": {"text": str(text)}}:
            return text
        case {"resource": {"uri": str(uri), "blob": str(data)}}:
            return f"[{uri}: a file of {len(data)} base64 characters, omitted]"
        case {"type": str(kind), "mimeType": str(mime), "data": str(data)}:
            return f"[{kind}, {mime}: {len(data)} base64 characters, omitted]"
    return msgspec.json.encode(block).decode()


def _truncate(text: str, full_bytes: int) -> JSONObject:
    while True:
        document: JSONObject = {"truncated": True, "full_bytes": full_bytes, "text": text}
        size = len(msgspec.json.encode(document))
        if size <= RESULT_BYTES:
            return document
        text = text[: min(int(len(text) * RESULT_BYTES / size), len(text) - 1)]
