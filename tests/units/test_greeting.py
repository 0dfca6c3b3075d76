"""What a start prints: a URL with a key on loopback only, and never a CHAT_API_KEY."""

from __future__ import annotations

from pathlib import Path

from agent_chat.server.command_line import _greeting
from agent_chat.server.own_key import OwnKey
from agent_chat.server.settings import Settings

SECRET = "a-secret-of-more-than-twenty-characters"
URL = "http://127.0.0.1:8000"


def test_a_first_key_is_printed_on_loopback_only() -> None:
    own = OwnKey("id", "first_start", SECRET)
    assert _greeting(URL, Settings(), own) == f"Listening. Open {URL}/?key={SECRET}"
    assert _greeting(URL, Settings(root_path="/chat"), own).endswith(f"{URL}/chat/?key={SECRET}")
    for host in ("0.0.0.0", "::", "192.0.2.1", "chat.example"):
        printed = _greeting(URL, Settings(host=host, data_dir=Path("data")), own)
        assert printed.startswith("Listening")
        assert SECRET not in printed
        assert "data/key" in printed


def test_a_key_of_the_environment_is_never_printed() -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        assert SECRET not in _greeting(URL, Settings(host=host), OwnKey("id", "environment", SECRET))


def test_without_a_key_it_says_how_to_make_one() -> None:
    assert "keys create" in _greeting(URL, Settings(), None)
