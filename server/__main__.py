"""The command line: `python -m server` serves; `python -m server keys …` makes, lists and revokes keys."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar
from urllib.parse import quote

import click

from agents.mcp_config import BadServers, read_servers
from server.app import create_app, default_kind
from server.connections import ConnectionLimits, connections_for, raise_file_limit
from server.organizations import member, new_secret
from server.serving import Server, freeze_startup_objects, listening_socket
from server.settings import BadSetting, environment, load
from stores.contracts import Store
from stores.errors import BadBlobsURL, DataFolderInUse, DataFolderUnusable, StoreError, StoreUnavailable
from stores.open import open_store

R = TypeVar("R")


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Serve agents to chat with. Settings come from the environment; the README lists them."""
    if context.invoked_subcommand is None:
        serve()


def serve() -> None:
    try:
        settings = load()
        app = create_app(settings)
    except (BadSetting, BadServers, DataFolderUnusable) as error:
        _stop(str(error))
    except BadBlobsURL as error:
        _stop(f"CHAT_BLOBS_URL {error}")
    try:
        sock = listening_socket(settings.host, settings.port, reuse_port=settings.reuse_port)
    except OSError as error:
        _stop(f"PORT, CHAT_HOST: can't listen on {settings.host}:{settings.port}: {error.strerror}")
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{sock.getsockname()[1]}"

    def announce() -> None:
        freeze_startup_objects()
        click.echo(f"Listening. Open {url}/?key={quote(app.state.key, safe='')}")

    try:
        count = connections_for(raise_file_limit(), settings.max_connections)
    except ValueError as error:
        _stop(f"CHAT_MAX_CONNECTIONS: {error}")
    server = Server(app, announce, ConnectionLimits(count=count))
    try:
        server.run(sockets=[sock])
    except KeyboardInterrupt:
        pass
    except SystemExit:
        failure = getattr(app.state, "failure", None)
        if isinstance(failure, DataFolderInUse | DataFolderUnusable | StoreUnavailable | ValueError):
            _stop(str(failure))
        if isinstance(failure, OSError):
            _stop(f"CHAT_DATA_DIR: {failure}")
        raise failure or SystemExit(1) from None


@main.group()
def keys() -> None:
    """API keys. These commands work beside a running server."""


@keys.command("create")
@click.option("--organization", required=True, help="A name or an id; a new name makes an organization.")
@click.option("--user", required=True, help="A name or an id; a new name makes a user.")
def create_key(organization: str, user: str) -> None:
    """Make a key and print it, once, as the last word."""

    async def create(store: Store) -> str:
        settings = load()
        servers = read_servers(settings.mcp_config, environment())
        kind = default_kind(settings)
        owner = (await member(store, organization, user, kind=kind, model=settings.model, servers=servers))[1]
        secret = new_secret()
        await store.create_key(owner, secret)
        return secret

    click.echo(f"Key of {user} in {organization}, shown only now: {_in_store(create)}")


@keys.command("list")
def list_keys() -> None:
    """Print every key: its id, its organization, its user, its last characters, since when, and if it was revoked."""

    async def rows(store: Store) -> list[str]:
        lines = []
        for key in await store.keys():
            organization = await store.find_organization(key.organization_id)
            user = await store.find_user(key.organization_id, key.user_id)
            names = f"{organization.name if organization else '?'}\t{user.name if user else '?'}"
            state = f"revoked {key.revoked_at}" if key.revoked_at else "valid"
            lines.append(f"{key.id}\t{names}\t{key.hint}\t{key.created_at}\t{state}")
        return lines

    for row in _in_store(rows):
        click.echo(row)


@keys.command("revoke")
@click.argument("key_id")
def revoke_key(key_id: str) -> None:
    """Revoke the key with this id (see `keys list`); it stops working at once."""
    click.echo(f"Revoked {_in_store(lambda store: store.revoke_key(key_id)).id}")


def _in_store(work: Callable[[Store], Awaitable[R]]) -> R:
    async def run() -> R:
        store = await open_store(load().where, serving=False)
        try:
            return await work(store)
        finally:
            await store.close()

    try:
        return asyncio.run(run())
    except (BadSetting, BadServers, StoreError, ValueError) as error:
        _stop(str(error))


def _stop(line: str) -> NoReturn:
    click.echo(line, err=True)
    sys.exit(2)


if __name__ == "__main__":
    main(prog_name="python -m server")
