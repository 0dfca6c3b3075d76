"""Types of the API that nothing decodes: they only describe, in the OpenAPI document, what is sent and received."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from agent_chat.stores.events import RunError
from agent_chat.stores.models import Id, JSONObject, Role, Status

Binary = Annotated[str, Meta(extra_json_schema={"format": "binary"})]
"""The bytes of a file."""
JSONText = Annotated[str, Meta(extra_json_schema={"contentMediaType": "application/json"})]


class Problem(msgspec.Struct, frozen=True):
    """An RFC 9457 problem with a stable `code`. Some codes have further members."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    field: Annotated[str, Meta(description="The invalid field, parameter or header.")] | UnsetType = UNSET
    thread_id: Id | UnsetType = UNSET
    message_id: Annotated[Id, Meta(description="The message of the failed or the running run.")] | UnsetType = UNSET
    retryable: Annotated[bool, Meta(description="Whether the same request may succeed later.")] | UnsetType = UNSET
    use: Annotated[str, Meta(description="The path that replaces a removed one.")] | UnsetType = UNSET


class UploadForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A form of one or several files."""

    files: list[Binary]


class MessageForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A message's fields and files; `metadata` and `attachments` are JSON text."""

    content: str | UnsetType = UNSET
    content_html: str | UnsetType = UNSET
    role: Role | UnsetType = UNSET
    metadata: JSONText | UnsetType = UNSET
    attachments: JSONText | UnsetType = UNSET
    files: list[Binary] | UnsetType = UNSET


class RunToolCall(msgspec.Struct, frozen=True):
    """Where a tool call of the message belongs: its id, its round, and its offset in the content.

    `repeatable` is true for calls that may be made again, and absent otherwise.
    """

    id: str
    round: int
    offset: int
    repeatable: bool | UnsetType = UNSET


class RunReasoning(msgspec.Struct, frozen=True):
    """A block of the model's reasoning.

    It stands after the first `after` characters of the content, and after the first `calls` tool calls.
    """

    index: int
    after: int
    calls: int
    text: str


class Run(msgspec.Struct, frozen=True):
    """`metadata.run` of a message that a run makes.

    `usage` has the model's token counts. `reasoning` is absent where it is not stored. `activity` is present only while
    the run waits, and names for what.
    """

    status: Status
    in_reply_to: Id
    model: str | None
    usage: JSONObject | None
    stop_reason: str | None
    error: RunError | None
    tool_calls: list[RunToolCall]
    reasoning: list[RunReasoning] | UnsetType = UNSET
    activity: str | UnsetType = UNSET


class MessageMetadata(msgspec.Struct, frozen=True):
    """A client's own members; `run` is the server's, for messages that a run makes."""

    run: Run | UnsetType = UNSET


class Liveness(msgspec.Struct, frozen=True):
    """What `/healthz` returns."""

    status: str


class Readiness(msgspec.Struct, frozen=True):
    """`tools`: how many tool servers are in which state. `failing`: the background loops that keep failing."""

    ready: bool
    database: bool
    events: bool
    draining: bool
    tools: dict[str, int]
    failing: list[str] | UnsetType = UNSET
