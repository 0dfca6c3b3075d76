"""The format of `agent-chat import` and `agent-chat export`: a line for a thread, then a line for each of its messages.

One line per thread, with its messages inside, was refused: a thread of 100,000 messages would be one JSON value of
hundreds of megabytes, held in memory several times, and an error could not name the message. A line per message bounds
the memory by the largest message, and a script can filter or convert the lines one by one.

The members are those of the API's bodies, checked by the same rules. The differences: users and agents are names or
ids, times may have any offset and precision, and what only a server writes (`metadata.run`, long answers) is accepted.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from agent_chat.server.errors import ChatError, InvalidRequest, TooLarge
from agent_chat.server.http.bodies import CONTENT_BYTES, METADATA_BYTES, check_body, check_values
from agent_chat.server.http.schemas import Run
from agent_chat.server.inputs import FILES, ExternalId, Title
from agent_chat.stores.models import (
    NESTING,
    SERVER_FACTS,
    Attachment,
    JSONObject,
    Message,
    Role,
    Thread,
    ToolCall,
    depth,
    is_id,
    timestamp,
    utcnow,
)

LINE_BYTES = 16 * 2**20
"""The length of a line. A stored message is shorter: 8 MB, and its HTML 4 MB."""

Reference = Annotated[str, Meta(min_length=1, max_length=255)]
"""A name or an id."""
Moment = Annotated[datetime, Meta(tz=True)]

_DEEPEST = NESTING + 3
"""The arguments of a tool call are inside the line, its tool calls and the call."""
_FIRST_MOMENT = datetime.fromisoformat("1970-01-01T00:00:00Z")
_CLOCK_TOLERANCE = timedelta(days=1)

T = TypeVar("T")


class BadLine(ValueError):
    """A line of the file is invalid, or names something that does not exist."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"line {number}: {reason}")


class ThreadLine(Struct, tag_field="type", tag="thread", forbid_unknown_fields=True, frozen=True):
    """A thread. Its messages are in the lines up to the next thread.

    Attributes:
        user: a user's name or id; a new name creates a user. None: the option `--user`.
        agent: an agent's name or id. None: the option `--agent`.
        updated_at: None: the time of the latest message.
    """

    id: Reference
    created_at: Moment
    user: Reference | None = None
    agent: Reference | None = None
    title: Title = ""
    metadata: JSONObject = {}
    updated_at: Moment | None = None
    archived: bool = False


class ThreadFacts(Struct, forbid_unknown_fields=True, frozen=True):
    """`metadata.thread` of a thread."""

    external_id: ExternalId


class ToolCallLine(Struct, forbid_unknown_fields=True, frozen=True):
    """A tool call within a message. A time that is None is the message's."""

    tool_name: str
    arguments: JSONObject = {}
    result: JSONObject | None = None
    error: str | None = None
    start_time: Moment | None = None
    end_time: Moment | None = None


class MessageLine(Struct, tag_field="type", tag="message", forbid_unknown_fields=True, frozen=True):
    """A message of the thread above. `content_html`: None: rendered from `content`."""

    id: Reference
    role: Role
    content: str
    created_at: Moment
    thread_id: Reference | None = None
    content_html: str | None = None
    tool_calls: list[ToolCallLine] = []
    attachments: list[Attachment] = []
    metadata: JSONObject = {}


Line = ThreadLine | MessageLine
_DECODER = msgspec.json.Decoder(Line)


