"""The system calls of the segments, as one object, so that tests can let each of them fail."""

from __future__ import annotations

import os
from pathlib import Path


class Files:
    """What the segments do with files. Any method may raise OSError."""

    def names(self, folder: Path) -> list[str]:
        """List a folder."""
        return os.listdir(folder)

    def create(self, path: Path) -> int:
        """Create a private file that does not exist; its descriptor."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def open(self, path: Path) -> int:
        """Open an existing file; its descriptor. Not with O_APPEND, with which Linux ignores the offset of a write."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def size(self, file: int) -> int:
        """Return the size of a file."""
        return os.fstat(file).st_size

    def read(self, file: int, size: int, offset: int) -> bytes:
        """Read at an offset; less at the end of the file."""
        return os.pread(file, size, offset)

    def write(self, file: int, data: bytes, offset: int) -> int:
        """Write at an offset; returns how many bytes were written, which are fewer on a disk that is full."""
        return os.pwrite(file, data, offset)

    def truncate(self, file: int, size: int) -> None:
        """Cut a file to this size."""
        os.ftruncate(file, size)

    def close(self, file: int) -> None:
        """Close a descriptor."""
        os.close(file)

    def delete(self, path: Path) -> None:
        """Delete a file."""
        path.unlink()
