"""Builds the requests of one run: the history, and the run's own message so far in the form in which it is stored.

One function makes the turns of both (history.py), so that the prefix that a provider has cached stays the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from agent_chat.agents import Ended, Part, Run, Text, ToolCompleted, ToolStarted
from agent_chat.agents.claude.attachments import LoadedFiles
from agent_chat.agents.claude.history import (
    Turn,
    build_history,
    contains_tool_use,
    merge_turns,
    message_turns,
    replace_images,
)
from agent_chat.agents.claude.messages_api import Failure, RequestedCall, StreamedResponse
from agent_chat.agents.claude.tool_schemas import NO_TOOL
from agent_chat.agents.rounds import separator
from agent_chat.stores.models import JSONObject, Message, ToolCall

_CALL_ID = re.compile(r"[\w.:|-]{1,128}", re.ASCII)
_SHRINK = 3
"""The divisor of the budget after a request that was too long."""


class RequestBuilder:
    """Builds the model's requests for one run, and sums up what they used.

    Args:
        request: the request without its messages.
        budget: how many tokens of history are included, roughly.

    Attributes:
        response: the response to the latest request, while and after it is streamed.
    """

    def __init__(self, run: Run, request: JSONObject, budget: int, files: LoadedFiles) -> None:
        self.run = run
        self.response = StreamedResponse()
        self._request = request
        self._budget = budget
        self._files = files
        self._with_images = True
        self._history = self._build_history()
        self._text: list[str] = []
        self._length = 0
        self._calls: list[ToolCall] = []
        self._places: list[JSONObject] = []
        self._indexes: dict[str, int] = {}
        self._thinking: dict[int, list[JSONObject]] = {}
        self._usage: JSONObject = {}
        self._is_counted = True
        self._model: str | None = None

    def build(self, *, last: bool) -> JSONObject:
        """The whole next request. In the last round the model may not call tools."""
        turns = merge_turns([*self._history, *self._own_turns()])
        if not self._with_images:
            turns = replace_images(turns)
        request = {**self._request, "messages": turns}
        if "tools" not in request and contains_tool_use(turns):
            request["tools"] = [NO_TOOL]
            last = True
        if last and "tools" in request:
            request["tool_choice"] = {"type": "none"}
        return request

    def simplify(self, failure: Failure) -> bool:
        """Make the next request shorter or simpler, if that may help; False if it cannot be."""
        if failure.too_long:
            before = self._history
            while self._budget > 1:
                self._budget //= _SHRINK
                self._history = self._build_history()
                if self._history != before:
                    return True
        if (failure.rejected or failure.too_long) and self._with_images:
            self._with_images = False
            turns = [*self._history, *self._own_turns()]
            return replace_images(turns) != turns
        return False

    def add(self, part: Part) -> None:
        """Add a part of the run's own message."""
        match part:
            case Text(text=text):
                if text and self._places and self._places[-1]["offset"] == self._length:  # as in the stored message
                    text = separator("".join(self._text)) + text
                self._text.append(text)
                self._length += len(text)
            case ToolStarted():
                self._indexes[part.id] = len(self._calls)
                self._calls.append(ToolCall(part.tool_name, part.arguments))
                self._places.append({"round": part.round, "offset": self._length})
            case ToolCompleted():
                index = self._indexes[part.id]
                self._calls[index] = msgspec.structs.replace(self._calls[index], result=part.result, error=part.error)

    def with_unique_ids(self, calls: Sequence[RequestedCall], round: int) -> list[RequestedCall]:
        """The calls of a round with the service's ids, where those are usable and new; some servers repeat theirs."""
        used = set(self._indexes)
        unique: list[RequestedCall] = []
        for index, call in enumerate(calls):
            call_id = call.id if _CALL_ID.fullmatch(call.id) and call.id not in used else f"{round}_{index}"
            while call_id in used:
                call_id += "_"
            used.add(call_id)
            unique.append(msgspec.structs.replace(call, id=call_id))
        return unique

    def add_thinking(self, round: int, blocks: list[JSONObject]) -> None:
        """Store a round's thinking: the API requires it back, signed, in the later requests of the run."""
        self._thinking[round] = blocks

    def begin_response(self) -> StreamedResponse:
        """Begin with the response to the next request."""
        self.response, self._is_counted = StreamedResponse(), False
        return self.response

    def count_usage(self) -> None:
        """Add what the service counted for the latest response, which has ended or failed."""
        self._model = self.response.model or self._model
        self._is_counted = True
        _add_counts(self._usage, self.response.usage)

    def ended(self, stop_reason: str | None = None) -> Ended:
        """What is known so far, including the response that is being streamed."""
        usage = dict(self._usage)
        if not self._is_counted:
            _add_counts(usage, self.response.usage)
        return Ended(stop_reason=stop_reason, model=self.response.model or self._model, usage=usage or None)

    def _build_history(self) -> list[Turn]:
        return build_history(self.run.messages, self._budget, earlier=self.run.earlier, files=self._files)

    def _own_turns(self) -> list[Turn]:
        """The turns of the run's own message; the assistant has one in each round."""
        run: JSONObject = {"status": "in_progress", "tool_calls": self._places}
        text = "".join(self._text)
        turns = message_turns(Message(self.run.id, "", text, "", "assistant", self._calls, [], {"run": run}, ""))
        for round, turn in enumerate(turn for turn in turns if turn["role"] == "assistant"):
            turn["content"] = [*self._thinking.get(round, []), *turn["content"]]
        return turns


def _add_counts(usage: JSONObject, counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        usage[name] = usage.get(name, 0) + count
