"""The nouns: frozen msgspec structs, each with exactly the keys that clients see.

A struct is at once the type in Python, the JSON on the wire and the JSON in the database. Keeping three shapes
and mapping between them was refused: every mapping is a place to forget a field.

Times are RFC 3339 UTC strings in whole milliseconds (`2026-01-31T12:00:00.000Z`): fixed width, so that they
sort as text, and identical in every store.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec.structs import replace

Clock = Callable[[], datetime]
Role = Literal["user", "assistant", "system"]
KeySource = Literal["environment", "first_start", "command_line"]
Status = Literal["in_progress", "completed", "failed", "cancelled"]
JSONObject = dict[str, Any]
Id = Annotated[str, msgspec.Meta(extra_json_schema={"format": "uuid"})]
"""A UUID as `new_id` writes it. The format is for readers of the API's schemas; decoding does not check it."""
Timestamp = Annotated[str, msgspec.Meta(extra_json_schema={"format": "date-time"})]
"""A time as `timestamp` writes it. The format is for readers of the API's schemas; decoding does not check it."""

NESTING = 64
"""How deep JSON from outside may be nested: in a body, in a tool's arguments and results."""
ACTIVITY = "activity"
"""The key of `metadata["run"]` that is there only while a running message waits for something, and says for what."""
MESSAGE_BYTES = 8 * 2**20
"""What one message may take in all, its tool calls included."""

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def utcnow() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


def timestamp(moment: datetime) -> str:
    """Write an aware datetime as RFC 3339 UTC in whole milliseconds."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def new_id() -> str:
    """Return a new random UUID."""
    return str(uuid.uuid4())


def is_id(text: str) -> bool:
    """True if `text` is a UUID as this server writes them: lower case, with hyphens."""
    return _UUID.fullmatch(text) is not None


class Principal(msgspec.Struct, frozen=True):
    """Who is asking. The first argument of every store call, so that no query can forget the organization.

    `scopes`: what they may do there. Keys leave it empty and may do everything; it is for JWTs, which come later.
    """

    organization_id: str
    user_id: str
    scopes: tuple[str, ...] = ()


class Organization(msgspec.Struct, frozen=True):
    """A tenant: it has users, keys, agents and threads."""

    id: str
    name: str
    default_agent_id: str | None
    created_at: str


class User(msgspec.Struct, frozen=True):
    """A user of an organization."""

    id: str
    organization_id: str
    name: str
    created_at: str


class Key(msgspec.Struct, frozen=True):
    """An API key as it is stored: the secret itself is shown once, only its SHA-256 is stored.

    `source`: where the key came from; None for keys of versions that did not record it.
    """

    id: str
    organization_id: str
    user_id: str
    hash: str
    hint: str
    created_at: str
    revoked_at: str | None = None
    source: KeySource | None = None


def hash_of(secret: str) -> str:
    """SHA-256 in hex. Keys are long and random, so a slow password hash would add nothing."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class Agent(msgspec.Struct, frozen=True):
    """A configured answerer. `mcp_servers` are names from the operator's file; `tools` null means all of theirs."""

    id: Id
    organization_id: Id
    name: str
    kind: str
    model: str | None
    instructions: str
    mcp_servers: list[str]
    tools: list[str] | None
    max_tokens: int | None
    is_default: bool
    metadata: JSONObject
    created_at: Timestamp
    updated_at: Timestamp


class ToolCall(msgspec.Struct, frozen=True):
    """One call of a tool. While it is open, result, error and end_time are null.

    The result of an MCP tool is its structured content; `{"content": [blocks]}` with MCP's content blocks where it has
    none; `{"structuredContent": …, "content": [blocks]}` where it has both and the blocks are more than the same as
    text. An image is a block `{"type": "image", "mimeType": "image/png", "data": base64}`. A result above 64 KB is
    `{"truncated": true, "full_bytes": …, "text": the beginning}`.
    """

    tool_name: str
    arguments: JSONObject
    result: JSONObject | None = None
    error: str | None = None
    start_time: Timestamp = ""
    end_time: Timestamp | None = None


