"""Server processes that start in a blink: forks of one process that has imported everything.

`python -m tests.support.nursery` reads one environment a line and answers with the process id of a server in it.
Importing costs seconds of CPU; a forked server is a process like any other: it is killed, paused and stopped alone.
When the tests end, however they do, its whole process group ends with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from tests.support.site_server import serve


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if pid := os.fork():
            print(pid, flush=True)  # noqa: T201
            continue
        _become(json.loads(line))
        serve()
        return
    os.killpg(0, signal.SIGKILL)


def _become(environment: dict[str, str]) -> None:
    """A server of its own: its settings, its output, and signals as they were."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(environment)
    output = os.open(environment["CHAT_TEST_OUTPUT"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for stream, file in enumerate((nothing, output, output)):
        os.dup2(file, stream)


if __name__ == "__main__":
    main()
