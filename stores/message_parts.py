"""The parts of a stored message in the order in which a run generated them: text, reasoning and tool calls.

A message stores its text as one string, and the places of everything else in it. A viewer of the run sees the parts one
after another; whoever shows a stored message, or continues one in the middle, needs the same order. Storing the parts
themselves was refused: the text would be stored twice, and clients that show only the text would have to join it.
"""

from __future__ import annotations

import msgspec

from agent_chat.stores.models import JSONObject, Message, ToolCall


class TextPart(msgspec.Struct, frozen=True):
    """Text between other parts. `offset` is the number of characters of the message's content before it."""

    offset: int
    text: str


class ReasoningPart(msgspec.Struct, frozen=True):
    """A block of reasoning, with its index in `metadata["run"]["reasoning"]`."""

    index: int
    text: str


class ToolCallPart(msgspec.Struct, frozen=True):
    """A tool call, with its index in the message's tool calls and its id."""

    index: int
    id: str
    tool_call: ToolCall


MessagePart = TextPart | ReasoningPart | ToolCallPart


def message_parts(message: Message) -> list[MessagePart]:
    """Return the message's parts in order; no text is empty, and no two texts are adjacent.

    The order is exact even where several parts have the same offset: a block of reasoning also stores how many calls
    are before it, and no two blocks have the same place. A call without a stored place comes before the next text.
    """
    parts: list[MessagePart] = []
    content, end = message.content, 0
    for offset, part in _placed(message):
        offset = min(max(offset, end), len(content))
        if offset > end:
            parts.append(TextPart(end, content[end:offset]))
        parts.append(part)
        end = offset
    if end < len(content):
        parts.append(TextPart(end, content[end:]))
    return parts


def _placed(message: Message) -> list[tuple[int, ReasoningPart | ToolCallPart]]:
    """Everything but the text, in order, each with its offset in the text."""
    places: list[JSONObject] = (message.run or {}).get("tool_calls", [])
    placed: list[tuple[int, ReasoningPart | ToolCallPart]] = []
    blocks = list(message.reasoning or ())
    for index, call in enumerate(message.tool_calls):
        while blocks and blocks[0]["calls"] <= index:
            placed.append(_reasoning(blocks.pop(0)))
        place = places[index] if index < len(places) else {}
        placed.append((place.get("offset", 0), ToolCallPart(index, place.get("id", f"call_{index}"), call)))
    return placed + [_reasoning(block) for block in blocks]


def _reasoning(block: JSONObject) -> tuple[int, ReasoningPart]:
    return block["after"], ReasoningPart(block["index"], block["text"])
