"""The reducer: builds a running message from its events.

The whole server relies on one law (I22): `fold` of a run's deltas and tool events, without its terminal event, has the
content, the tool calls and the reasoning of the stored message. A run builds its message with this class, snapshots for
late viewers and the repair of orphaned runs use it too, and `web_demo/client.js` implements the same reducer.

Reasoning is folded if the run's first message has `metadata["run"]["reasoning"]`: this function needs no setting, and
all processes agree though their settings may differ.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from agent_chat.stores.events import (
    Event,
    MessageDelta,
    MessageSnapshot,
    ReasoningDelta,
    RunStarted,
    ToolCallCompleted,
    ToolCallStarted,
)
from agent_chat.stores.models import ACTIVITY, JSONObject, Message, ToolCall


class Fold:
    """A message in progress.

    Attributes:
        length: of the text so far, in characters (Unicode code points).
        tool_calls: by index.
        places: the entries of `metadata["run"]["tool_calls"]`: id, round and offset in the text of each call.
        reasoning: the blocks of reasoning, by index; None if they are not stored.
        _run: what is known of `metadata["run"]`.
        _base: the message that it began with.
        _parts: the text, in parts to be joined.
    """

    def __init__(self, message: Message) -> None:
        self._run: JSONObject = {}
        self._start(message)

    def _start(self, message: Message) -> None:
        """Begin with that message. What is already known of its run, from a checkpoint, stays known."""
        self._run = _merge_runs(self._run, message.run or {})
        self._base = message
        self._parts = [message.content]
        self.length = len(message.content)
        self.tool_calls = list(message.tool_calls)
        self.places = list(self._run.get("tool_calls", []))
        self.reasoning = None if message.reasoning is None else [_Block(block) for block in message.reasoning]

    def apply(self, event: Event) -> None:
        """Apply one event. Applying it again changes nothing (I23); a delta after a missing one is ignored."""
        match event:
            case MessageDelta(offset=offset, text=text):
                if offset == self.length:
                    self._parts.append(text)
                    self.length += len(text)
                elif offset < self.length < offset + len(text):
                    self._parts.append(text[self.length - offset :])
                    self.length = offset + len(text)
            case ToolCallStarted(index=index) if index == len(self.tool_calls):
                call = ToolCall(event.tool_name, event.arguments, start_time=event.start_time)
                self.tool_calls.append(call)
                if index == len(self.places):
                    self.places.append({"id": event.id, "round": index, "offset": self.length})
            case ToolCallCompleted(index=index) if index < len(self.tool_calls):
                if self.tool_calls[index].end_time is None:
                    self.tool_calls[index] = event.tool_call
            case ReasoningDelta() if self.reasoning is not None:
                self._apply_reasoning(self.reasoning, event)
            case RunStarted(message=message) | MessageSnapshot(message=message):
                self._start(message)
            case _:
                pass

    def _apply_reasoning(self, blocks: list[_Block], delta: ReasoningDelta) -> None:
        if delta.index == len(blocks) and delta.after == self.length and delta.offset == 0:
            place = {"index": delta.index, "after": delta.after, "calls": len(self.tool_calls)}
            blocks.append(_Block({**place, "text": ""}))
        if delta.index < len(blocks):
            blocks[delta.index].add(delta.offset, delta.text)

    def message(self) -> Message:
        """Return the message so far. `metadata["run"]` contains the places of its tool calls, and its reasoning."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        message = replace(self._base, content=self._parts[0], tool_calls=list(self.tool_calls))
        if not self._run:
            return message
        run = {**self._run, "tool_calls": self.places[: len(self.tool_calls)]}
        if self.reasoning is not None:
            run["reasoning"] = [block.json() for block in self.reasoning]
        return message.with_run(**run)


class _Block:
    """A block of reasoning that grows."""

    def __init__(self, block: JSONObject) -> None:
        self._block = block
        self._parts = [block["text"]]
        self._length = len(block["text"])

    def add(self, offset: int, text: str) -> None:
        """Append the part of the text that is new, unless text before it is missing."""
        if offset <= self._length < offset + len(text):
            self._parts.append(text[self._length - offset :])
            self._length = offset + len(text)

    def json(self) -> JSONObject:
        """Return the block so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
            self._block = {**self._block, "text": self._parts[0]}
        return self._block


def _merge_runs(before: JSONObject, after: JSONObject) -> JSONObject:
    """Merge two states of `metadata["run"]`: the ids and rounds of calls, model and usage are in no other event."""
    calls = max(before.get("tool_calls", []), after.get("tool_calls", []), key=len)
    changing = (ACTIVITY, "reasoning")
    lasting = {name: value for name, value in before.items() if value is not None and name not in changing}
    merged = {**after, **lasting}
    return {**merged, "tool_calls": calls} if merged else {}


def fold(events: Iterable[Event], onto: Message) -> Message:
    """Apply the events of one message to it, oldest first. What it already contains is skipped."""
    folding = Fold(onto)
    for event in events:
        folding.apply(event)
    return folding.message()
