"""Reads the bodies that clients send: JSON and form fields become the types of `server.inputs`.

Every error names the field. msgspec checks the types. What types cannot express (sizes in bytes, nesting, NUL
characters, the server's own metadata key) is checked here: sizes first, so that only small values are traversed.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import UNSET, Struct

from agent_chat.server.errors import InvalidRequest, MalformedBody, TooLarge
from agent_chat.server.inputs import MessageCreate, ThreadCreate
from agent_chat.stores.models import NESTING, SERVER_FACTS

BODY_BYTES = 2 * 2**20
CONTENT_BYTES = 2**20
METADATA_BYTES = 16 * 2**10
_RESERVED: dict[type[Struct], tuple[str, ...]] = {ThreadCreate: (SERVER_FACTS,), MessageCreate: ("run", "branch")}
"""The server's own metadata keys."""

B = TypeVar("B", bound=Struct)


def decode_body(data: bytes, type: type[B], *, files: bool = False) -> B:
    """Decode and check a JSON body.

    Args:
        files: whether files were sent with the body; then `content` may be empty.

    Raises:
        MalformedBody: the body is not JSON in UTF-8.
        InvalidRequest: a field is unknown, missing, of the wrong type, nested too deep or contains a NUL character.
        TooLarge: the content or the metadata exceeds its limit.
    """
    try:
        return check_body(msgspec.json.decode(data, type=type), files=files)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedBody(f"The body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("body", f"The body is nested deeper than {NESTING} levels.") from error


def check_body(body: B, path: str = "", *, files: bool = False) -> B:
    """Check what types cannot express, and return the body.

    Args:
        path: the prefix of the fields' names in errors.
        files: whether files were sent with the body; then `content` may be empty.

    Raises:
        InvalidRequest, TooLarge: as for `decode_body`.
        RecursionError: the metadata is nested deeper than msgspec can encode.
    """
    _check_sizes(body, path)
    for name in body.__struct_fields__:
        value = getattr(body, name)
        if isinstance(value, MessageCreate):
            check_body(value, f"{path}{name}.")
        elif value is not UNSET:
            check_values(value, path + name)
    for name in _RESERVED.get(type(body), ()):
        if (metadata := getattr(body, "metadata", UNSET)) is not UNSET and name in metadata:
            raise InvalidRequest(f"{path}metadata.{name}", f"The metadata key `{name}` is reserved for the server.")
    if isinstance(body, MessageCreate) and not (body.content or body.attachments or files):
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


def decode_form(fields: dict[str, str], *, files: bool) -> MessageCreate:
    """Decode a message sent as form fields; `metadata` and `attachments` are JSON text. Raises: as `decode_body`."""
    members: dict[str, Any] = {"content": ""} if files else {}
    for name, text in fields.items():
        members[name] = _raw_json(name, text) if name in ("metadata", "attachments") else text
    return decode_body(msgspec.json.encode(members), MessageCreate, files=files)


def _raw_json(field: str, text: str) -> msgspec.Raw:
    """Return the text of exactly one JSON value, undecoded. Raises: InvalidRequest."""
    try:
        return msgspec.json.decode(text, type=msgspec.Raw)
    except msgspec.DecodeError as error:
        raise InvalidRequest(field, f"The field {field} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest(field, f"{field} is nested deeper than {NESTING} levels.") from error


def _invalid(sentence: str) -> InvalidRequest:
    """Make the error from msgspec's sentence, which names the field: `… - at `$.title`` or `… field `name``."""
    sentence, _, path = sentence.partition(" - at ")
    field = path.strip("`").removeprefix("$").lstrip(".")
    if named := re.search(r"(?:unknown|required) field `(.*)`", sentence, re.DOTALL):
        field = f"{field}.{named[1]}" if field else named[1]
    return InvalidRequest(field or "body", sentence)


class _Place(NamedTuple):
    """A value's place in the body: its parent's place and one step. It becomes text only for an error."""

    parent: _Place | None
    step: str | int

    def __str__(self) -> str:
        steps: list[str] = []
        place: _Place | None = self
        while place is not None:
            steps.append(f"[{place.step}]" if isinstance(place.step, int) else f".{place.step}")
            place = place.parent
        return "".join(reversed(steps)).removeprefix(".")


def check_values(value: Any, field: str) -> None:
    """Refuse NUL characters (BSON keys cannot contain them) and deep nesting, without recursion."""
    pending: list[tuple[Any, _Place, int]] = [(value, _Place(None, field), 1)]
    while pending:
        value, place, depth = pending.pop()
        if isinstance(value, str):
            if "\0" in value:
                raise InvalidRequest(str(place), "Text may not contain NUL characters.")
        elif depth > NESTING:
            raise InvalidRequest(field, f"{field} is nested deeper than {NESTING} levels.")
        elif isinstance(value, dict):
            pending += [(key, place, depth) for key in value]
            pending += [(inner, _Place(place, key), depth + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [(inner, _Place(place, index), depth + 1) for index, inner in enumerate(value)]
        elif isinstance(value, Struct):
            pending += [(getattr(value, name), _Place(place, name), depth + 1) for name in value.__struct_fields__]
