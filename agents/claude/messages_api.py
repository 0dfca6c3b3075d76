"""What a server of the Anthropic Messages API says: the stream of one answer, and refusals.

The deciding half of agents/claude/agent.py, without a request and without an await. Only the fields that are used are
decoded, and leniently: gateways and local servers speak this too, and each leaves something out or adds something.

https://platform.claude.com/docs/en/build-with-claude/streaming
https://platform.claude.com/docs/en/api/errors
"""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec

from agent_chat.agents import AgentError, Reasoning, Text
from agent_chat.stores.models import JSONObject
from agent_chat.stores.text import without_surrogates


class _Delta(msgspec.Struct):
    type: str | None = ""
    text: str | None = ""
    thinking: str | None = ""
    signature: str | None = ""
    partial_json: str | None = ""
    stop_reason: str | None = None


class _Block(msgspec.Struct):
    type: str | None = ""
    name: str | None = ""
    text: str | None = ""
    thinking: str | None = ""
    signature: str | None = ""
    data: str | None = ""
    input: Any = None


class _Start(msgspec.Struct):
    model: str | None = None
    usage: dict[str, Any] | None = None


class _Event(msgspec.Struct):
    """Any event of the stream; what it doesn't have keeps its default."""

    type: str = ""
    index: int = 0
    delta: _Delta | None = None
    content_block: _Block | None = None
    message: _Start | None = None
    usage: dict[str, Any] | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)

ANSWER_BYTES = 8 * 2**20
"""The most that is buffered of one answer: of a line without an end, and of arguments and thinking."""
_TYPES = {
    "content_block_start": ("content_block", ("text", "tool_use", "thinking", "redacted_thinking")),
    "content_block_delta": ("delta", ("text_delta", "input_json_delta", "thinking_delta", "signature_delta")),
}
"""By an event's type: the field whose types are used here, and these types."""


class Failure(Exception):
    """A request failed: what the client is told, and what may be done about it.

    Args:
        again: the same request may well succeed.
        too_long: a shorter one may.
        refused: the service found something wrong with it and named nothing that is known here.
    """

    def __init__(
        self,
        detail: str,
        *,
        code: str = "agent_failed",
        again: bool = False,
        retry_after: float | None = None,
        too_long: bool = False,
        refused: bool = False,
    ) -> None:
        super().__init__(detail)
        self.error = AgentError(detail, code=code, retryable=again, retry_after=retry_after)
        self.again = again
        self.too_long = too_long
        self.refused = refused


class Use(msgspec.Struct, frozen=True):
    """A call that the model wants made. `unreadable`: its arguments, kept as they came, were no JSON object."""

    name: str
    arguments: JSONObject
    unreadable: bool = False


class Answer:
    """What the model says to one request, as it comes in.

    `spoke` is true once any of it was to be shown; `ended` once the model has said that it is done; `failure` is set
    once the service has said that it failed, or something that can't be read.
    """

    def __init__(self) -> None:
        self.spoke = False
        self.ended = False
        self.failure: Failure | None = None
        self.stop_reason: str | None = None
        self.model: str | None = None
        self.usage: dict[str, int] = {}
        self.uses: list[Use] = []
        self.thinking: list[JSONObject] = []
        self._rest = bytearray()
        self._lenient = False
        self._halves: dict[int, str] = {}
        self._buffered = 0
        self._open: dict[int, tuple[_Block, list[str], list[str]]] = {}

    def take(self, data: bytes) -> list[Text | Reasoning]:
        """Add what came over the wire, wherever it was cut; what of it is to be shown, with neighbours as one."""
        complete, line_end, rest = data.rpartition(b"\n")
        shown: list[Text | Reasoning] = []
        if line_end:
            shown = self._take_lines(bytes(self._rest) + complete if self._rest else complete)
            self._rest.clear()
        if rest:
            self._rest += rest
            self._limit(len(self._rest))
        return shown

    def _take_lines(self, data: bytes) -> list[Text | Reasoning]:
        shown: list[Text | Reasoning] = []
        for line in data.split(b"\n"):
            if not line.startswith(b"data:") or not line[5:].strip():
                continue
            part = self._decode(line[5:])
            if self.ended or self.failure:
                break
            if part is not None and part.text:
                if shown and type(shown[-1]) is type(part):
                    part = type(part)(shown.pop().text + part.text)
                shown.append(part)
                self.spoke = True
        return shown

    def _limit(self, size: int) -> None:
        if size > ANSWER_BYTES and self.failure is None:
            self.failure = Failure("The model's answer is too large.")

    def _decode(self, data: bytes) -> Text | Reasoning | None:
        """Take one event; what it has to show."""
        try:
            return self._take(_decoder.decode(data))
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._lenient = True
        try:
            return self._take(_decode_leniently(data))
        except (msgspec.ValidationError, ValueError, RecursionError):
            self.failure = Failure("The model's answer can't be read.", again=True)
            return None

    def _take(self, event: _Event) -> Text | Reasoning | None:
        match event.type:
            case "content_block_delta" if event.delta is not None:
                return self._take_delta(event.index, event.delta)
            case "content_block_start" if event.content_block is not None:
                block = event.content_block
                self._open[event.index] = (block, [], [])
                if block.type == "text":
                    return Text(self._whole(event.index, block.text or ""))
                return Reasoning(self._whole(event.index, block.thinking or ""))
            case "content_block_stop":
                return self._close(event.index)
            case "message_start" if event.message is not None:
                self.model = event.message.model
                self._count(event.message.usage)
            case "message_delta":
                self.stop_reason = (event.delta and event.delta.stop_reason) or self.stop_reason
                self._count(event.usage)
            case "message_stop":
                self.ended = True
            case "error":
                self.failure = failure_of_event(event.error)
        return None

    def _take_delta(self, index: int, delta: _Delta) -> Text | Reasoning | None:
        if delta.type == "text_delta":
            return Text(self._whole(index, delta.text or ""))
        _, parts, signatures = self._open.setdefault(index, (_Block(), [], []))
        match delta.type:
            case "input_json_delta":
                self._buffer(parts, delta.partial_json)
            case "thinking_delta":
                self._buffer(parts, delta.thinking)
                return Reasoning(self._whole(index, parts[-1]))
            case "signature_delta":
                self._buffer(signatures, delta.signature)
        return None

    def _whole(self, index: int, text: str) -> str:
        """More text of a block, without a surrogate whose other half is in the next delta, but with the last one's."""
        if not self._lenient:  # the strict decoder refuses lone surrogates
            return text
        text = self._halves.pop(index, "") + text
        if "\ud800" <= text[-1:] <= "\udbff":
            self._halves[index] = text[-1]
            text = text[:-1]
        return without_surrogates(text)

    def _buffer(self, parts: list[str], more: str | None) -> None:
        parts.append(more or "")
        self._buffered += len(parts[-1])
        self._limit(self._buffered)

    def _close(self, index: int) -> Text | Reasoning | None:
        """End a block; what there is to show if it ends with half a surrogate pair."""
        block, parts, signatures = self._open.pop(index, (_Block(), [], []))
        half = without_surrogates(self._halves.pop(index, ""))
        match block.type:
            case "text":
                return Text(half)
            case "tool_use":
                self.uses.append(_use(block, without_surrogates("".join(parts))))
            case "thinking":
                thinking = without_surrogates((block.thinking or "") + "".join(parts))
                signature = (block.signature or "") + "".join(signatures)
                self.thinking.append({"type": "thinking", "thinking": thinking, "signature": signature})
                return Reasoning(half)
            case "redacted_thinking":
                self.thinking.append({"type": "redacted_thinking", "data": block.data or ""})
        return None

    def _count(self, usage: dict[str, Any] | None) -> None:
        """Take the counts; they are cumulative within one answer."""
        for name, value in (usage or {}).items():
            if name.endswith("_tokens") and isinstance(value, int):
                self.usage[name] = value


