"""What a log line holds, in both formats, and what it never does."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from agent_chat.agents import registry
from agent_chat.server import facts
from agent_chat.server.log_lines import OURS, REQUEST_ID, RUN_ID, LineFormatter
from agent_chat.stores.errors import StoreUnavailable

WORDS, KEY = "what the user wrote", "chat_a-secret-key"


def record(message: str, *arguments: object, **facts: object) -> logging.LogRecord:
    record = logging.LogRecord("agent_chat.server.runs.runner", logging.WARNING, "", 0, message, arguments, None)
    vars(record).update(facts)
    return record


def failure(error: Exception) -> logging.LogRecord:
    try:
        raise error
    except Exception:
        return logging.LogRecord("server", logging.ERROR, "", 0, "it failed", (), sys.exc_info())


@pytest.fixture(autouse=True)
def ids() -> None:
    REQUEST_ID.set("request-1")
    RUN_ID.set("run-1")


def test_a_json_line_has_time_level_logger_message_ids_and_facts() -> None:
    line = json.loads(LineFormatter("json").format(record("it took %d s", 3, status=200, organization_id=None)))
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "agent_chat.server.runs.runner",
        "message": "it took 3 s",
        "request_id": "request-1",
        "run_id": "run-1",
        "status": 200,
    }


def test_a_lone_surrogate_is_escaped() -> None:
    line = json.loads(LineFormatter("json").format(record("no tool %s", "x\ud800", path="\udfff")))
    assert (line["message"], line["path"]) == ("no tool x\ud800", "\udfff")


def test_a_text_line_is_one_line_whatever_a_client_sent() -> None:
    text = LineFormatter("text").format(record("of %s", "a\r\n2026 INFO forged\x1b[0m\u2028", path="/x\ny"))
    assert text.splitlines() == [text]
    assert text.endswith("request_id=request-1 run_id=run-1 path=/x\\x0ay")
    assert " WARNING agent_chat.server.runs.runner of a\\x0d\\x0a2026 INFO forged\\x1b[0m" in text


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_traceback_shows_where_and_what_but_no_text_of_strangers(format: str) -> None:
    try:
        try:
            raise KeyError(KEY)
        except KeyError:
            raise ValueError(WORDS) from None
    except ValueError as error:
        inner = error
    group = ExceptionGroup(WORDS, [inner, StoreUnavailable("the disk is full")])
    formatter = LineFormatter("json" if format == "json" else "text")
    text = formatter.format(failure(group))
    assert WORDS not in text
    assert KEY not in text
    assert "ValueError" in text
    assert "the disk is full" in text, "our own sentences are shown"
    assert "test_log_lines.py" in text


def test_debug_shows_the_text_of_exceptions() -> None:
    assert "why" in LineFormatter("text", whole=True).format(failure(ValueError("why")))


def test_the_log_level_applies_to_every_logger_of_the_package() -> None:
    assert {logger.split(".")[0] for logger in ("chat.security", facts.logger.name, registry.logger.name)} <= set(OURS)
