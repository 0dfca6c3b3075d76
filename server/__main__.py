"""The command line: `python -m server` serves."""

from __future__ import annotations

import sys

import click

from agents.mcp_config import BadServers
from server.app import create_app
from server.serving import Server, listening_socket
from server.settings import BadSetting, load


class _Announcing(Server):
    """Says where it listens once it does."""

    url = ""

    async def startup(self, sockets: list | None = None) -> None:  # type: ignore[type-arg]
        await super().startup(sockets)
        click.echo(f"Listening. Open {self.url}/?key={self._app.state.key}")


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
        sock = listening_socket(settings.host, settings.port)
    except (BadSetting, BadServers) as error:
        _stop(str(error))
    except OSError as error:
        _stop(f"PORT, CHAT_HOST: cannot listen: {error}")
    server = _Announcing(app)
    server.url = f"http://{settings.host}:{sock.getsockname()[1]}"
    try:
        server.run(sockets=[sock])
    except KeyboardInterrupt:
        pass


def _stop(line: str) -> None:
    click.echo(line, err=True)
    sys.exit(2)


if __name__ == "__main__":
    main(prog_name="python -m server")
