"""Data that earlier versions wrote, and what their API returned of them: see tests/fixtures."""

from __future__ import annotations

import json
import lzma
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any, BinaryIO, cast

import bson
from pymongo import MongoClient

FIXTURES = Path(__file__).parents[1] / "fixtures"


def recorded(version: str, database: str) -> dict[str, Any]:
    """What the API of that version returned."""
    return dict(json.loads(lzma.decompress((FIXTURES / version / f"{database}.json.xz").read_bytes())))


def unpack_folder(version: str, target: Path) -> Path:
    """Extract the data folder of that version's embedded server; its path."""
    with tarfile.open(FIXTURES / version / "sqlite.tar.xz") as archive:
        archive.extractall(target, filter="data")
    return target / "data"


def load_documents(version: str, url: str) -> None:
    """Fill the MongoDB database at this URL with what that version's server had written."""
    with (
        lzma.open(FIXTURES / version / "mongodb.bson.xz") as file,
        MongoClient[dict[str, Any]](url) as client,
    ):
        documents: defaultdict[str, list[Any]] = defaultdict(list)
        for each in bson.decode_file_iter(cast(BinaryIO, file)):
            documents[each["collection"]].append(each["document"])
        for name, found in documents.items():
            client.get_default_database()[name].insert_many(found)
