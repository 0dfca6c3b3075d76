"""The Anthropic Messages API as this package reads it: the event stream of one response, and error responses.

The deciding half of agents/claude/agent.py: it sends no request and awaits nothing. Only the fields that are used are
decoded, and leniently: gateways and local servers implement this API too, and each omits or adds something.

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
    id: Any = None
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
    """Any event of the stream. Fields that an event does not have keep their defaults."""

    type: str = ""
    index: int = 0
    delta: _Delta | None = None
    content_block: _Block | None = None
    message: _Start | None = None
    usage: dict[str, Any] | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)

RESPONSE_BYTES = 8 * 2**20
"""How much of one response is buffered at most: of a line without an end, and of arguments and thinking."""
_TYPES = {
    "content_block_start": ("content_block", ("text", "tool_use", "thinking", "redacted_thinking")),
    "content_block_delta": ("delta", ("text_delta", "input_json_delta", "thinking_delta", "signature_delta")),
}
"""By an event's type: the field that has a type of its own, and those of its types that are used here."""


class Failure(Exception):
    """A request failed. `error` is what the client is sent; the other attributes say what may help.

    Args:
        retryable: the same request may succeed later.
        too_long: a shorter request may succeed.
        rejected: the service rejected the request for a reason that is not known here.
    """

    def __init__(
        self,
        detail: str,
        *,
        code: str = "agent_failed",
        retryable: bool = False,
        retry_after: float | None = None,
        too_long: bool = False,
        rejected: bool = False,
    ) -> None:
        super().__init__(detail)
        self.error = AgentError(detail, code=code, retryable=retryable, retry_after=retry_after)
        self.retryable = retryable
        self.too_long = too_long
        self.rejected = rejected


class RequestedCall(msgspec.Struct, frozen=True):
    """A tool call that the model requests.

    `unreadable`: its arguments were not a JSON object; `arguments` then contains their text. `id`: the service's; "" if
    it sent none.
    """

    name: str
    arguments: JSONObject
    unreadable: bool = False
    id: str = ""


class StreamedResponse:
    """The response to one request, decoded while it arrives.

    Attributes:
        has_output: whether any text or reasoning was returned by `feed`. Such a response must not be requested again.
        complete: whether its last event has arrived. Nothing is decoded after that.
        failure: set when the service reports an error, or sends something that cannot be decoded.
        stop_reason, model: None until the service has sent them.
        usage: the token counts so far, by the API's names.
        calls: the requested tool calls whose blocks are complete.
        thinking: the complete blocks of thinking, in the form in which the API takes them back.
    """

    def __init__(self) -> None:
        self.has_output = False
        self.complete = False
        self.failure: Failure | None = None
        self.stop_reason: str | None = None
        self.model: str | None = None
        self.usage: dict[str, int] = {}
        self.calls: list[RequestedCall] = []
        self.thinking: list[JSONObject] = []
        self._rest = bytearray()
        self._lenient = False
        self._halves: dict[int, str] = {}
        self._buffered = 0
        self._open: dict[int, tuple[_Block, list[str], list[str]]] = {}

    def feed(self, data: bytes) -> list[Text | Reasoning]:
        """Add bytes of the stream, cut anywhere. Returns the new parts, adjacent ones of one type as one."""
        lines, line_end, rest = data.rpartition(b"\n")
        parts: list[Text | Reasoning] = []
        if line_end:
            parts = self._take_lines(bytes(self._rest) + lines if self._rest else lines)
            self._rest.clear()
        if rest:
            self._rest += rest
            self._check_size(len(self._rest))
        return parts

    def _take_lines(self, data: bytes) -> list[Text | Reasoning]:
        parts: list[Text | Reasoning] = []
        for line in data.split(b"\n"):
            if not line.startswith(b"data:") or not line[5:].strip():
                continue
            part = self._decode(line[5:])
            if self.complete or self.failure:
                break
            if part is not None and part.text:
                if parts and type(parts[-1]) is type(part):
                    part = type(part)(parts.pop().text + part.text)
                parts.append(part)
                self.has_output = True
        return parts

    def _check_size(self, size: int) -> None:
        if size > RESPONSE_BYTES and self.failure is None:
            self.failure = Failure("The model's response is too large.")

    def _decode(self, data: bytes) -> Text | Reasoning | None:
        """Decode and take one event. Returns its text or reasoning, if it has any."""
        try:
            return self._take_event(_decoder.decode(data))
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._lenient = True
        try:
            return self._take_event(_decode_leniently(data))
        except (msgspec.ValidationError, ValueError, RecursionError):
            self.failure = Failure("The model's response cannot be read.", retryable=True)
            return None

    def _take_event(self, event: _Event) -> Text | Reasoning | None:
        match event.type:
            case "content_block_delta" if event.delta is not None:
                return self._take_delta(event.index, event.delta)
            case "content_block_start" if event.content_block is not None:
                block = event.content_block
                self._open[event.index] = (block, [], [])
                if block.type == "text":
                    return Text(self._join_surrogates(event.index, block.text or ""))
                return Reasoning(self._join_surrogates(event.index, block.thinking or ""))
            case "content_block_stop":
                return self._close_block(event.index)
            case "message_start" if event.message is not None:
                self.model = event.message.model
                self._update_usage(event.message.usage)
            case "message_delta":
                self.stop_reason = (event.delta and event.delta.stop_reason) or self.stop_reason
                self._update_usage(event.usage)
            # a stream may end before this without an error of the SDK
            case "message_stop":
                self.complete = True
            # the raw event stream raises nothing for these
            case "error":
                self.failure = failure_of_event(event.error)
        return None

    def _take_delta(self, index: int, delta: _Delta) -> Text | Reasoning | None:
        if delta.type == "text_delta":
            return Text(self._join_surrogates(index, delta.text or ""))
        _, parts, signatures = self._open.setdefault(index, (_Block(), [], []))
        match delta.type:
            case "input_json_delta":
                self._buffer(parts, delta.partial_json)
            case "thinking_delta":
                self._buffer(parts, delta.thinking)
                return Reasoning(self._join_surrogates(index, parts[-1]))
            case "signature_delta":
                self._buffer(signatures, delta.signature)
        return None

    def _join_surrogates(self, index: int, text: str) -> str:
        """The text of a delta; half a surrogate pair at its end waits for the other half in the next delta."""
        if not self._lenient:  # the strict decoder rejects lone surrogates
            return text
        text = self._halves.pop(index, "") + text
        if "\ud800" <= text[-1:] <= "\udbff":
            self._halves[index] = text[-1]
            text = text[:-1]
        return without_surrogates(text)

    def _buffer(self, parts: list[str], more: str | None) -> None:
        parts.append(more or "")
        self._buffered += len(parts[-1])
        self._check_size(self._buffered)

    def _close_block(self, index: int) -> Text | Reasoning | None:
        """Close a block. Returns the half surrogate pair with which it ends, replaced, if it does."""
        block, parts, signatures = self._open.pop(index, (_Block(), [], []))
        half = without_surrogates(self._halves.pop(index, ""))
        match block.type:
            case "text":
                return Text(half)
            case "tool_use":
                self.calls.append(_requested_call(block, without_surrogates("".join(parts))))
            case "thinking":
                thinking = without_surrogates((block.thinking or "") + "".join(parts))
                signature = (block.signature or "") + "".join(signatures)
                self.thinking.append({"type": "thinking", "thinking": thinking, "signature": signature})
                return Reasoning(half)
            case "redacted_thinking":
                self.thinking.append({"type": "redacted_thinking", "data": block.data or ""})
        return None

    def _update_usage(self, usage: dict[str, Any] | None) -> None:
        """Take the token counts, which are cumulative within one response."""
        for name, value in (usage or {}).items():
            if name.endswith("_tokens") and isinstance(value, int):
                self.usage[name] = value


