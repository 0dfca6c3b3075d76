"""The command's start: `agent-chat`, `python -m agent_chat.server`, and `python -m server` in a clone.

In a clone `python -m` puts the clone's root on the module path, where the folder `agents` would hide an installed
package of that name. So the root is removed. As `python -m server` this file is loaded under a name of the clone: the
folder that holds the package `agent_chat` is put on the path, and everything else is imported from there.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path


def main() -> None:
    """Run the command line of `agent_chat.server.command_line`."""
    # Until it listens, Ctrl-C ends the process without a traceback: the imports take seconds.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    root = Path(__file__).resolve().parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != root]
    if __package__ == "server":
        sys.path.insert(0, str(root / ".src"))
        del sys.modules["server"]
    from agent_chat.server import command_line

    command_line.main(prog_name="agent-chat")


if __name__ == "__main__":
    main()
