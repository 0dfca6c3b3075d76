"""The bodies that clients send, and how they are read: the types that validate are the types of the API.

Every refusal names the field. msgspec does the types; what it can't say (bytes, nesting, NUL, the server's own
metadata key) is checked here.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from server.errors import InvalidRequest, MalformedBody, TooLarge
from stores.models import JSONObject, Role

BODY_BYTES = 2 * 2**20
CONTENT_BYTES = 2**20
METADATA_BYTES = 16 * 2**10
NESTING = 64

Title = Annotated[str, Meta(max_length=500)]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
B = TypeVar("B", bound=Struct)


class ThreadCreate(Struct, forbid_unknown_fields=True, frozen=True):
    agent_id: str | UnsetType = UNSET
    title: Title | UnsetType = UNSET
    metadata: JSONObject | UnsetType = UNSET


class ThreadUpdate(Struct, forbid_unknown_fields=True, frozen=True):
    title: Title | UnsetType = UNSET
    archived: bool | UnsetType = UNSET


class AttachmentRef(Struct, forbid_unknown_fields=True, frozen=True):
    id: str


class MessageCreate(Struct, forbid_unknown_fields=True, frozen=True):
    content: str
    content_html: str | UnsetType = UNSET
    role: Role = "user"
    metadata: JSONObject | UnsetType = UNSET
    attachments: list[AttachmentRef] = []


class AgentCreate(Struct, forbid_unknown_fields=True, frozen=True):
    """mcp_servers: names from the operator's file. tools: allowed names, null for all of its servers'."""

    name: Name
    kind: str | UnsetType = UNSET
    model: Name | None = None
    instructions: Annotated[str, Meta(max_length=200_000)] = ""
    mcp_servers: list[str] = []
    tools: list[str] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    is_default: bool = False
    metadata: JSONObject | UnsetType = UNSET


class AgentUpdate(Struct, forbid_unknown_fields=True, frozen=True):
    name: Name | UnsetType = UNSET
    kind: str | UnsetType = UNSET
    model: Name | UnsetType | None = UNSET
    instructions: Annotated[str, Meta(max_length=200_000)] | UnsetType = UNSET
    mcp_servers: list[str] | UnsetType = UNSET
    tools: list[str] | UnsetType | None = UNSET
    max_tokens: Annotated[int, Meta(ge=1, le=1000000)] | UnsetType | None = UNSET
    is_default: bool | UnsetType = UNSET
    metadata: JSONObject | UnsetType = UNSET


def read(data: bytes, type: type[B], *, files: bool = False) -> B:
    """Decode and check a JSON body; `files`: some came with it.

    Raises:
        MalformedBody: it isn't JSON in UTF-8.
        InvalidRequest: a field is unknown, missing, of the wrong type, nested too deep or holds a NUL.
        TooLarge: the content or the metadata is.
    """
    try:
        body = msgspec.json.decode(data, type=type)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedBody(f"The body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("body", f"The body is nested deeper than {NESTING} levels.") from error
    return checked(body, files=files)


def checked(body: B, path: str = "", *, files: bool = False) -> B:
    """The checks that types can't express; `path` goes before the fields' names. `files`: some came with the body.

    Raises: InvalidRequest, TooLarge.
    """
    for name in body.__struct_fields__:
        value = getattr(body, name)
        if value is not UNSET:
            _walk(value, path + name)
    for name in ("content", "content_html"):
        text = getattr(body, name, UNSET)
        if isinstance(text, str) and len(text.encode()) > CONTENT_BYTES:
            raise TooLarge(path + name, CONTENT_BYTES)
    metadata = getattr(body, "metadata", UNSET)
    if isinstance(metadata, dict):
        if len(msgspec.json.encode(metadata)) > METADATA_BYTES:
            raise TooLarge(f"{path}metadata", METADATA_BYTES)
        if isinstance(body, MessageCreate) and "run" in metadata:
            raise InvalidRequest(f"{path}metadata.run", "The metadata key `run` is the server's.")
    if isinstance(body, MessageCreate) and not (body.content or body.attachments or files):
        raise InvalidRequest(f"{path}content", "The content may be empty only with an attachment.")
    return body


def message_of(fields: dict[str, str], *, files: bool) -> MessageCreate:
    """A message that came as form fields: `metadata` and `attachments` are JSON. Raises: as `read`."""
    members = [] if "content" in fields or not files else [b'"content":""']
    for name, text in fields.items():
        value = _json_of(name, text) if name in ("metadata", "attachments") else msgspec.json.encode(text)
        members.append(msgspec.json.encode(name) + b":" + value)
    return read(b"{" + b",".join(members) + b"}", MessageCreate, files=files)


def _json_of(name: str, text: str) -> bytes:
    """A form field that must be one JSON value: what is broken in it is told of this field, and gets into no other."""
    try:
        msgspec.json.decode(text)
    except RecursionError as error:
        raise InvalidRequest(name, f"{name} is nested deeper than {NESTING} levels.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(name, f"{name} must be JSON: {error}") from error
    return text.encode()


def fingerprint(body: Struct, *more: str) -> str:
    """The same for equal bodies, however they were spelled."""
    return hashlib.sha256(msgspec.json.encode([body, more], order="sorted")).hexdigest()


def _invalid(sentence: str) -> InvalidRequest:
    """msgspec's sentence, and the field in it: `… - at `$.title`` or `… field `name``."""
    sentence, _, path = sentence.partition(" - at ")
    field = path.strip("`").removeprefix("$").lstrip(".")
    if named := re.search(r"(?:unknown|required) field `(.*)`", sentence, re.DOTALL):
        field = f"{field}.{named[1]}" if field else named[1]
    return InvalidRequest(field or "body", sentence)


def _walk(value: Any, field: str) -> None:
    """Refuse NULs (BSON keys can't hold them) and deep nesting, without recursion."""
    pending = [(value, field, 1)]
    while pending:
        value, path, depth = pending.pop()
        if isinstance(value, str):
            if "\0" in value:
                raise InvalidRequest(path, "Text may not hold NUL characters.")
        elif depth > NESTING:
            raise InvalidRequest(field, f"{field} is nested deeper than {NESTING} levels.")
        elif isinstance(value, dict):
            pending += [(key, path, depth) for key in value]
            pending += [(inner, f"{path}.{key}", depth + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [(inner, f"{path}[{index}]", depth + 1) for index, inner in enumerate(value)]
        elif isinstance(value, Struct):
            pending += [(getattr(value, name), f"{path}.{name}", depth + 1) for name in value.__struct_fields__]
