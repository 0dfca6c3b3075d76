"""What an agent yields: the parts of its answer, and the error with which it ends a run."""

from __future__ import annotations

import msgspec

from agent_chat.stores.models import JSONObject


class Text(msgspec.Struct, frozen=True):
    """More of the answer, in Markdown. The server inserts a blank line between the text before and after a call."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """More of the model's reasoning, published and, unless the operator refuses that, stored with its place.

    At most 256 KB of an answer's reasoning are stored; then it ends with a note, and the rest is not published either.
    Stored reasoning is for readers of the thread: it must not be sent to the model again as if it were its own.
    """

    text: str


class ToolStarted(msgspec.Struct, frozen=True):
    """A tool is about to be called.

    Yield it before the call is made: the generator is not resumed until the store has the first call that is not
    repeatable. A run that fails after such a call is never retryable, and its Idempotency-Key stays used.

    Attributes:
        id: names the call; unique within the run. With "" the server makes an id, and the parts of this call have ""
            too: they belong to the latest call without an id.
        round: the model's turn that requested the call, from 0.
        repeatable: whether making the call again is harmless: the tool only reads, is idempotent, or is not called.
    """

    id: str
    tool_name: str
    arguments: JSONObject
    round: int = 0
    repeatable: bool = False


class ToolProgress(msgspec.Struct, frozen=True):
    """`progress` of `total` (None: unknown), with the tool's own message, if it sent one."""

    id: str
    progress: float
    total: float | None = None
    message: str | None = None


class ToolCompleted(msgspec.Struct, frozen=True):
    """The call has ended, with a JSON object as its result or a sentence as its error. Exactly one of them is set."""

    id: str
    result: JSONObject | None = None
    error: str | None = None


class File(msgspec.Struct, frozen=True):
    """A file that belongs to the answer: stored as an attachment of its message, and published in a snapshot of it.

    At most 10 for each answer, 25 MB each. They count toward the organization's stored bytes; where there is no room
    the run fails.

    Attributes:
        name: the file name; only its last path component is used.
        content_type: a hint, such as "text/csv"; the stored type is decided by the content first.
    """

    name: str
    content_type: str
    data: bytes


class Ended(msgspec.Struct, frozen=True):
    """What is known about the answer: fields of `message.metadata.run`. Optional; of several the last value counts."""

    stop_reason: str | None = None
    model: str | None = None
    usage: JSONObject | None = None


ToolPart = ToolStarted | ToolProgress | ToolCompleted
InlinePart = Text | Reasoning | ToolPart | Ended
Part = InlinePart | File


class AgentError(Exception):
    """The run fails with this sentence. The text and the tool calls so far are stored.

    Args:
        detail: one sentence for the client. It must not contain secrets or another user's data.
        code: `agent_failed`, `agent_overloaded` or `agent_timeout`.
        retryable: whether the same message may succeed later. The run is retryable only if, in addition, all of its
            tool calls are repeatable.
        retry_after: seconds, where the model's service named a time.
    """

    def __init__(
        self, detail: str, *, code: str = "agent_failed", retryable: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code
        self.retryable = retryable
        self.retry_after = retry_after
