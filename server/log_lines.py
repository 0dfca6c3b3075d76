"""The format of log lines: time, level, logger, message, the ids of request, thread and run, and the facts in `extra`.

`configure` is called by the command line, never by `create_app`: a program that mounts the application configures
logging itself. Lines never contain content. A traceback shows where an exception was raised and its type; its text is
shown only for types whose text comes from the system or from this package. What an agent or a library writes into an
exception can be a message or a key; CHAT_LOG_LEVEL=debug shows it.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

import msgspec

from agent_chat.stores.errors import StoreError
from agent_chat.stores.models import Principal

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
THREAD_ID: ContextVar[str | None] = ContextVar("thread_id", default=None)
RUN_ID: ContextVar[str | None] = ContextVar("run_id", default=None)

OURS = ("agent_chat", "chat")
"""The loggers that CHAT_LOG_LEVEL sets; others log warnings."""

_IDS = {"request_id": REQUEST_ID, "thread_id": THREAD_ID, "run_id": RUN_ID}
_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"}
_HARMLESS = (OSError, ImportError, AttributeError, NameError, TypeError, StoreError)
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}
_LONGEST = 2000


def configure(format: Literal["text", "json"], level: str) -> None:
    """Log to stderr in this format: this package from `level` on, everything else from warnings on."""
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _Stderr)]:
        root.removeHandler(old)
    handler = _Stderr()
    handler.setFormatter(LineFormatter(format, whole=level == "DEBUG"))
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)


class _Stderr(logging.Handler):
    """Writes each record immediately to the present `sys.stderr`, which tests replace."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class LineFormatter(logging.Formatter):
    """Formats a record as one line; in text format a traceback follows it. `whole`: show every exception's text."""

    def __init__(self, format: Literal["text", "json"], *, whole: bool = False) -> None:
        super().__init__()
        self._json = format == "json"
        self._whole = whole

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line of JSON."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_LONGEST],
        }
        line |= {name: value for name, variable in _IDS.items() if (value := variable.get()) is not None}
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD and value is not None}
        if record.exc_info and record.exc_info[1] is not None:
            line["traceback"] = "".join(_traceback(record.exc_info[1], whole=self._whole)).rstrip("\n")
        return _json(line) if self._json else _text(line)


def _json(line: dict[str, object]) -> str:
    try:
        return msgspec.json.encode(line, enc_hook=str).decode()
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(line, default=str)


def _text(line: dict[str, object]) -> str:
    trace = line.pop("traceback", None)
    head = [str(line.pop(name)) for name in ("time", "level", "logger", "message")]
    head[1] = head[1].upper()
    words = [*head, *(f"{name}={value}" for name, value in line.items())]
    text = " ".join(word.translate(_CONTROLS) for word in words)
    return f"{text}\n{trace}" if trace else text


def _traceback(error: BaseException, *, whole: bool, seen: frozenset[int] = frozenset()) -> Iterator[str]:
    """The traceback of an exception, behind those of the exceptions that led to it."""
    if id(error) in seen:
        return
    seen |= {id(error)}
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if earlier is not None:
        yield from _traceback(earlier, whole=whole, seen=seen)
        yield "which led to:\n"
    yield from traceback.format_tb(error.__traceback__)
    text = str(error) if whole or isinstance(error, _HARMLESS) else "(text left out; CHAT_LOG_LEVEL=debug shows it)"
    yield f"{type(error).__module__}.{type(error).__qualname__}: {text[:_LONGEST].translate(_CONTROLS)}\n"
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield "of which one is:\n"
            yield from _traceback(part, whole=whole, seen=seen)


def security_facts(principal: Principal, **facts: str) -> dict[str, str]:
    """Return the `extra` of a security event: the principal that caused it, and what it concerns."""
    return {"organization_id": principal.organization_id, "user_id": principal.user_id, **facts}