def _decode_leniently(data: bytes) -> _Event:
    """Decode an event that is not strictly valid.

    Gateways written in JavaScript split a surrogate pair between two deltas, which only `json` decodes; and blocks of a
    type that is not used here may have fields of any type.

    Raises: ValueError, msgspec.ValidationError, RecursionError.
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


def _requested_call(block: _Block, text: str) -> RequestedCall:
    """The call of a closed block. Its arguments are the joined deltas, or the block's `input` if there were none."""
    call_id = block.id if isinstance(block.id, str) else ""
    try:
        found = msgspec.json.decode(text) if text.strip() else (block.input or {})
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        found = None
    if isinstance(found, dict):
        return RequestedCall(block.name or "", found, id=call_id)
    unreadable = {"unreadable": text[:4_000] or str(block.input)[:4_000]}
    return RequestedCall(block.name or "", unreadable, unreadable=True, id=call_id)


def failure_of_event(error: object) -> Failure:
    """The failure that an `error` event within a stream reports."""
    kind = error.get("type") if isinstance(error, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return failure_of_status(_STATUS.get(str(kind), 500), str(message or ""), None)


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


def failure_of_status(status: int, message: str, retry_after: str | None) -> Failure:
    """The failure that an HTTP status reports.

    Clients do not get the service's own message, which may name accounts and limits.
    """
    wait = _seconds(retry_after)
    match status:
        case 401 | 403:
            return Failure("The model's service refused this server's key.")
        case 402:
            return Failure("The model's service requires a payment first.")
        case 404:
            return Failure("The model's service does not have this agent's model.")
        case 413:
            return Failure(TOO_LONG, too_long=True)
        case 400 | 422 if any(words in message.lower() for words in _TOO_LONG_WORDS):
            return Failure(TOO_LONG, too_long=True)
        case 429:
            detail = "The model's rate limit is reached."
            return Failure(detail, code="agent_overloaded", retryable=True, retry_after=wait)
        case 503 | 529:
            return Failure("The model is overloaded.", code="agent_overloaded", retryable=True, retry_after=wait)
        case 408 | 504:
            return Failure("The model took too long.", code="agent_timeout", retryable=True, retry_after=wait)
        case _ if status >= 500 or status == 409:
            return Failure("The model's service failed.", retryable=True, retry_after=wait)
        case _:
            return Failure("The model's service refused the request.", rejected=True)


TOO_LONG = "The thread is longer than the model can read."
_TOO_LONG_WORDS = ("too long", "too large", "context", "too many tokens", "maximum number of tokens")


def _seconds(text: str | None) -> float | None:
    """A Retry-After in seconds; None for its other form, a date, and for invalid values."""
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
