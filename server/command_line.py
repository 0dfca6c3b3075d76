"""The command line: `agent-chat` serves; `keys` has commands for API keys; `import` and `export` copy threads."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import BinaryIO, NoReturn, TypeVar
from urllib.parse import quote

import click
from msgspec.structs import replace

from agent_chat.agents.mcp.config import InvalidMcpFile, read_servers
from agent_chat.server.app import create_app, default_kind
from agent_chat.server.files.content_html import Renderer
from agent_chat.server.files.worker_process import hide_process
from agent_chat.server.http.connections import ConnectionLimits, connections_for, raise_file_limit
from agent_chat.server.http.hosts import default_hosts, is_loopback
from agent_chat.server.log_lines import configure
from agent_chat.server.organizations import member, new_secret
from agent_chat.server.own_key import KEY_FILE, OwnKey
from agent_chat.server.serving import Server, freeze_startup_objects, listening_socket, share_interpreter
from agent_chat.server.settings import BadSetting, Settings, environment, load, unknown
from agent_chat.server.transfer.exporter import Exporter
from agent_chat.server.transfer.importer import Importer
from agent_chat.server.transfer.lines import BadLine
from agent_chat.server.transfer.progress import Progress
from agent_chat.server.transfer.references import References, UnknownReference
from agent_chat.stores.contracts import Store
from agent_chat.stores.errors import (
    BadBlobsURL,
    DataFolderInUse,
    DataFolderUnusable,
    SchemaTooNew,
    StoreError,
    StoreUnavailable,
)
from agent_chat.stores.open import open_store

R = TypeVar("R")

logger = logging.getLogger(__name__)
security = logging.getLogger("chat.security")


@click.group(invoke_without_command=True)
@click.version_option(package_name="agent-chat-server", prog_name="agent-chat-server")
@click.pass_context
def main(context: click.Context) -> None:
    """Serve agents to chat with. Settings come from the environment; the README lists them."""
    if context.invoked_subcommand is None:
        serve()


def serve() -> None:
    """Serve until a signal stops the process; exit with 2 and one line if the start fails."""
    hide_process()
    try:
        settings = load()
        configure(settings.log_format, settings.log_level)
        for sentence in unknown():
            logger.warning(sentence)
        app = create_app(replace(settings, hosts=settings.hosts or default_hosts(settings.host)))
    except (BadSetting, InvalidMcpFile, DataFolderUnusable) as error:
        _stop(_line(error))
    except BadBlobsURL as error:
        _stop(f"CHAT_BLOBS_URL {error}")
    sock = _listen(settings)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{sock.getsockname()[1]}"

    def announce() -> None:
        freeze_startup_objects()
        share_interpreter()
        click.echo(_greeting(url, settings, app.state.own_key))

    try:
        count = connections_for(raise_file_limit(), settings.max_connections)
    except ValueError as error:
        _stop(f"CHAT_MAX_CONNECTIONS: {error}")

    def announce_stop(running: int) -> None:
        if running:
            answers = "1 running answer" if running == 1 else f"{running} running answers"
            click.echo(f"Waiting for {answers}, up to {settings.drain_seconds:g} s. Press Ctrl-C again to stop now.")

    server = Server(app, announce, announce_stop, ConnectionLimits(count=count), settings.forwarded_allow_ips)
    try:
        server.run(sockets=[sock])
    except KeyboardInterrupt:
        pass
    except SystemExit:
        failure = getattr(app.state, "failure", None)
        if isinstance(failure, DataFolderInUse | DataFolderUnusable | SchemaTooNew | StoreUnavailable | ValueError):
            _stop(_line(failure, settings))
        if isinstance(failure, OSError):
            _stop(f"CHAT_DATA_DIR: {failure}")
        raise failure or SystemExit(1) from None


def _listen(settings: Settings) -> socket.socket:
    try:
        return listening_socket(settings.host, settings.port, reuse_port=settings.reuse_port)
    except OSError as error:
        _stop(f"PORT, CHAT_HOST: can't listen on {settings.host}:{settings.port}: {error.strerror}")


def _greeting(url: str, settings: Settings, own: OwnKey | None) -> str:
    """What the start prints: a URL with a key only on loopback, and never a CHAT_API_KEY."""
    if own is None:
        return f"Listening on {url}. Keys: `agent-chat keys create --organization NAME --user NAME`"
    if own.source == "environment":
        return f"Listening on {url}. Sign in with CHAT_API_KEY: {url}{settings.root_path}/?key=…"
    if is_loopback(settings.host):
        return f"Listening. Open {url}{settings.root_path}/?key={quote(own.secret, safe='')}"
    return f"Listening on {url}. The first key is in {settings.data_dir / KEY_FILE}"


@main.group()
def keys() -> None:
    """Create, list and revoke API keys. These commands also work while a server is running."""


@keys.command("create")
@click.option("--organization", required=True, help="A name or an id; a new name creates an organization.")
@click.option("--user", required=True, help="A name or an id; a new name creates a user.")
def create_key(organization: str, user: str) -> None:
    """Create a key and print it, once, as the last word."""

    async def create(store: Store) -> str:
        settings = load()
        servers = read_servers(settings.mcp_config, environment())
        kind = default_kind(settings)
        owner = (await member(store, organization, user, kind=kind, model=settings.default_model, servers=servers))[1]
        secret = new_secret()
        key = await store.create_key(owner, secret, "command_line")
        facts = {"key_id": key.id, "organization_id": key.organization_id, "user_id": key.user_id}
        security.info("key created", extra=facts)
        return secret

    click.echo(f"Key of {user} in {organization}, shown only now: {_in_store(create)}")


@keys.command("list")
def list_keys() -> None:
    """Print a header and a line per key: id, organization, user, last characters, source, creation time, state."""

    async def rows(store: Store) -> list[str]:
        lines = ["id\torganization\tuser\tends with\tsource\tcreated\tstate"]
        for key in await store.list_keys():
            organization = await store.find_organization(key.organization_id)
            user = await store.find_user(key.organization_id, key.user_id)
            names = f"{organization.name if organization else '?'}\t{user.name if user else '?'}"
            state = f"revoked {key.revoked_at}" if key.revoked_at else "valid"
            lines.append(f"{key.id}\t{names}\t{key.hint}\t{key.source or 'unknown'}\t{key.created_at}\t{state}")
        return lines

    for row in _in_store(rows):
        click.echo(row)


@keys.command("revoke")
@click.argument("key_id")
def revoke_key(key_id: str) -> None:
    """Revoke the key with this id (see `keys list`); it and its sessions stop working within seconds."""

    async def revoke(store: Store) -> str:
        key = await store.revoke_key(key_id)
        security.info("key revoked", extra={"key_id": key.id, "organization_id": key.organization_id})
        return key.id

    click.echo(f"Revoked {_in_store(revoke)}")


@main.command("import")
@click.argument("file", type=click.File("rb"))
@click.option("--organization", required=True, help="A name or an id.")
@click.option("--user", help="For threads that name no user: a name or an id; a new name creates a user.")
@click.option("--agent", help="For threads that name no agent of the organization: a name or an id, or `default`.")
def import_threads(file: BinaryIO, organization: str, user: str | None, agent: str | None) -> None:
    """Import the threads in FILE (`-` reads standard input). No runs are started.

    The file has a JSON object per line: a thread, then its messages, as `agent-chat export` writes them;
    server/ai_chat_service.md describes them. What is there already is not imported again. A bad line stops the import
    before anything of its thread is stored. With the embedded database no server may be running.
    """

    async def run(store: Store) -> str:
        organization_id = await _organization_id(store, organization)
        references = References(store, organization_id)
        renderer = Renderer()
        importer = Importer(
            store,
            organization_id,
            references,
            renderer,
            user_id=await references.user_id(user) if user else None,
            agent_id=await references.agent_id(agent) if agent else None,
            report=Progress().report,
        )
        try:
            await importer.run(file)
        except (BadLine, StoreError):
            click.echo(f"Imported before the error: {importer.counts}", err=True)
            raise
        finally:
            await renderer.close()
        return str(importer.counts)

    click.echo(f"Imported: {_in_store(run, exclusive=True)}")


@main.command("export")
@click.argument("file", type=click.File("wb"), default="-")
@click.option("--organization", required=True, help="A name or an id.")
@click.option("--user", help="Only threads of this user: a name or an id.")
@click.option("--agent", help="Only threads with this agent: a name or an id, or `default`.")
def export_threads(file: BinaryIO, organization: str, user: str | None, agent: str | None) -> None:
    """Write the organization's threads to FILE (default: standard output), in the format of `agent-chat import`.

    Uploaded files are not exported; messages still name them. An answer that is being generated is left out.
    """

    async def run(store: Store) -> str:
        organization_id = await _organization_id(store, organization)
        references = References(store, organization_id)
        exporter = Exporter(
            store,
            organization_id,
            references,
            user_id=await references.user_id(user, create=False) if user else None,
            agent_id=await references.agent_id(agent) if agent else None,
            report=Progress().report,
        )
        await exporter.run(file)
        return str(exporter.counts)

    click.echo(f"Exported: {_in_store(run)}", err=True)


async def _organization_id(store: Store, id_or_name: str) -> str:
    organization = await store.find_organization(id_or_name)
    if organization is None:
        raise UnknownReference(f"There is no organization {id_or_name!r}; `agent-chat keys create` creates one.")
    return organization.id


def _in_store(work: Callable[[Store], Awaitable[R]], *, exclusive: bool = False) -> R:
    """Run this with the store. `exclusive`: only while no server uses the data folder."""
    settings = _loaded()

    async def run() -> R:
        store = await open_store(settings.where, serving=exclusive)
        try:
            return await work(store)
        finally:
            await store.close()

    try:
        return asyncio.run(run())
    except (BadSetting, InvalidMcpFile, StoreError, ValueError) as error:
        _stop(_line(error, settings))


def _loaded() -> Settings:
    try:
        settings = load()
    except BadSetting as error:
        _stop(str(error))
    configure(settings.log_format, settings.log_level)
    return settings


def _line(error: Exception, settings: Settings | None = None) -> str:
    """The error as one line, which names the setting even if the error does not."""
    line = " ".join(str(error).split())
    if isinstance(error, InvalidMcpFile):
        return line if line.startswith("CHAT_MCP_CONFIG") else f"CHAT_MCP_CONFIG: {line}"
    if isinstance(error, StoreUnavailable) and settings is not None and settings.database_url is not None:
        return f"CHAT_DATABASE_URL: {line}"
    return line


def _stop(line: str) -> NoReturn:
    click.echo(line, err=True)
    sys.exit(2)
