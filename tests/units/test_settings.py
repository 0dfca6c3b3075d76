"""The environment: defaults that work, and one line that names what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_chat.server.settings import BadSetting, load


def test_nothing_set_is_a_server_on_this_machine_alone() -> None:
    settings = load({})
    assert (settings.host, settings.port, settings.data_dir) == ("127.0.0.1", 8000, Path(".chat"))
    assert (settings.database_url, settings.events_url, settings.anthropic_api_key) == (None, None, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CHAT_REUSE_PORT", "yes"),
        ("CHAT_KEEP_REASONING", "no"),
        ("PORT", "http"),
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("CHAT_API_KEY", "nineteen-characters"),
        ("CHAT_METRICS_TOKEN", "short"),
        ("CHAT_HOSTS", "chat.example:443"),
        ("CHAT_ROOT_PATH", "chat"),
        ("CHAT_ROOT_PATH", "/api/chat"),
        ("CHAT_API_KEY", "with a space in it, and long"),
        ("CHAT_MCP_CONFIG", "/no/such/file.json"),
        ("CHAT_DRAIN_SECONDS", "soon"),
        ("CHAT_RUN_SECONDS", "-1"),
        ("CHAT_RUN_SECONDS", "nan"),
        ("CHAT_DATABASE_URL", "postgres://localhost"),
        ("CHAT_EVENTS_URL", "amqp://localhost"),
        ("ANTHROPIC_BASE_URL", "localhost:8080"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(name: str, value: str) -> None:
    with pytest.raises(BadSetting, match=f"^{name}: "):
        load({name: value})


def test_reasoning_is_stored_unless_that_is_switched_off() -> None:
    assert load({}).keep_reasoning
    assert not load({"CHAT_KEEP_REASONING": "0"}).keep_reasoning


def test_a_shared_database_needs_shared_events_and_the_other_way_round() -> None:
    with pytest.raises(BadSetting, match=r"^CHAT_EVENTS_URL: is needed beside CHAT_DATABASE_URL"):
        load({"CHAT_DATABASE_URL": "mongodb://127.0.0.1"})
    with pytest.raises(BadSetting, match=r"^CHAT_DATABASE_URL: is needed beside CHAT_EVENTS_URL"):
        load({"CHAT_EVENTS_URL": "redis://127.0.0.1"})
    assert load({"CHAT_DATABASE_URL": "mongodb://a", "CHAT_EVENTS_URL": "redis://b"}).events_url == "redis://b"
