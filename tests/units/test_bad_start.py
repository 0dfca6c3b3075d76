"""A start that can't be: one line on stderr that names what is wrong, and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from server.__main__ import main

REDIS = "redis://127.0.0.1:1"


def refused(tmp_path: Path, arguments: list[str], **environment: str) -> str:
    """Run the command line, which must refuse; the line that it says."""
    settings = {"CHAT_DATA_DIR": str(tmp_path / "data"), "PORT": "0", **environment}
    result = CliRunner().invoke(main, arguments, env=settings)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("blobs", ["", "s3://bucket"], ids=["embedded", "bucket"])
@pytest.mark.parametrize("arguments", [[], ["keys", "list"]], ids=["serve", "keys"])
def test_a_data_folder_that_is_a_file_is_named(tmp_path: Path, arguments: list[str], blobs: str) -> None:
    path = tmp_path / "file"
    path.touch()
    line = refused(tmp_path, arguments, CHAT_DATA_DIR=str(path), CHAT_BLOBS_URL=blobs)
    assert line == f"CHAT_DATA_DIR: can't keep anything in {path}: File exists"


@pytest.mark.parametrize("arguments", [[], ["keys", "list"]], ids=["serve", "keys"])
def test_a_database_file_that_is_none_is_named(tmp_path: Path, arguments: list[str]) -> None:
    path = tmp_path / "data" / "chat.db"
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    assert refused(tmp_path, arguments) == (
        f"The database is damaged ({path}: file is not a database): restore it from a backup."
    )


def test_a_database_url_that_is_none_is_named_by_the_keys_commands(tmp_path: Path) -> None:
    line = refused(tmp_path, ["keys", "list"], CHAT_DATABASE_URL="mongodb://[nonsense", CHAT_EVENTS_URL=REDIS)
    assert line.startswith("CHAT_DATABASE_URL: this MongoDB URL is not understood")


def test_a_key_file_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "data" / "key").mkdir(parents=True)
    assert refused(tmp_path, []).startswith("CHAT_DATA_DIR: [Errno 21] Is a directory")


def test_an_empty_database_beside_a_key_and_attachments_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data" / "blobs" / "organization").mkdir(parents=True)
    (tmp_path / "data" / "key").write_text("chat_a-key-of-a-database-that-was-lost\n")
    for _ in range(2):
        line = refused(tmp_path, [])
        assert line.startswith(f"CHAT_DATA_DIR: can't keep anything in {tmp_path / 'data'}: the database is empty")
