"""The data folder: it contains everything embedded, so it is private to its owner. It is created on first use."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from agent_chat.stores.errors import DataFolderUnusable


def make_folder(folder: Path) -> None:
    """Create the folder with mode 0700, or set the mode of an existing one.

    A folder of another user is refused, because its owner could read what is stored in it; so is a folder that all
    users share (such as /tmp), which must stay open to them.

    Raises: DataFolderUnusable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
        if found.st_uid != os.geteuid():
            raise DataFolderUnusable(str(folder), "it belongs to another user; name a folder inside it instead")
        if found.st_mode & stat.S_ISVTX:
            raise DataFolderUnusable(str(folder), "all users share it; name a folder inside it instead")
        if found.st_mode & 0o077:
            folder.chmod(0o700)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise DataFolderUnusable(str(folder), str(error.strerror)) from error


def make_private_file(path: Path, *, create: bool = True) -> None:
    """Create the file with mode 0600, or set the mode of an existing one. Raises: DataFolderUnusable."""
    try:
        file = os.open(path, os.O_RDONLY | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError as error:
        if create:
            raise DataFolderUnusable(str(path), str(error.strerror)) from error
        return
    except OSError as error:
        raise DataFolderUnusable(str(path), str(error.strerror)) from error
    try:
        if os.fstat(file).st_mode & 0o077:
            os.fchmod(file, 0o600)
    except OSError as error:
        raise DataFolderUnusable(str(path), str(error.strerror)) from error
    finally:
        os.close(file)