def decode_line(number: int, data: bytes) -> Line:
    """Decode and check a line. Raises: BadLine."""
    if len(data) > LINE_BYTES:
        raise BadLine(number, f"The line is longer than {LINE_BYTES} bytes.")
    try:
        line: Line = _DECODER.decode(data)
        # brackets are counted first: hardly any line has so many
        if data.count(b"{") + data.count(b"[") > _DEEPEST and depth(msgspec.json.decode(data)) > _DEEPEST:
            raise InvalidRequest("line", f"The JSON is nested deeper than {_DEEPEST} levels.")
        if isinstance(line, ThreadLine):
            _check_thread(line)
        else:
            _check_message(line)
        return line
    except ChatError as error:
        raise BadLine(number, str(error)) from error
    except msgspec.ValidationError as error:
        raise BadLine(number, str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadLine(number, f"This is not JSON in UTF-8: {error}") from error
    except RecursionError as error:
        raise BadLine(number, f"The JSON is nested deeper than {_DEEPEST} levels.") from error


def _check_thread(line: ThreadLine) -> None:
    check_body(line)
    if SERVER_FACTS in line.metadata:
        _convert(line.metadata[SERVER_FACTS], ThreadFacts, f"metadata.{SERVER_FACTS}")
    _check_moment(line.created_at, "created_at")
    if line.updated_at is not None:
        _check_moment(line.updated_at, "updated_at")


def _check_message(line: MessageLine) -> None:
    """Check a message. What agents and tools generate may contain NUL characters, and more text than a client's."""
    metadata = {name: value for name, value in line.metadata.items() if name != "run"}
    if "branch" in metadata:
        raise InvalidRequest("metadata.branch", "The metadata key `branch` is reserved for the server.")
    if metadata:
        check_values(metadata, "metadata")
        if len(msgspec.json.encode(metadata)) > METADATA_BYTES:
            raise TooLarge("metadata", METADATA_BYTES)
    check_values(line.id, "id")
    if line.role != "assistant":
        if not (line.content or line.attachments):
            raise InvalidRequest("content", "The content may be empty only with an attachment.")
        if len(line.content.encode()) > CONTENT_BYTES:
            raise TooLarge("content", CONTENT_BYTES)
    if len(line.attachments) > FILES:
        raise InvalidRequest("attachments", f"A message may have at most {FILES} attachments.")
    if not all(is_id(attachment.id) for attachment in line.attachments):
        raise InvalidRequest("attachments", "The id of an attachment must be a UUID in lower case.")
    _check_moment(line.created_at, "created_at")
    for index, call in enumerate(line.tool_calls):
        _check_call(call, f"tool_calls[{index}]")
    if "run" in line.metadata:
        _check_run(line)


def _check_call(call: ToolCallLine, path: str) -> None:
    if (call.result is None) == (call.error is None):
        raise InvalidRequest(path, f"{path} must have either a result or an error.")
    for moment in (call.start_time, call.end_time):
        if moment is not None:
            _check_moment(moment, path)


def _check_run(line: MessageLine) -> None:
    run = _convert(line.metadata["run"], Run, "metadata.run")
    if run.status == "in_progress":
        raise InvalidRequest("metadata.run.status", "A message in progress cannot be imported.")
    if len(run.tool_calls) != len(line.tool_calls):
        raise InvalidRequest("metadata.run.tool_calls", "metadata.run.tool_calls must match tool_calls.")


def _check_moment(moment: datetime, field: str) -> None:
    """Refuse times that would make those of later messages wrong, which are moved past it."""
    if not _FIRST_MOMENT <= moment <= utcnow() + _CLOCK_TOLERANCE:
        raise InvalidRequest(field, f"{field} must be between 1970 and now.")


def _convert(value: object, type: type[T], path: str) -> T:
    try:
        return msgspec.convert(value, type)
    except msgspec.ValidationError as error:
        raise InvalidRequest(path, f"{path}: {error}") from error


def build_message(line: MessageLine, content_html: str) -> Message:
    """Build the message as it is stored, but for its ids, which are still those of the file."""
    created_at = timestamp(line.created_at)
    return Message(
        id=line.id,
        thread_id="",
        content=line.content,
        content_html=content_html,
        role=line.role,
        tool_calls=[_build_call(call, created_at) for call in line.tool_calls],
        attachments=line.attachments,
        metadata=line.metadata,
        created_at=created_at,
    )


def _build_call(call: ToolCallLine, created_at: str) -> ToolCall:
    start = timestamp(call.start_time) if call.start_time else created_at
    end = timestamp(call.end_time) if call.end_time else start
    return ToolCall(call.tool_name, call.arguments, call.result, call.error, start, end)


class _ThreadOut(Struct, tag_field="type", tag="thread", frozen=True):
    """A thread as it is exported: a ThreadLine with its times as text."""

    id: str
    user: str
    agent: str
    title: str
    metadata: JSONObject
    created_at: str
    updated_at: str
    archived: bool


class _MessageOut(Struct, tag_field="type", tag="message", frozen=True):
    """A message as it is exported: a MessageLine with its times as text."""

    id: str
    thread_id: str
    role: Role
    content: str
    content_html: str
    tool_calls: list[ToolCall]
    attachments: list[Attachment]
    metadata: JSONObject
    created_at: str


def encode_thread(thread: Thread, *, user: str, agent: str) -> bytes:
    """Encode the line of a thread."""
    fields = (thread.title, thread.metadata, thread.created_at, thread.updated_at, thread.archived)
    return msgspec.json.encode(_ThreadOut(thread.id, user, agent, *fields)) + b"\n"


def encode_message(message: Message) -> bytes:
    """Encode the line of a message."""
    fields = {name: getattr(message, name) for name in _MessageOut.__struct_fields__}
    return msgspec.json.encode(_MessageOut(**fields)) + b"\n"