class Attachment(msgspec.Struct, frozen=True):
    """An uploaded file, as clients see it. Its bytes are in the blob store, its text in a StoredFile.

    `status`: `ready` (its text, or the picture itself, is what agents get), `unsupported` or `failed` (stored all the
    same; `error` says why). `text_chars`: how much text was extracted; `truncated`: that was not all.
    """

    id: Id
    filename: str
    content_type: str
    size: int
    sha256: str
    status: Literal["ready", "failed", "unsupported"]
    text_chars: int
    truncated: bool
    error: str | None
    created_at: Timestamp

    @property
    def is_image(self) -> bool:
        """Whether it is an image that models can be sent."""
        return self.content_type.startswith("image/") and self.status == "ready"


class StoredFile(msgspec.Struct, frozen=True):
    """An attachment with its thread and its extracted text. `small`: a picture that has a smaller copy, for models."""

    attachment: Attachment
    thread_id: str
    text: str
    small: bool = False


class Message(msgspec.Struct, frozen=True):
    """One message of a thread. What the server knows about the run that made it is in `metadata["run"]`."""

    id: Id
    thread_id: Id
    content: str
    content_html: str
    role: Role
    tool_calls: list[ToolCall]
    attachments: list[Attachment]
    metadata: JSONObject
    created_at: Timestamp

    @property
    def run(self) -> JSONObject | None:
        """status, in_reply_to, model, usage, stop_reason, error and tool_calls of the run; null if none made it.

        While it waits for tool servers it has `activity` too: `connecting_to_tools`.
        """
        return self.metadata.get("run")

    @property
    def status(self) -> Status | None:
        """The run's status; null for a message that no run made."""
        return self.run["status"] if self.run else None

    @property
    def in_progress(self) -> bool:
        """Whether a run is still generating the message."""
        return self.status == "in_progress"

    def with_run(self, **changes: object) -> Message:
        """The same message with these keys of `metadata["run"]` set."""
        return replace(self, metadata={**self.metadata, "run": {**(self.run or {}), **changes}})


def new_answer(thread_id: str, in_reply_to: str, model: str | None, created_at: str) -> Message:
    """The empty assistant message that a run begins with; the run's id is this message's id."""
    run: JSONObject = {
        "status": "in_progress",
        "in_reply_to": in_reply_to,
        "model": model,
        "usage": None,
        "stop_reason": None,
        "error": None,
        "tool_calls": [],
    }
    return Message(new_id(), thread_id, "", "", "assistant", [], [], {"run": run}, created_at)


class Thread(msgspec.Struct, frozen=True):
    """One line of messages with one agent. `messages` holds the latest ones, oldest first."""

    id: Id
    agent_id: Id
    user_id: Id
    organization_id: Id
    title: str
    metadata: JSONObject
    created_at: Timestamp
    updated_at: Timestamp
    archived: bool
    messages: list[Message] = []


class Idempotency(msgspec.Struct, frozen=True):
    """A client's Idempotency-Key and the fingerprint of the parsed body that came with it."""

    key: str
    fingerprint: str


class RunRecord(msgspec.Struct, frozen=True):
    """The small record of a run in progress, kept beside its thread until its terminal event is in the log."""

    id: str
    thread_id: str
    organization_id: str
    user_id: str
    worker: str
    partial: Message
    cancelled: bool = False

    @property
    def who(self) -> Principal:
        """The user and organization that the run belongs to."""
        return Principal(self.organization_id, self.user_id)


def depth(value: object) -> int:
    """How deep JSON is nested: a number or a text is 0 deep, a list of them 1. Without recursion."""
    deepest, pending = 0, [(value, 0)]
    while pending:
        inner, level = pending.pop()
        deepest = max(deepest, level)
        if isinstance(inner, dict):
            pending += [(each, level + 1) for each in inner.values()]
        elif isinstance(inner, list):
            pending += [(each, level + 1) for each in inner]
    return deepest
