"""The operator's MCP file: the configured servers, how to reach them, and what agents may use of them.

The format is the common `{"mcpServers": {name: {…}}}`. API clients cannot start a process or set a URL: agents only
list names from this file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec


class InvalidMcpFile(Exception):
    """The operator's MCP file is unreadable or invalid. The message is one sentence that names the problem."""


class Server(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of `mcpServers`: `command` (stdio) or `url` (streamable HTTP).

    Unknown keys are rejected: a misspelt `tools` would allow every tool.

    Attributes:
        timeout: seconds for one call.
        tools: the names of the allowed tools. None: all tools.
        organizations: the names or ids of the organizations that may use the server. None: all organizations.
        type: "stdio" with `command`, "http" or "streamable-http" with `url`. Files written for other clients have it.
    """

    command: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    cwd: str | None = None
    url: str | None = None
    headers: dict[str, str] = {}
    timeout: float = 60.0
    tools: list[str] | None = None
    organizations: list[str] | None = None
    type: str | None = None

    def __post_init__(self) -> None:
        if (self.command is None) == (self.url is None):
            raise ValueError("it needs either a `command` or a `url`")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError("its `url` must begin with http:// or https://")
        if not 0 < self.timeout <= 3600:
            raise ValueError("its `timeout` must be more than 0 and at most 3600 seconds")
        if self.type not in (None, *(("stdio",) if self.command else ("http", "streamable-http", "streamableHttp"))):
            raise ValueError(f"its `type` {self.type!r} must be stdio with a `command` and http with a `url`")

    def allows(self, organization_id: str, name: str | None) -> bool:
        """Whether the organization with this id and name may use the server."""
        return self.organizations is None or not {organization_id, name}.isdisjoint(self.organizations)


def read_servers(path: Path | None, environ: Mapping[str, str]) -> dict[str, Server]:
    """Read the configured servers by name. Without a file: the server `demo` with the bundled tools.

    `${NAME}` and `${NAME:-default}` in string values are replaced by variables of `environ`.

    Raises:
        InvalidMcpFile: the file is unreadable or invalid, or a variable is not set.
    """
    if path is None:
        root = str(Path(__file__).parents[__name__.count(".")])
        return {"demo": Server(command=sys.executable, args=["-m", "agent_chat.agents.demo_tools"], cwd=root)}
    try:
        document = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise InvalidMcpFile(f"The MCP file {path} cannot be read: {error.strerror}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidMcpFile(f"The MCP file {path} is not valid JSON: {error}.") from None
    entries = document.get("mcpServers") if isinstance(document, dict) else None
    if not isinstance(entries, dict):
        raise InvalidMcpFile(
            f'The MCP file {path} must be an object with the key "mcpServers", an object of servers by name.'
        )
    return {name: _parse_server(path, name, entry, environ) for name, entry in entries.items()}


def _parse_server(path: Path, name: str, entry: object, environ: Mapping[str, str]) -> Server:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise InvalidMcpFile(
            f"In the MCP file {path}, the server name {name!r} is invalid: use 1 to 64 letters, digits, - and _."
        )
    try:
        return msgspec.convert(_expand_variables(entry, environ), Server)
    except (msgspec.ValidationError, ValueError) as error:
        raise InvalidMcpFile(f"In the MCP file {path}, the server {name!r} is invalid: {error}.") from None


def _expand_variables(value: object, environ: Mapping[str, str]) -> object:
    def look_up(match: re.Match[str]) -> str:
        variable = environ.get(match[1], match[2])
        if variable is None:
            raise ValueError(f"the environment variable {match[1]} is not set")
        return variable

    match value:
        case str():
            return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", look_up, value)
        case list():
            return [_expand_variables(each, environ) for each in value]
        case dict():
            return {key: _expand_variables(each, environ) for key, each in value.items()}
    return value
