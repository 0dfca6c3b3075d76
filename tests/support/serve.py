"""`python -m tests.support.serve`: the server's command line, with the scripted agent beside its own kinds.

CHAT_TEST_GATES, a folder, is where `hold NAME` of that agent is seen and ended from outside. With CHAT_TEST_CONNECTS it
connects to its MCP servers at start: most tests call no tool, and the bundled server takes a second of CPU to start.
"""

import os
from functools import partial
from pathlib import Path

from agent_chat.agents.registry import Kind
from agent_chat.server import app, command_line
from tests.support.scripted import FolderGates, Scripted


def serve() -> None:
    """Read the command line and serve until a signal ends it."""
    folder = os.environ.get("CHAT_TEST_GATES")
    app.KINDS["scripted"] = Kind(Scripted(FolderGates(Path(folder)) if folder else None))
    if "CHAT_TEST_CONNECTS" not in os.environ:
        command_line.create_app = partial(app.create_app, connect_tools=False)  # type: ignore[attr-defined]
    command_line.main(prog_name="serve")


if __name__ == "__main__":
    serve()
