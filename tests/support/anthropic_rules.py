"""What the Messages API accepts: a request's faults, in the API's own words where they are known.

https://platform.claude.com/docs/en/api/messages
https://platform.claude.com/docs/en/agents-and-tools/tool-use/implement-tool-use
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, SchemaError  # type: ignore[import-untyped]

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
PROPERTY = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
MAGIC = {"image/png": b"\x89PNG\r\n\x1a\n", "image/jpeg": b"\xff\xd8\xff", "image/gif": b"GIF8", "image/webp": b"RIFF"}
BROKEN = b"not really a picture"
"""Whoever sends a picture with these bytes in it is told that it could not be processed."""


def faults(request: Any) -> list[str]:
    """Everything that the API would refuse this request for; it itself names the first."""
    return [*_outside(request), *_messages(request)]


def _outside(request: Any) -> Iterator[str]:
    if not isinstance(request.get("model"), str):
        yield "model: Field required"
    if not isinstance(request.get("max_tokens"), int) or request["max_tokens"] < 1:
        yield "max_tokens: must be greater than or equal to 1"
    for block in request.get("system", []):
        if not block["text"].strip():
            yield "system: text content blocks must be non-empty"
    tools = request.get("tools", [])
    names = [tool["name"] for tool in tools]
    if len(set(names)) < len(names):
        yield "tools: Tool names must be unique."
    for index, tool in enumerate(tools):
        schema = tool["input_schema"]
        if not NAME.fullmatch(tool["name"]):
            yield f"tools.{index}.custom.name: String should match pattern"
        if schema.get("type") != "object":
            yield f"tools.{index}.custom.input_schema.type: Input should be 'object'"
        if not all(PROPERTY.fullmatch(name) for name in schema.get("properties", {})):
            yield f"tools.{index}.custom.input_schema.properties: Property keys should match pattern"
        if not _is_schema(json.dumps(schema)):
            yield f"tools.{index}.custom.input_schema: JSON schema is invalid. It must match JSON Schema draft 2020-12"
        if {"oneOf", "anyOf", "allOf"} & set(schema):
            yield "tools: input_schema does not support oneOf, allOf, or anyOf at the top level"
    if "tool_choice" in request and not tools:
        yield "tool_choice may only be specified while providing tools"
    marks = str(request).count("'cache_control'")
    if marks > 4:
        yield f"A maximum of 4 blocks with cache_control may be provided. Found {marks}."


@lru_cache
def _is_schema(schema: str) -> bool:
    """Kept in mind: it takes milliseconds, which tests of the first token would count as the server's."""
    try:
        Draft202012Validator.check_schema(json.loads(schema))
    except SchemaError:
        return False
    return True


def _messages(request: Any) -> Iterator[str]:
    turns = request.get("messages")
    if not isinstance(turns, list) or not turns:
        yield "messages: at least one message is required"
        return
    if turns[0]["role"] != "user":
        yield "messages: first message must use the user role"
    if turns[-1]["role"] != "user":
        yield "messages: the conversation must end with a user message"
    open_ids: list[str] = []
    seen: set[str] = set()
    for index, turn in enumerate(turns):
        where = f"messages.{index}"
        if index and turns[index - 1]["role"] == turn["role"]:
            yield f"{where}: roles must alternate"
        if not isinstance(turn["content"], list) or not turn["content"]:
            yield f"{where}: content must be non-empty"
            continue
        results = [block["tool_use_id"] for block in turn["content"] if block["type"] == "tool_result"]
        uses = [block["id"] for block in turn["content"] if block["type"] == "tool_use"]
        if set(results) != set(open_ids) or len(results) != len(open_ids):
            yield f"{where}: tool_use ids were found without tool_result blocks immediately after: {open_ids} {results}"
        if [block["type"] for block in turn["content"][: len(results)]] != ["tool_result"] * len(results):
            yield f"{where}: tool_result blocks must come first"
        if seen & set(uses) or len(set(uses)) < len(uses):
            yield f"{where}: tool_use ids must be unique"
        seen |= set(uses)
        open_ids = uses
        for block in turn["content"]:
            yield from _block(where, turn["role"], block)
    if seen and not request.get("tools"):
        yield "Requests which include `tool_use` or `tool_result` blocks must define tools"
    yield from _thinking(request, turns)


def _thinking(request: Any, turns: Any) -> Iterator[str]:
    """While tools are being called, the thinking before the call has to come back."""
    calling = [turn for turn in turns if any(block["type"] == "tool_use" for block in turn["content"])]
    ongoing = calling and calling[-1] is turns[-2] and all(b["type"] == "tool_result" for b in turns[-1]["content"])
    if request.get("thinking", {}).get("type") == "enabled" and ongoing:  # noqa: SIM102
        if calling[-1]["content"][0]["type"] not in ("thinking", "redacted_thinking"):
            yield "messages: Expected `thinking` or `redacted_thinking`, but found `text`."


def _block(where: str, role: str, block: Any) -> Iterator[str]:
    match block:
        case {"type": "text", "text": str(text)}:
            if not text.strip():
                yield f"{where}: text content blocks must contain non-whitespace text"
        case {"type": "tool_use", "name": str(name), "input": dict(), "id": str(use_id)} if role == "assistant":
            if not NAME.fullmatch(name) or not re.fullmatch(r"[a-zA-Z0-9_-]+", use_id):
                yield f"{where}: tool_use.name: String should match pattern"
        case {"type": "tool_result", "content": [_, *_] as content} if role == "user":
            for inner in content:
                if inner["type"] not in ("text", "image"):
                    yield f"{where}: tool_result.content: {inner['type']}"
                yield from _block(where, role, inner)
        case {"type": "image", "source": {"type": "base64", "media_type": str(kind), "data": str(data)}}:
            yield from _image(where, kind, data)
        case {"type": "thinking", "thinking": str(), "signature": str(signature)} if role == "assistant":
            if not signature.startswith("signed"):
                yield f"{where}: Invalid `signature` in `thinking` block"
        case {"type": "redacted_thinking", "data": str()} if role == "assistant":
            pass
        case _:
            yield f"{where}: a block that can't be here: {str(block)[:200]}"


def _image(where: str, kind: str, data: str) -> Iterator[str]:
    try:
        found = base64.b64decode(data, validate=True)
    except ValueError:
        yield f"{where}: image.source.base64: invalid base64 data"
        return
    if not found.startswith(MAGIC.get(kind, b"nothing")):
        yield f"{where}: Image does not match the provided media type {kind}"
    if BROKEN in found:
        yield f"{where}: Could not process image"
