"""Reads the bodies that clients send: JSON and form fields become the types of `server.inputs`.

Every refusal names the field. msgspec does the types; what it can't say (bytes, nesting, NUL, the server's own
metadata key) is checked here, the sizes first: what is walked afterwards is small.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import UNSET, Struct

from agent_chat.server.errors import InvalidRequest, MalformedBody, TooLarge
from agent_chat.server.inputs import MessageCreate
from agent_chat.stores.models import NESTING

BODY_BYTES = 2 * 2**20
CONTENT_BYTES = 2**20
METADATA_BYTES = 16 * 2**10

B = TypeVar("B", bound=Struct)


def read(data: bytes, type: type[B], *, files: bool = False) -> B:
    """Decode and check a JSON body; `files`: some came with it.

    Raises:
        MalformedBody: it isn't JSON in UTF-8.
        InvalidRequest: a field is unknown, missing, of the wrong type, nested too deep or holds a NUL.
        TooLarge: the content or the metadata is.
    """
    try:
        return checked(msgspec.json.decode(data, type=type), files=files)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedBody(f"The body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("body", f"The body is nested deeper than {NESTING} levels.") from error


def checked(body: B, path: str = "", *, files: bool = False) -> B:
    """The checks that types can't express; `path` goes before the fields' names. `files`: some came with the body.

    Raises: InvalidRequest, TooLarge; RecursionError for metadata nested very deep.
    """
    _check_sizes(body, path)
    for name in body.__struct_fields__:
        value = getattr(body, name)
        if isinstance(value, MessageCreate):
            checked(value, f"{path}{name}.")
        elif value is not UNSET:
            _walk(value, path + name)
    if isinstance(body, MessageCreate):
        if body.metadata is not UNSET and "run" in body.metadata:
            raise InvalidRequest(f"{path}metadata.run", "The metadata key `run` is the server's.")
        if not (body.content or body.attachments or files):
            raise InvalidRequest(f"{path}content", "The content may be empty only with an attachment.")
    return body


def _check_sizes(body: Struct, path: str) -> None:
    for name in ("content", "content_html"):
        text = getattr(body, name, UNSET)
        if isinstance(text, str) and len(text.encode()) > CONTENT_BYTES:
            raise TooLarge(path + name, CONTENT_BYTES)
    metadata = getattr(body, "metadata", UNSET)
    if metadata is not UNSET and len(msgspec.json.encode(metadata)) > METADATA_BYTES:
        raise TooLarge(f"{path}metadata", METADATA_BYTES)


def message_of(fields: dict[str, str], *, files: bool) -> MessageCreate:
    """A message that came as form fields: `metadata` and `attachments` are JSON. Raises: as `read`."""
    members: dict[str, Any] = {"content": ""} if files else {}
    for name, text in fields.items():
        members[name] = _json_of(name, text) if name in ("metadata", "attachments") else text
    return read(msgspec.json.encode(members), MessageCreate, files=files)


def _json_of(field: str, text: str) -> msgspec.Raw:
    """One JSON value, and nothing behind it, as it stands. Raises: InvalidRequest."""
    try:
        return msgspec.json.decode(text, type=msgspec.Raw)
    except msgspec.DecodeError as error:
        raise InvalidRequest(field, f"The field {field} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest(field, f"{field} is nested deeper than {NESTING} levels.") from error


def _invalid(sentence: str) -> InvalidRequest:
    """msgspec's sentence, and the field in it: `… - at `$.title`` or `… field `name``."""
    sentence, _, path = sentence.partition(" - at ")
    field = path.strip("`").removeprefix("$").lstrip(".")
    if named := re.search(r"(?:unknown|required) field `(.*)`", sentence, re.DOTALL):
        field = f"{field}.{named[1]}" if field else named[1]
    return InvalidRequest(field or "body", sentence)


class _Place(NamedTuple):
    """Where a value stands: its parent's place and its step from there. A text only once it must be said."""

    parent: _Place | None
    step: str | int

    def __str__(self) -> str:
        steps: list[str] = []
        place: _Place | None = self
        while place is not None:
            steps.append(f"[{place.step}]" if isinstance(place.step, int) else f".{place.step}")
            place = place.parent
        return "".join(reversed(steps)).removeprefix(".")


def _walk(value: Any, field: str) -> None:
    """Refuse NULs (BSON keys can't hold them) and deep nesting, without recursion."""
    pending: list[tuple[Any, _Place, int]] = [(value, _Place(None, field), 1)]
    while pending:
        value, place, depth = pending.pop()
        if isinstance(value, str):
            if "\0" in value:
                raise InvalidRequest(str(place), "Text may not hold NUL characters.")
        elif depth > NESTING:
            raise InvalidRequest(field, f"{field} is nested deeper than {NESTING} levels.")
        elif isinstance(value, dict):
            pending += [(key, place, depth) for key in value]
            pending += [(inner, _Place(place, key), depth + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [(inner, _Place(place, index), depth + 1) for index, inner in enumerate(value)]
        elif isinstance(value, Struct):
            pending += [(getattr(value, name), _Place(place, name), depth + 1) for name in value.__struct_fields__]
