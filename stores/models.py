"""The data types: frozen msgspec structs, each with exactly the keys that clients see.

A struct is at the same time the type in Python, the JSON on the wire and the JSON in the database. Three types with
mappings between them were refused: every mapping can miss a field.

Times are RFC 3339 UTC strings in whole milliseconds (`2026-01-31T12:00:00.000Z`): of fixed width, so that they sort as
text, and identical in every store.
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
"""How deep JSON from clients and tools may be nested: bodies, and arguments and results of tools."""
ACTIVITY = "activity"
"""The key of `metadata["run"]` that exists only while a run waits for something, and names it."""
SERVER_FACTS = "thread"
"""The key of a thread's metadata that is the server's: `{"external_id": …}`, present only if the thread has one."""
MESSAGE_BYTES = 8 * 2**20
"""The largest size of one message, including its tool calls and its reasoning."""
REASONING_BYTES = 256 * 2**10
"""How much reasoning of one message is stored, in bytes of UTF-8."""

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def utcnow() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


def timestamp(moment: datetime) -> str:
    """Format an aware datetime as RFC 3339 UTC in whole milliseconds."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def new_id() -> str:
    """Return a new random UUID."""
    return str(uuid.uuid4())


def is_id(text: str) -> bool:
    """Return True if `text` is a UUID as this server writes them: lower case, with hyphens."""
    return _UUID.fullmatch(text) is not None


class Principal(msgspec.Struct, frozen=True):
    """The user on whose behalf a call is made: the first argument of every store call, so that no query omits it (I1).

    `scopes`: what the user may do. It is empty for API keys, which may do everything.
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
    """An API key as it is stored: only the SHA-256 of the secret, which is shown once (I11).

    `source`: where the key was created; None for keys of versions that did not record it.
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
    """Return the SHA-256 in hex. Keys are long and random, so that a slow password hash would add nothing."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class Agent(msgspec.Struct, frozen=True):
    """A configured answerer. `mcp_servers` are names from the operator's file; without `tools` it has all theirs."""

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
    """One call of a tool. While it is open, it has no result, error and end_time.

    The result of an MCP tool is its structured content; without structured content it is `{"content": [blocks]}`, with
    MCP's content blocks; `{"structuredContent": …, "content": [blocks]}` if the blocks contain more than the structured
    content as text. An image is a block `{"type": "image", "mimeType": "image/png", "data": base64}`. A result above
    64 KB is `{"truncated": true, "full_bytes": …, "text": the beginning}`.
    """

    tool_name: str
    arguments: JSONObject
    result: JSONObject | None = None
    error: str | None = None
    start_time: Timestamp = ""
    end_time: Timestamp | None = None


class Attachment(msgspec.Struct, frozen=True):
    """An uploaded file, as clients see it. Its bytes are in the blob store, its text in a StoredFile.

    `status`: `ready` (agents get its text, or the image), `unsupported` or `failed` (it is stored, and `error` gives
    the reason). `text_chars`: the length of the extracted text; `truncated`: the file contains more text.
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
    """An attachment with its thread and its extracted text. `small`: the image has a smaller copy, for models."""

    attachment: Attachment
    thread_id: str
    text: str
    small: bool = False


class Message(msgspec.Struct, frozen=True):
    """One message of a thread. What the server knows of the run that generated it is in `metadata["run"]`."""

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
        """status, in_reply_to, model, usage, stop_reason, error and tool_calls of the run; None if no run generated it.

        Where reasoning is stored, also `reasoning`. While the run waits for tool servers, also `activity`:
        `connecting_to_tools`.
        """
        return self.metadata.get("run")

    @property
    def reasoning(self) -> list[JSONObject] | None:
        """The blocks of reasoning of the run, in order; None if its reasoning is not stored.

        Each is `{"index", "after", "calls", "text"}`: it stands after so many characters of the content and after so
        many tool calls. No two blocks stand in one place.
        """
        return (self.run or {}).get("reasoning")

    @property
    def status(self) -> Status | None:
        """The run's status; None for a message that no run generated."""
        return self.run["status"] if self.run else None

    @property
    def in_progress(self) -> bool:
        """Whether a run is still generating the message."""
        return self.status == "in_progress"

    def with_run(self, **changes: object) -> Message:
        """Return the same message with these keys of `metadata["run"]` set."""
        return replace(self, metadata={**self.metadata, "run": {**(self.run or {}), **changes}})


def new_answer(
    thread_id: str, in_reply_to: str, model: str | None, created_at: str, *, store_reasoning: bool = True
) -> Message:
    """Build the empty assistant message that a run begins with; the run's id is this message's id.

    Whether its reasoning is stored is decided here for every process that reads the run's events.
    """
    run: JSONObject = {
        "status": "in_progress",
        "in_reply_to": in_reply_to,
        "model": model,
        "usage": None,
        "stop_reason": None,
        "error": None,
        "tool_calls": [],
    }
    if store_reasoning:
        run["reasoning"] = []
    return Message(new_id(), thread_id, "", "", "assistant", [], [], {"run": run}, created_at)


class Thread(msgspec.Struct, frozen=True):
    """A thread of messages with one agent. `messages` contains the latest ones, oldest first."""

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

    @property
    def external_id(self) -> str | None:
        """The client's own id of the thread, from `metadata["thread"]`; None if it has none."""
        facts = self.metadata.get(SERVER_FACTS)
        return facts.get("external_id") if isinstance(facts, dict) else None

    def with_external_id(self, external_id: str) -> Thread:
        """Return the same thread with this external id."""
        return replace(self, metadata={**self.metadata, SERVER_FACTS: {"external_id": external_id}})

    def client_metadata(self) -> JSONObject:
        """The metadata without what the server adds to it: what stores keep as the thread's metadata."""
        if self.external_id is None:
            return self.metadata
        return {name: value for name, value in self.metadata.items() if name != SERVER_FACTS}


class Idempotency(msgspec.Struct, frozen=True):
    """A client's Idempotency-Key and the fingerprint of the parsed body that came with it."""

    key: str
    fingerprint: str


class RunRecord(msgspec.Struct, frozen=True):
    """The record of a run in progress, stored beside its thread until its terminal event is in the log (I3)."""

    id: str
    thread_id: str
    organization_id: str
    user_id: str
    worker: str
    partial: Message
    cancelled: bool = False

    @property
    def principal(self) -> Principal:
        """The user and organization that the run belongs to."""
        return Principal(self.organization_id, self.user_id)


def depth(value: object) -> int:
    """Return how deep JSON is nested: 0 for a number or a string, 1 for a list of them. Uses no recursion."""
    deepest, pending = 0, [(value, 0)]
    while pending:
        inner, level = pending.pop()
        deepest = max(deepest, level)
        if isinstance(inner, dict):
            pending += [(each, level + 1) for each in inner.values()]
        elif isinstance(inner, list):
            pending += [(each, level + 1) for each in inner]
    return deepest
