"""What the service is called with: the request types of the API, whichever protocol brought them.

msgspec validates types and lengths while it decodes; `http.bodies` checks the rest before the service is called.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from agent_chat.stores.models import Id, Idempotency, JSONObject, Role

FILE_BYTES = 25 * 2**20
"""How large one file may be."""
FILES = 10
"""How many attachments a message may have, and how many files a form may have."""

IfBusy = Literal["reject", "interrupt"]
"""What to do with a user's message while another run has the thread: refuse it, or cancel that run first."""

ExternalId = Annotated[str, Meta(min_length=1, max_length=255)]
Title = Annotated[str, Meta(max_length=500)]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
ServerNames = Annotated[list[Annotated[str, Meta(max_length=200)]], Meta(max_length=100)]
ToolNames = Annotated[list[Annotated[str, Meta(max_length=200)]], Meta(max_length=1000)]


class ThreadCreate(Struct, forbid_unknown_fields=True, frozen=True):
    """A new thread, as a client sends it. `external_id`: the client's own id of it, unique per user and agent."""

    agent_id: str | UnsetType = UNSET
    external_id: ExternalId | UnsetType = UNSET
    title: Title | UnsetType = UNSET
    metadata: JSONObject | UnsetType = UNSET


class ThreadUpdate(Struct, forbid_unknown_fields=True, frozen=True):
    """Changes to a thread, as a client sends them."""

    title: Title | UnsetType = UNSET
    archived: bool | UnsetType = UNSET


class AttachmentRef(Struct, forbid_unknown_fields=True, frozen=True):
    """An attachment of the same thread."""

    id: Id


class MessageCreate(Struct, forbid_unknown_fields=True, frozen=True):
    """A new message, as a client sends it."""

    content: str
    content_html: str | UnsetType = UNSET
    role: Role = "user"
    metadata: JSONObject | UnsetType = UNSET
    attachments: Annotated[list[AttachmentRef], Meta(max_length=100)] = []


class AgentCreate(Struct, forbid_unknown_fields=True, frozen=True):
    """mcp_servers: names from the operator's file. tools: allowed names, null for all of its servers'."""

    name: Name
    kind: str | UnsetType = UNSET
    model: Name | None = None
    instructions: Annotated[str, Meta(max_length=200_000)] = ""
    mcp_servers: ServerNames = []
    tools: ToolNames | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    is_default: bool = False
    metadata: JSONObject | UnsetType = UNSET


class AgentUpdate(Struct, forbid_unknown_fields=True, frozen=True):
    """Changes to an agent, as a client sends them."""

    name: Name | UnsetType = UNSET
    kind: str | UnsetType = UNSET
    model: Name | UnsetType | None = UNSET
    instructions: Annotated[str, Meta(max_length=200_000)] | UnsetType = UNSET
    mcp_servers: ServerNames | UnsetType = UNSET
    tools: ToolNames | UnsetType | None = UNSET
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | UnsetType | None = UNSET
    is_default: bool | UnsetType = UNSET
    metadata: JSONObject | UnsetType = UNSET


class Upload(msgspec.Struct):
    """An uploaded file: it is on disk until the request ends."""

    filename: str
    content_type: str | None
    path: Path
    size: int = 0
    sha256: str = ""


def make_idempotency(key: str | None, body: Struct, files: Sequence[Upload] = ()) -> Idempotency | None:
    """The key, with a fingerprint of what must be equal in a retry: the body, and the files' names and contents.

    Equal bodies have equal fingerprints, however their JSON was written.
    """
    if key is None:
        return None
    contents = [f"{file.filename}\n{file.sha256}" for file in files]
    return Idempotency(key, hashlib.sha256(msgspec.json.encode([body, contents], order="sorted")).hexdigest())


def clean_name(filename: str) -> str:
    """The last component of a client's file name, without control characters, at most 255 characters."""
    last = re.split(r"[/\\]", filename)[-1]
    kept = "".join(character for character in last if character.isprintable()).strip()[-255:]
    return "file" if kept in ("", ".", "..") else kept
