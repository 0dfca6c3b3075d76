"""Start an MCP server so that it is killed when the chat server dies: `mcp_launcher.py PARENT COMMAND [ARGUMENT …]`.

A script of its own, run by a bare interpreter that then becomes the command. `preexec_fn` was refused: it runs Python
in a fork of a process with threads. The kernel sends the signal when the *thread* that forked ends; the chat server
forks in the thread of its event loop. What the command itself starts is not covered: it sees its stdin closed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Become the command, unless the parent is gone already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == parent:  # else it died before the line above
        os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
