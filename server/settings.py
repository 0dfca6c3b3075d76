"""The settings: read once from the environment, by this module only.

An invalid setting stops the start with one line that names it. Configuration files and layers of precedence were
refused: everything that runs servers sets environment variables.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from agent_chat.server.model_policy import ModelPolicy
from agent_chat.stores.open import Where

SECRET_LENGTH = 20


class BadSetting(Exception):
    """One line for stderr; the start ends with exit code 2."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name


class Settings(msgspec.Struct, frozen=True):
    """All settings; the README's table explains each of them.

    Times are in seconds. `port` 0 lets the system choose one. What None means: `max_connections`, as many as files may
    be open, up to 10,000; `mcp_config`, the bundled demo tools; `database_url`, SQLite in the data folder;
    `events_url`, files in the data folder; `blobs_url`, a folder in the data folder.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    root_path: str = ""
    hosts: tuple[str, ...] = ()
    forwarded_allow_ips: str | None = None
    metrics_token: str | None = None
    data_dir: Path = Path(".chat")
    api_key: str | None = None
    mcp_config: Path | None = None
    model: str | None = None
    models: tuple[str, ...] = ()
    max_tokens: int = ModelPolicy().max_tokens
    thinking_tokens: int = ModelPolicy().thinking_tokens
    title_model: str | None = None
    anthropic_api_key: str | None = None
    anthropic_base_url: str | None = None
    database_url: str | None = None
    events_url: str | None = None
    events_megabytes: int = 256
    events_disk_megabytes: int = 128
    blobs_url: str | None = None
    reuse_port: bool = False
    drain_seconds: float = 20.0
    run_seconds: float = 600.0
    keep_reasoning: bool = True
    storage_megabytes: int = 10240
    max_connections: int | None = None
    log_format: Literal["text", "json"] = "text"
    log_level: str = "INFO"
    access_log: bool = False

    @property
    def default_model(self) -> str | None:
        """The model of agents that name none; None for the kind's own."""
        return self.model or (self.models[0] if self.models else None)

    @property
    def model_policy(self) -> ModelPolicy:
        """The operator's limits on models."""
        return ModelPolicy(self.models, self.max_tokens, self.thinking_tokens)

    @property
    def where(self) -> Where:
        """Where the stores are opened."""
        return Where(
            self.data_dir,
            self.database_url,
            self.events_url,
            self.events_megabytes * 2**20,
            self.events_disk_megabytes * 2**20,
        )


def environment() -> Mapping[str, str]:
    """The whole environment, to which `${NAME}` in the operator's MCP file may refer."""
    return os.environ


def load(environment: Mapping[str, str] | None = None) -> Settings:
    """Read the settings. Raises: BadSetting."""
    env = os.environ if environment is None else environment
    database_url = _url(env, "CHAT_DATABASE_URL", "mongodb", "mongodb+srv")
    events_url = _url(env, "CHAT_EVENTS_URL", "redis", "rediss", "unix")
    if (database_url is None) != (events_url is None):
        name, other = ("CHAT_EVENTS_URL", "CHAT_DATABASE_URL")[:: 1 if events_url is None else -1]
        raise BadSetting(name, f"is needed beside {other}: a shared database and shared events go together")
    return Settings(
        host=env.get("CHAT_HOST") or "127.0.0.1",
        port=_integer(env, "PORT", 8000, 0, 65535),
        root_path=_root_path(env),
        hosts=_hosts(env),
        forwarded_allow_ips=env.get("CHAT_FORWARDED_ALLOW_IPS") or None,
        metrics_token=_secret(env, "CHAT_METRICS_TOKEN"),
        data_dir=Path(env.get("CHAT_DATA_DIR") or ".chat"),
        api_key=_secret(env, "CHAT_API_KEY"),
        mcp_config=_file(env, "CHAT_MCP_CONFIG"),
        model=_model(env),
        models=_names(env, "CHAT_MODELS"),
        max_tokens=_integer(env, "CHAT_MAX_TOKENS", ModelPolicy().max_tokens, 1, 1_000_000),
        thinking_tokens=_integer(env, "CHAT_THINKING_TOKENS", ModelPolicy().thinking_tokens, 0, 1_000_000),
        title_model=env.get("CHAT_TITLE_MODEL") or None,
        anthropic_api_key=env.get("ANTHROPIC_API_KEY") or None,
        anthropic_base_url=_url(env, "ANTHROPIC_BASE_URL", "http", "https"),
        database_url=database_url,
        events_url=events_url,
        events_megabytes=_integer(env, "CHAT_EVENTS_MEGABYTES", 256, 16, 10**6),
        events_disk_megabytes=_integer(env, "CHAT_EVENTS_DISK_MEGABYTES", 128, 16, 10**6),
        blobs_url=env.get("CHAT_BLOBS_URL") or None,
        reuse_port=_switch(env, "CHAT_REUSE_PORT"),
        drain_seconds=_seconds(env, "CHAT_DRAIN_SECONDS", 20.0),
        run_seconds=_seconds(env, "CHAT_RUN_SECONDS", 600.0),
        keep_reasoning=_switch(env, "CHAT_KEEP_REASONING", default="1"),
        storage_megabytes=_integer(env, "CHAT_STORAGE_MEGABYTES", 10240, 1, 10**9),
        max_connections=_integer(env, "CHAT_MAX_CONNECTIONS", 0, 0, 10**6) or None,
        log_format="json" if _choice(env, "CHAT_LOG_FORMAT", "text", "json") == "json" else "text",
        log_level=_choice(env, "CHAT_LOG_LEVEL", "info", "debug", "warning", "error").upper(),
        access_log=_switch(env, "CHAT_ACCESS_LOG"),
    )


