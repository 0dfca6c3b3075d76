"""The data folder: all that is embedded lies in it, so it is its owner's alone. Whoever comes first makes it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from stores.errors import DataFolderUnusable


def make_folder(folder: Path) -> None:
    """Make it, mode 0700, if it isn't there. Raises: DataFolderUnusable."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise DataFolderUnusable(str(folder), str(error.strerror)) from error
