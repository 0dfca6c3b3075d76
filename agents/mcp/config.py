"""The operator's MCP file: which servers there are, how they are reached, and what agents may use of them.

The form is the usual `{"mcpServers": {name: {…}}}`. Nobody can start a process or name a URL through the API: agents
only list names from here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec


class BadServers(Exception):
    """The operator's MCP file can't be used; the message is one sentence that names what is wrong."""


class Server(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of `mcpServers`: `command` (stdio) or `url` (streamable HTTP).

    `timeout` is seconds per call; `tools` are the names allowed, None for all; `organizations` are the names or ids of
    those that may use it, None for all. An unknown key is refused: a misspelt `tools` would allow everything.
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
            raise ValueError(f"its `type` {self.type!r} does not go with it (stdio with a command, http with a url)")

    def serves(self, organization_id: str, name: str | None) -> bool:
        """Whether the organization with this id and name may use it."""
        return self.organizations is None or not {organization_id, name}.isdisjoint(self.organizations)


def read_servers(path: Path | None, environ: Mapping[str, str]) -> dict[str, Server]:
    """Read the operator's `{"mcpServers": {name: …}}`; without a file, the one server `demo` of the bundled tools.

    `${NAME}` and `${NAME:-default}` in any string value are taken from `environ`.

    Raises:
        BadServers: the file can't be read, or something in it is wrong.
    """
    if path is None:
        root = str(Path(__file__).parents[__name__.count(".")])
        return {"demo": Server(command=sys.executable, args=["-m", "agent_chat.agents.demo_tools"], cwd=root)}
    try:
        document = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise BadServers(f"The MCP file {path} can't be read: {error.strerror}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadServers(f"The MCP file {path} is no JSON: {error}.") from None
    entries = document.get("mcpServers") if isinstance(document, dict) else None
    if not isinstance(entries, dict):
        raise BadServers(f'The MCP file {path} must be an object with "mcpServers", an object of servers by name.')
    return {name: _server(path, name, entry, environ) for name, entry in entries.items()}


def _server(path: Path, name: str, entry: object, environ: Mapping[str, str]) -> Server:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise BadServers(f"In the MCP file {path}, the server name {name!r} is more than letters, digits, - and _.")
    try:
        return msgspec.convert(_expanded(entry, environ), Server)
    except (msgspec.ValidationError, ValueError) as error:
        raise BadServers(f"In the MCP file {path}, the server {name!r} is wrong: {error}.") from None


def _expanded(value: object, environ: Mapping[str, str]) -> object:
    def variable(match: re.Match[str]) -> str:
        found = environ.get(match[1], match[2])
        if found is None:
            raise ValueError(f"the environment variable {match[1]} is not set")
        return found

    match value:
        case str():
            return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", variable, value)
        case list():
            return [_expanded(each, environ) for each in value]
        case dict():
            return {key: _expanded(each, environ) for key, each in value.items()}
    return value
