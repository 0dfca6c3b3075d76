"""The environment, read once: the only module that looks at it.

A bad setting stops the start with one line that names it. Config files and layers of precedence were refused:
everything that runs servers sets environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec


class BadSetting(Exception):
    """One line for stderr; the start ends with exit code 2."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name


class Settings(msgspec.Struct, frozen=True):
    """Everything that can be set; the README's table explains each.

    `port` 0 lets the system choose. `mcp_config` null means the bundled demo tools. Times are in seconds.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    data_dir: Path = Path(".chat")
    api_key: str | None = None
    mcp_config: Path | None = None
    model: str | None = None
    drain_seconds: float = 20.0
    run_seconds: float = 600.0


def environment() -> Mapping[str, str]:
    """All of it: what `${NAME}` in the operator's MCP file may refer to."""
    return os.environ


def load(environment: Mapping[str, str] | None = None) -> Settings:
    """Read the settings. Raises: BadSetting."""
    env = os.environ if environment is None else environment
    return Settings(
        host=env.get("CHAT_HOST") or "127.0.0.1",
        port=_integer(env, "PORT", 8000, 0, 65535),
        data_dir=Path(env.get("CHAT_DATA_DIR") or ".chat"),
        api_key=_key(env),
        mcp_config=_file(env, "CHAT_MCP_CONFIG"),
        model=env.get("CHAT_MODEL") or None,
        drain_seconds=_seconds(env, "CHAT_DRAIN_SECONDS", 20.0),
        run_seconds=_seconds(env, "CHAT_RUN_SECONDS", 600.0),
    )


def _integer(env: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = env.get(name) or str(default)
    if not text.isdecimal() or not low <= int(text) <= high:
        raise BadSetting(name, f"{text!r} is not a whole number from {low} to {high}")
    return int(text)


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10**7:
        raise BadSetting(name, f"{text!r} is not a number of seconds")
    return value


def _key(env: Mapping[str, str]) -> str | None:
    key = env.get("CHAT_API_KEY") or None
    if key is not None and (len(key) < 8 or not key.isascii() or any(c.isspace() for c in key)):
        raise BadSetting("CHAT_API_KEY", "needs at least 8 ASCII characters and no white space")
    return key


def _file(env: Mapping[str, str], name: str) -> Path | None:
    text = env.get(name)
    if not text:
        return None
    if not Path(text).is_file():
        raise BadSetting(name, f"there is no file {text}")
    return Path(text)
