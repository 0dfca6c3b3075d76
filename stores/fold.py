"""The reducer: a running message from its events.

The theorem this project stands on: `fold` of a run's deltas and tool events, its terminal event not looked into,
has the content and the tool calls of the message that was stored. The runner builds the message with the same
class, a late viewer's snapshot and crash repair use it too, and `web_demo/client.js` is the same reducer again.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from agent_chat.stores.events import (
    Event,
    MessageDelta,
    MessageSnapshot,
    RunStarted,
    ToolCallCompleted,
    ToolCallStarted,
)
from agent_chat.stores.models import ACTIVITY, JSONObject, Message, ToolCall


class Fold:
    """A message in progress, as text parts and tool calls that events are added to."""

    def __init__(self, message: Message) -> None:
        self._run: JSONObject = {}
        self._start(message)

    def _start(self, message: Message) -> None:
        """Begin anew with that message; what was known of its run already, by a checkpoint, stays known."""
        self._run = _known(self._run, message.run or {})
        self._base = message
        self._parts = [message.content]
        self.length = len(message.content)
        self.tool_calls = list(message.tool_calls)
        self.places = list(self._run.get("tool_calls", []))

    def apply(self, event: Event) -> None:
        """Add one event. Applying one twice does no harm; a delta behind a hole is not applied."""
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
                    self.places.append({"id": f"call_{index}", "round": index, "offset": self.length})
            case ToolCallCompleted(index=index) if index < len(self.tool_calls):
                if self.tool_calls[index].end_time is None:
                    self.tool_calls[index] = event.tool_call
            case RunStarted(message=message) | MessageSnapshot(message=message):
                self._start(message)
            case _:
                pass

    def message(self) -> Message:
        """The message as far as it has come; where its calls stand in the text is in `metadata["run"]`."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        message = replace(self._base, content=self._parts[0], tool_calls=list(self.tool_calls))
        if not self._run:
            return message
        return message.with_run(**{**self._run, "tool_calls": self.places[: len(self.tool_calls)]})


def _known(before: JSONObject, told: JSONObject) -> JSONObject:
    """What two tellings know of a run: the ids and rounds of its calls, its model and usage are in no other event."""
    calls = max(before.get("tool_calls", []), told.get("tool_calls", []), key=len)
    lasting = {name: value for name, value in before.items() if value is not None and name != ACTIVITY}
    known = {**told, **lasting}
    return {**known, "tool_calls": calls} if known else {}


def fold(events: Iterable[Event], onto: Message) -> Message:
    """Apply one message's events to it, oldest first. A delta that it already holds is passed over."""
    folding = Fold(onto)
    for event in events:
        folding.apply(event)
    return folding.message()
