"""Start an MCP server that is killed when the chat server dies: `launcher.py PARENT_PID COMMAND [ARGUMENT …]`.

A script of its own, run by a bare interpreter, which then executes the command in its place. `preexec_fn` was refused:
it runs Python code in a fork of a process with threads. The kernel sends the signal when the *thread* that forked ends;
the chat server forks in the thread of its event loop. Processes that the command starts are not covered: they only
see their stdin closed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent_pid: int, command: list[str]) -> None:
    """Replace this process with the command, unless the parent process has died."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == parent_pid:  # a parent that died before prctl sends no signal
        os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
