"""The most memory that this process held at once during something, whatever it did before.

`ru_maxrss` was refused: it is never set back, so that behind a test that took much every later one takes nothing. The
kernel's own mark can be set back (https://docs.kernel.org/filesystems/proc.html, clear_refs).
"""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path


class Peak:
    """A measurement that begins now; what lies free in the process is given back first, lest it be taken unseen."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _mark()

    def grown(self) -> int:
        """By how many bytes the process was larger than at the beginning, when it was largest."""
        return _mark() - self._before


def _mark() -> int:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