def _decode_leniently(data: bytes) -> _Event:
    """Decode an event that is not strictly valid.

    Gateways written in JavaScript split a surrogate pair between two deltas, which only `json` decodes; and blocks of a
    type that is not used here may have fields of any type. Raises: ValueError, msgspec.ValidationError, RecursionError.
    """
    event = json.loads(data)
    if not isinstance(event, dict):
        raise ValueError("not an object")
    name, known = _TYPES.get(str(event.get("type")), ("", ()))
    part = event.get(name)
    if isinstance(part, dict) and part.get("type") not in known:
        event[name] = {"type": "other"}
    if event.get("type") != "content_block_delta":
        event = json.loads(without_surrogates(json.dumps(event, ensure_ascii=False)))
    return msgspec.convert(event, _Event)


def _use(block: _Block, text: str) -> Use:
    """The arguments are the joined pieces, or what stood in the block's start where none came."""
    try:
        found = msgspec.json.decode(text) if text.strip() else (block.input or {})
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        found = None
    if isinstance(found, dict):
        return Use(block.name or "", found)
    return Use(block.name or "", {"unreadable": text[:4_000] or str(block.input)[:4_000]}, unreadable=True)


def failure_of_event(error: object) -> Failure:
    """What an `error` event in mid-stream means."""
    kind = error.get("type") if isinstance(error, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    return failure_of_status(_STATUS.get(str(kind), 500), str(said or ""), None)


_STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
}


def failure_of_status(status: int, said: str, retry_after: str | None) -> Failure:
    """What a status means. The service's own text stays in our log: it may name accounts and limits."""
    wait = _seconds(retry_after)
    match status:
        case 401 | 403:
            return Failure("The model's service refused this server's key.")
        case 402:
            return Failure("The model's service wants to be paid first.")
        case 404:
            return Failure("The model's service doesn't know this agent's model.")
        case 413:
            return Failure(TOO_LONG, too_long=True)
        case 400 | 422 if any(words in said.lower() for words in _LONG):
            return Failure(TOO_LONG, too_long=True)
        case 429:
            detail = "The model's rate limit is reached."
            return Failure(detail, code="agent_overloaded", again=True, retry_after=wait)
        case 503 | 529:
            return Failure("The model is overloaded.", code="agent_overloaded", again=True, retry_after=wait)
        case 408 | 504:
            return Failure("The model took too long.", code="agent_timeout", again=True, retry_after=wait)
        case _ if status >= 500 or status == 409:
            return Failure("The model's service failed.", again=True, retry_after=wait)
        case _:
            return Failure("The model's service refused the request.", refused=True)


TOO_LONG = "The thread is longer than the model can read."
_LONG = ("too long", "too large", "context", "too many tokens", "maximum number of tokens")


def _seconds(text: str | None) -> float | None:
    """A Retry-After in seconds; null for its other form, a date, and for nonsense."""
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
