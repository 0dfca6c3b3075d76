"""`python -m tests.journeys.serve`: the server's command line, with the scripted agent beside its own kinds.

CHAT_TEST_GATES, a folder, is where `hold NAME` of that agent is seen and ended from outside.
"""

import os
from pathlib import Path

from agents.registry import Kind
from server import app
from server.__main__ import main
from tests.journeys.scripted import FolderGates, Scripted


def serve() -> None:
    """Read the command line and serve until a signal ends it."""
    folder = os.environ.get("CHAT_TEST_GATES")
    app.KINDS["scripted"] = Kind(Scripted(FolderGates(Path(folder)) if folder else None))
    main(prog_name="serve")


if __name__ == "__main__":
    serve()
