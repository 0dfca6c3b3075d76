"""Data that earlier versions wrote, and what their API returned of them: see tests/fixtures."""

from __future__ import annotations

import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "fixtures"


def recorded(version: str, database: str) -> dict[str, Any]:
    """What the API of that version returned."""
    return dict(json.loads(lzma.decompress((FIXTURES / version / f"{database}.json.xz").read_bytes())))


def unpack_folder(version: str, target: Path) -> Path:
    """Extract the data folder of that version's embedded server; its path."""
    with tarfile.open(FIXTURES / version / "sqlite.tar.xz") as archive:
        archive.extractall(target, filter="data")
    return target / "data"
