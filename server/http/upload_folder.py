"""The folder for files of requests in progress: one per process, in the data folder, which is private and on a disk.

A process holds a lock in its folder while it lives. A folder without a lock belonged to a process that was killed; the
next process that starts removes it. Process ids were refused as a sign of life, because they are reused.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from agent_chat.stores.folder import make_folder

_LOCK = "lock"


@contextmanager
def upload_folder(data_dir: Path) -> Iterator[Path]:
    """Create this process's folder and remove those of killed processes. Raises: DataFolderUnusable."""
    parent = data_dir / "uploads"
    for folder in (data_dir, parent):
        make_folder(folder)
    with ExitStack() as stack:
        with (parent / _LOCK).open("a") as starting:
            fcntl.flock(starting, fcntl.LOCK_EX)  # a folder that is not locked yet must not look like a dead process's
            for folder in parent.iterdir():
                if folder.is_dir() and not _is_alive(folder):
                    shutil.rmtree(folder, ignore_errors=True)
            own = Path(tempfile.mkdtemp(dir=parent))
            stack.callback(shutil.rmtree, own, ignore_errors=True)
            lock: IO[str] = stack.enter_context((own / _LOCK).open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield own


def _is_alive(folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), (folder / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