def unknown(environment: Mapping[str, str] | None = None) -> list[str]:
    """A sentence about each CHAT_ variable that is not a setting, with the likely name."""
    known = _Names()
    load(known)
    env = os.environ if environment is None else environment
    sentences = []
    for name in sorted(env):
        if name.startswith("CHAT_") and name not in known.names:
            likely = difflib.get_close_matches(name, known.names, n=1)
            sentences.append(f"{name} is not a setting" + (f"; did you mean {likely[0]}?" if likely else ""))
    return sentences


class _Names(Mapping[str, str]):
    """An empty environment that records which names are read from it: those of all settings."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.names.add(name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _choice(env: Mapping[str, str], name: str, default: str, *others: str) -> str:
    """One of a few words, in upper or lower case; `default` if the variable is not set."""
    text = env.get(name) or default
    if text.lower() not in (default, *others):
        raise BadSetting(name, f"{text!r} is not one of {', '.join((default, *others))}")
    return text.lower()


def _names(env: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(stripped for each in env.get(name, "").split(",") if (stripped := each.strip()))


def _model(env: Mapping[str, str]) -> str | None:
    model, models = env.get("CHAT_MODEL") or None, _names(env, "CHAT_MODELS")
    if model and models and model not in models:
        raise BadSetting("CHAT_MODEL", f"{model!r} is not among CHAT_MODELS")
    return model


def _integer(env: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = env.get(name) or str(default)
    if not text.isdecimal() or not low <= int(text) <= high:
        raise BadSetting(name, f"{text!r} is not a whole number from {low} to {high}")
    return int(text)


def _switch(env: Mapping[str, str], name: str, *, default: str = "0") -> bool:
    text = env.get(name) or default
    if text not in ("0", "1"):
        raise BadSetting(name, f"{text!r} is neither 1 nor 0")
    return text == "1"


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10**7:
        raise BadSetting(name, f"{text!r} is not a number of seconds")
    return value


def _secret(env: Mapping[str, str], name: str) -> str | None:
    secret = env.get(name) or None
    if secret is not None and (len(secret) < SECRET_LENGTH or not secret.isascii() or any(c.isspace() for c in secret)):
        raise BadSetting(name, f"needs at least {SECRET_LENGTH} ASCII characters and no white space")
    return secret


def _hosts(env: Mapping[str, str]) -> tuple[str, ...]:
    names = (env.get("CHAT_HOSTS") or "").replace(" ", "").lower()
    hosts = tuple(name for name in names.split(",") if name)
    for host in hosts:
        if not re.fullmatch(r"\*|(\*\.)?[\w.-]+|\[[0-9a-f:.]+\]", host, re.ASCII):
            raise BadSetting("CHAT_HOSTS", f"{host!r} is not a host name without a port")
    return hosts


def _root_path(env: Mapping[str, str]) -> str:
    path = (env.get("CHAT_ROOT_PATH") or "").rstrip("/")
    if path and not re.fullmatch(r"(/[\w.~-]+)+", path, re.ASCII):
        raise BadSetting("CHAT_ROOT_PATH", f"{path!r} is not a path such as /chat")
    if path.split("/")[1:2] == ["api"]:
        raise BadSetting("CHAT_ROOT_PATH", "can't begin with /api: the API's own paths do")
    return path


def _url(env: Mapping[str, str], name: str, *schemes: str) -> str | None:
    url = env.get(name) or None
    if url is not None and url.partition("://")[0] not in schemes:
        raise BadSetting(name, f"must be a URL that begins with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    return url


def _file(env: Mapping[str, str], name: str) -> Path | None:
    text = env.get(name)
    if not text:
        return None
    if not Path(text).is_file():
        raise BadSetting(name, f"there is no file {text}")
    return Path(text)
