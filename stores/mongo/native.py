"""Messages and JSON values as BSON: what people and BI tools see in the database. No driver, but its BSON.

A message is {id, role, content, content_html, tool_calls, attachments, metadata, created_at, size}, with the API's
names; `size` is the length of its JSON. A tool call is {tool_name, arguments, result, error, start_time, end_time}.
Times are BSON dates; a time that is not written as `timestamp` writes it stays text.

`metadata`, `arguments` and `result` are BSON objects. One that BSON would not return exactly is stored as JSON text in
`metadata_json`, `arguments_json` or `result_json` beside the other fields, and the plain name is absent. A client's
value is always inside one of these fields, so it cannot be confused with the marker. A marker inside the value was
refused: whatever its key, a client may send the same one, and each read would have to search for it. Text stands for:

- integers of more than 64 bits, and NUL in keys, which BSON lacks;
- nesting deeper than NESTING, since MongoDB allows 100 levels in all;
- the keys `$ref`, `$id` and `$db`, which MongoDB and its drivers take for references to other documents;
- more than VALUE_BYTES of BSON, in which an array of digits takes six times as much as in JSON.

A message of more than NATIVE_BYTES is {id, role, created_at, size, compressed}: `compressed` is its whole JSON. No
document can be larger than 16 MB.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, overload

import bson
import msgspec
from bson.errors import InvalidDocument
from bson.raw_bson import RawBSONDocument
from msgspec.structs import asdict, replace

from agent_chat.stores.models import NESTING, Attachment, JSONObject, Message, ToolCall, depth

Document = dict[str, Any]

LARGE = 2**20
"""Messages of more than this many bytes of JSON are encoded in a thread."""
VALUE_BYTES = 2**20
NATIVE_BYTES = 12 * 2**20

_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - the driver returns UTC without a time zone, which is cheaper
_FIRST_MILLIS = -62_135_596_800_000
_REFERENCE = re.compile(rb'"\$(?:ref|id|db)"')
_UNREPRESENTABLE = (InvalidDocument, OverflowError, RecursionError, TypeError)
_COMPRESSION_LEVEL = 1


class Packed(msgspec.Struct, frozen=True):
    """A message as it is stored. `at`: its time; `raw`: the BSON that the driver copies as it is."""

    id: str
    at: datetime
    raw: RawBSONDocument

    @property
    def document(self) -> Document:
        """The message as a document of its own."""
        return bson.decode(self.raw.raw)

    @property
    def bytes(self) -> int:
        """How many bytes it takes in a document."""
        return len(self.raw.raw)


# times


def to_date(timestamp: str) -> datetime:
    """Convert a timestamp to what BSON stores as a date: UTC without a time zone, in whole milliseconds."""
    moment = datetime.fromisoformat(timestamp).astimezone(UTC).replace(tzinfo=None)
    return moment - timedelta(microseconds=moment.microsecond % 1000)


def from_millis(at: int) -> datetime:
    """Convert milliseconds since 1970 to what BSON stores as a date; times before the year 1 become its beginning."""
    return _EPOCH + timedelta(milliseconds=max(at, _FIRST_MILLIS))


def to_timestamp(date: datetime) -> str:
    """Convert a date from BSON to a timestamp."""
    return f"{date.isoformat(timespec='milliseconds')}Z"


def to_seconds(date: datetime) -> float:
    """Convert a date from BSON to seconds since 1970."""
    return (date - _EPOCH).total_seconds()


def _encode_time(text: str | None) -> datetime | str | None:
    if text is not None and len(text) == 24 and text[-1] == "Z":
        with suppress(ValueError):
            date = datetime.fromisoformat(text[:-1])
            if to_timestamp(date) == text:
                return date
    return text


@overload
def _decode_time(stored: datetime | str) -> str: ...
@overload
def _decode_time(stored: datetime | str | None) -> str | None: ...
def _decode_time(stored: datetime | str | None) -> str | None:
    return to_timestamp(stored) if isinstance(stored, datetime) else stored


# values


def measure(document: Document) -> int:
    """How many bytes a document takes."""
    return len(bson.encode(document))


def encode_value(name: str, value: JSONObject) -> Document:
    """The field for a value: under its name as BSON, or as JSON text under `{name}_json`."""
    text = msgspec.json.encode(value)
    if _is_plain(text) or not (_REFERENCE.search(text) or depth(value) > NESTING):
        with suppress(*_UNREPRESENTABLE):
            field = _encode_natively(name, value)
            if measure(field) <= VALUE_BYTES:
                return field
    return {f"{name}_json": text.decode()}


def _encode_natively(name: str, value: JSONObject) -> Document:
    return {name: msgspec.to_builtins(value, str_keys=True)}  # an agent's author may use types that only become JSON


def decode_value(document: Document, name: str) -> JSONObject:
    """The value that `encode_value` made a field of."""
    text = document.get(f"{name}_json")
    value: JSONObject = document[name] if text is None else msgspec.json.decode(text)
    return value


def _is_plain(text: bytes) -> bool:
    """True if no value in this JSON is nested too deep or taken for a reference; False also if that is uncertain."""
    return text.count(b"[") + text.count(b"{") <= NESTING and not _REFERENCE.search(text)


# messages


async def pack(message: Message) -> Packed:
    """Encode a message as it is stored."""
    text = msgspec.json.encode(message)
    raw = await asyncio.to_thread(_encode, message, text) if len(text) > LARGE else _encode(message, text)
    return Packed(message.id, to_date(message.created_at), RawBSONDocument(raw))


def _encode(message: Message, text: bytes) -> bytes:
    size = len(text)
    if _is_plain(text):
        with suppress(*_UNREPRESENTABLE):
            raw = bson.encode(_build_document(message, size, _encode_natively))
            if len(raw) <= VALUE_BYTES:
                return raw
    raw = bson.encode(_build_document(message, size, encode_value))
    if len(raw) <= NATIVE_BYTES:
        return raw
    whole = {"created_at": to_date(message.created_at), "size": size}
    whole["compressed"] = zlib.compress(text, _COMPRESSION_LEVEL)
    return bson.encode({"id": message.id, "role": message.role, **whole})


def _build_document(message: Message, size: int, encode: Callable[[str, JSONObject], Document]) -> Document:
    return {
        "id": message.id,
        "role": message.role,
        "content": message.content,
        "content_html": message.content_html,
        "tool_calls": [_encode_tool_call(call, encode) for call in message.tool_calls],
        "attachments": [{**asdict(each), "created_at": _encode_time(each.created_at)} for each in message.attachments],
        **encode("metadata", message.metadata),
        "created_at": to_date(message.created_at),
        "size": size,
    }


def _encode_tool_call(call: ToolCall, encode: Callable[[str, JSONObject], Document]) -> Document:
    return {
        "tool_name": call.tool_name,
        **encode("arguments", call.arguments),
        **({"result": None} if call.result is None else encode("result", call.result)),
        "error": call.error,
        "start_time": _encode_time(call.start_time),
        "end_time": _encode_time(call.end_time),
    }


async def unpack(thread_id: str, entries: Sequence[Document]) -> list[Message]:
    """Decode the messages of these entries of a thread."""
    if any("compressed" in entry for entry in entries):
        return await asyncio.to_thread(_decode_all, thread_id, entries)
    return _decode_all(thread_id, entries)


def _decode_all(thread_id: str, entries: Sequence[Document]) -> list[Message]:
    return [decode_message(thread_id, entry) for entry in entries]


def decode_message(thread_id: str, entry: Document) -> Message:
    """Decode one message of a thread."""
    created_at = to_timestamp(entry["created_at"])
    if compressed := entry.get("compressed"):
        message = msgspec.json.decode(zlib.decompress(compressed), type=Message)
        return replace(message, created_at=created_at)
    return Message(
        id=entry["id"],
        thread_id=thread_id,
        content=entry["content"],
        content_html=entry["content_html"],
        role=entry["role"],
        tool_calls=[_decode_tool_call(call) for call in entry["tool_calls"]],
        attachments=[
            Attachment(**{**each, "created_at": _decode_time(each["created_at"])}) for each in entry["attachments"]
        ],
        metadata=decode_value(entry, "metadata"),
        created_at=created_at,
    )


def _decode_tool_call(call: Document) -> ToolCall:
    return ToolCall(
        tool_name=call["tool_name"],
        arguments=decode_value(call, "arguments"),
        result=None if "result" in call and call["result"] is None else decode_value(call, "result"),
        error=call["error"],
        start_time=_decode_time(call["start_time"]),
        end_time=_decode_time(call["end_time"]),
    )
