"""A start that can't be: one line on stderr that names what is wrong, and exit code 2."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner
from pymongo import MongoClient

from agent_chat.server.command_line import main
from tests.support.mongo_server import mongo_server as mongo_server
from tests.support.mongo_server import mongo_url as mongo_url
from tests.support.services import redis_process

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
    assert line == f"CHAT_DATA_DIR: cannot store anything in {path}: File exists"


@pytest.mark.parametrize("arguments", [[], ["keys", "list"]], ids=["serve", "keys"])
def test_a_database_file_that_is_none_is_named(tmp_path: Path, arguments: list[str]) -> None:
    path = tmp_path / "data" / "chat.db"
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    assert refused(tmp_path, arguments) == (
        f"The database is damaged ({path}: file is not a database): restore it from a backup."
    )


@pytest.mark.parametrize("arguments", [[], ["keys", "list"]], ids=["serve", "keys"])
def test_data_of_a_later_version_are_refused_and_stay_as_they_are(tmp_path: Path, arguments: list[str]) -> None:
    path = tmp_path / "data" / "chat.db"
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE threads (a_later_schema TEXT)")
        db.execute("PRAGMA user_version = 1000")
    before = path.read_bytes()
    assert refused(tmp_path, arguments).startswith(
        f"{path} was written by a later version of this server (schema version 1000; this one knows versions up to "
    )
    assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["keys", "list"]], ids=["serve", "keys"])
def test_a_mongodb_with_data_of_a_later_version_is_refused(
    tmp_path: Path, mongo_url: str, arguments: list[str]
) -> None:
    with MongoClient[dict[str, object]](mongo_url) as client:
        client.get_default_database().meta.insert_one({"_id": "schema", "version": 1000})
    line = refused(tmp_path, arguments, CHAT_DATABASE_URL=mongo_url, CHAT_EVENTS_URL=REDIS)
    assert "was written by a later version of this server (schema version 1000; this one knows versions up to" in line


def test_a_database_url_that_is_none_is_named_by_the_keys_commands(tmp_path: Path) -> None:
    line = refused(tmp_path, ["keys", "list"], CHAT_DATABASE_URL="mongodb://[nonsense", CHAT_EVENTS_URL=REDIS)
    assert line.startswith("CHAT_DATABASE_URL: this MongoDB URL is not understood")


@pytest.mark.slow
def test_a_key_file_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "data" / "key").mkdir(parents=True)
    assert refused(tmp_path, []).startswith("CHAT_DATA_DIR: [Errno 21] Is a directory")


@pytest.mark.slow
def test_an_empty_database_beside_a_key_and_attachments_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data" / "blobs" / "organization").mkdir(parents=True)
    (tmp_path / "data" / "key").write_text("chat_a-key-of-a-database-that-was-lost\n")
    for _ in range(2):
        line = refused(tmp_path, [])
        assert line.startswith(f"CHAT_DATA_DIR: cannot store anything in {tmp_path / 'data'}: the database is empty")


def unreachable_mongo() -> dict[str, str]:
    url = "mongodb://127.0.0.1:1/?timeoutMS=100"
    return {"CHAT_DATABASE_URL": url, "CHAT_EVENTS_URL": REDIS}


@pytest.mark.parametrize("arguments", [[], ["keys", "list"]], ids=["serve", "keys"])
def test_an_unreachable_database_is_named_by_its_setting_without_a_dump(tmp_path: Path, arguments: list[str]) -> None:
    line = refused(tmp_path, arguments, **unreachable_mongo())
    assert line.startswith("CHAT_DATABASE_URL: The database did not answer: ")
    assert "Topology" not in line
    assert len(line) < 300


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("CHAT_MCP_CONFIG", __file__, "The MCP file "),
        ("CHAT_MAX_CONNECTIONS", "1000000", "1000000 is more than "),
        ("CHAT_LOG_LEVEL", "loud", "'loud' is not one of info, debug, warning, error"),
        ("CHAT_LOG_FORMAT", "xml", "'xml' is not one of text, json"),
    ],
)
def test_a_bad_setting_is_named(tmp_path: Path, name: str, value: str, reason: str) -> None:
    assert refused(tmp_path, [], **{name: value}).startswith(f"{name}: {reason}")


@pytest.mark.parametrize("login", ["", ":wrong@", "nobody:secret@"], ids=["none", "wrong password", "unknown user"])
def test_a_redis_that_refuses_the_login_stops_the_start(tmp_path: Path, mongo_url: str, login: str) -> None:
    with redis_process() as redis:
        redis.command("CONFIG", "SET", "requirepass", "right")
        url = f"redis://{login}127.0.0.1:{redis.port}"
        line = refused(tmp_path, [], CHAT_DATABASE_URL=mongo_url, CHAT_EVENTS_URL=url)
    assert line.startswith("CHAT_EVENTS_URL: Redis refuses the login: ")


def test_version_is_printed() -> None:
    assert CliRunner().invoke(main, ["--version"]).output.startswith("agent-chat-server, version ")


def test_keys_are_listed_under_a_header_and_making_and_revoking_them_are_security_events(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["keys", *arguments], env={"CHAT_DATA_DIR": str(tmp_path)})
        assert result.exit_code == 0, result.output
        return result.stdout

    secret = run("create", "--organization", "acme", "--user", "bob").split()[-1]
    header, row = run("list").splitlines()
    assert header.split("\t")[:3] == ["id", "organization", "user"]
    assert len(header.split("\t")) == len(row.split("\t"))
    run("revoke", row.split("\t")[0])
    events = [record for record in caplog.records if record.name == "chat.security"]
    assert [event.getMessage() for event in events] == ["key created", "key revoked"]
    assert {vars(event)["key_id"] for event in events} == {row.split("\t")[0]}
    assert not [event for event in events if secret in str(vars(event))]
