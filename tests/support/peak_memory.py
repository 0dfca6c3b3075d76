"""The peak memory of this process during a measurement.

`ru_maxrss` was refused: it is never reset, so after a test with a high peak every later one would measure nothing. The
kernel's own mark can be reset (https://docs.kernel.org/filesystems/proc.html, clear_refs).
"""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path


class Peak:
    """A measurement that begins now. Free memory is returned to the system first, since its reuse would not be seen."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _mark()

    def grown(self) -> int:
        """By how many bytes the process has grown at most since the beginning."""
        return _mark() - self._before


def _mark() -> int:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
