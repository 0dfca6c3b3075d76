"""The exceptions of the chat service and of the transports above it.

Each constructor takes the facts and writes the sentence that the client reads. `http.problems` gives each one its
status and its code. Lower layers have exceptions of their own (`stores.errors`, `agents.AgentError`).
"""

from __future__ import annotations

from agent_chat.stores.models import Message

RETRY_SECONDS = 2
"""When a client may try again, where nothing better is known."""
_MAX_CLIENT_TEXT = 500
"""At most so many characters of what a client sent are repeated in an error."""


class ChatError(Exception):
    """Base class: the chat service or a transport refuses a request."""


class InvalidRequest(ChatError):
    """A value is not valid; `field` is its path in the body, or the name of the parameter or header.

    Both texts are cut, since a client can make them long: a field's name can be the whole body.
    """

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(detail[:_MAX_CLIENT_TEXT])
        self.field = field[:_MAX_CLIENT_TEXT]


class MalformedBody(ChatError):
    """The body is not in the format that its content type names."""


class TooLarge(ChatError):
    """A field, or the whole body, is larger than allowed."""

    def __init__(self, field: str, limit: int) -> None:
        super().__init__(f"{field} is larger than {limit} bytes.")
        self.field = field


class BodyStalled(ChatError):
    """The client sent no byte of its body for `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"No byte of the body arrived for {seconds:g} seconds.")


class UnsupportedMediaType(ChatError):
    """The media type of the body is not accepted here."""

    def __init__(self, got: str, wanted: str = "application/json") -> None:
        super().__init__(f"Send {wanted}, not {got!r}.")


class Unauthenticated(ChatError):
    """No valid key or session was sent."""

    def __init__(self) -> None:
        super().__init__("Send a valid key as `Authorization: Bearer <key>`.")


class AuthRateLimited(ChatError):
    """Too many wrong keys came from the client's address; `retry_after` is in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"Too many wrong keys came from your address; try again in {retry_after} s.")
        self.retry_after = retry_after


class Forbidden(ChatError):
    """A page of another origin sent the request."""

    def __init__(self) -> None:
        super().__init__("A page of another origin may not do this.")


class StorageFull(ChatError):
    """The organization stores as many bytes as it may."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"Your organization may store {limit} bytes; delete threads to free storage.")


class DiskFull(ChatError):
    """The disk has no space for an upload."""


class RangeNotSatisfiable(ChatError):
    """The attachment has no byte of the requested range."""

    def __init__(self, size: int) -> None:
        super().__init__(f"The attachment has {size} bytes.")
        self.size = size


class ThreadEmpty(ChatError):
    """A title was requested for a thread without messages."""

    def __init__(self, thread_id: str) -> None:
        super().__init__(f"Thread {thread_id} has no message to generate a title from.")


class AgentDeleted(ChatError):
    """A message was posted to a thread of a deleted agent."""

    def __init__(self, agent_id: str) -> None:
        super().__init__(f"Agent {agent_id} was deleted; its threads can be read, not posted to.")


class Gone(ChatError):
    """A path of the API that this one replaces; `path` is the new one."""

    def __init__(self, path: str) -> None:
        super().__init__(f"Conversations are threads now: use {path}.")
        self.path = path


class RateLimited(ChatError):
    """The organization exceeds a limit of this process; `retry_after` is in seconds."""

    def __init__(self, what: str, limit: int, retry_after: int) -> None:
        super().__init__(f"Your organization may have {limit} {what} here; try again in {retry_after} s.")
        self.retry_after = retry_after


class Draining(ChatError):
    """The server is stopping and starts no runs."""

    def __init__(self) -> None:
        super().__init__("This server is stopping and starts no more runs; try again.")


class RunFailedError(ChatError):
    """The run that a client waited for failed; its message holds the answer up to then."""

    def __init__(self, message: Message) -> None:
        self.message = message
        error = (message.run or {}).get("error") or {}
        self.code = str(error.get("code", "agent_failed"))
        self.retryable = bool(error.get("retryable"))
        self.retry_after = error.get("retry_after")
        super().__init__(str(error.get("detail", "The agent failed.")))


class AnswerUnknown(ChatError):
    """The database has been unreachable for so long that a waiting client gets the ids of what to read later."""

    def __init__(self, thread_id: str, message_id: str) -> None:
        super().__init__("The database does not answer; read the message later.")
        self.thread_id = thread_id
        self.message_id = message_id
