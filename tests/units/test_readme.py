"""What the README and the other documents say about the code is true: tables, and the files that they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from agent_chat.server.http.bodies import BODY_BYTES, CONTENT_BYTES, METADATA_BYTES
from agent_chat.server.inputs import FILE_BYTES, FILES
from agent_chat.server.limits import Limits
from agent_chat.server.settings import Settings, load
from agent_chat.stores import events

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = ("README.md", ".github/CONTRIBUTING.md", ".github/CHANGELOG.md", "server/ai_chat_service.md")


def section(title: str) -> str:
    """The text of a section, up to the next one."""
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## )", README, re.DOTALL | re.MULTILINE)
    return str(found)


def rows(title: str) -> list[list[str]]:
    """The cells of a section's first table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_files_that_a_document_names_are_there(document: str) -> None:
    text = (ROOT / document).read_text()
    named = re.findall(r"[`(]((?:server|agents|stores|tests|web_demo|\.github|\.ci|\.src)/[\w./-]*)[`)]", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_event_table_has_every_event_with_its_fields() -> None:
    table: dict[str, list[str]] = {}
    for names, fields, _ in rows("Events"):
        outer = re.sub(r"\(.*?\)", "", fields)
        table |= {name: codes(outer) for name in codes(names)}
    classes = {str(each.__struct_config__.tag): each for each in get_args(events.Event)}
    classes.pop("log.opened")  # no client sees it
    assert table == {name: [field.name for field in msgspec.structs.fields(each)] for name, each in classes.items()}
    failed = next(fields for names, fields, _ in rows("Events") if "run.failed" in names)
    assert codes(failed)[2:] == [field.name for field in msgspec.structs.fields(events.RunError)]


def test_the_settings_table_has_every_variable() -> None:
    read: set[str] = set()

    class Names(dict[str, str]):
        def get(self, name: str, default: object = None) -> object:  # type: ignore[override]
            read.add(name)
            return default

    load(Names())
    table = {name for names, _, _ in rows("Settings") for name in codes(names)}
    named = table | {name.partition("=")[0] for name in codes(section("Settings"))}
    assert read <= named
    assert table <= read


def test_the_default_values_in_the_settings_table_are_true() -> None:
    defaults = {names: default for names, default, _ in rows("Settings")}
    settings = Settings()
    assert defaults["`PORT`, `CHAT_HOST`"] == f"{settings.port}, {settings.host}"
    assert defaults["`CHAT_EVENTS_MEGABYTES`"] == str(settings.events_megabytes)
    assert defaults["`CHAT_STORAGE_MEGABYTES`"] == str(settings.storage_megabytes)
    assert (
        defaults["`CHAT_DRAIN_SECONDS`, `CHAT_RUN_SECONDS`"] == f"{settings.drain_seconds:g}, {settings.run_seconds:g}"
    )
    assert defaults["`CHAT_MAX_TOKENS`, `CHAT_THINKING_TOKENS`"] == f"{settings.max_tokens}, {settings.thinking_tokens}"


def test_the_limits_table_is_true() -> None:
    limits = dict(rows("Limits"))
    sizes = f"{CONTENT_BYTES >> 20} MB · {METADATA_BYTES >> 10} KB · {BODY_BYTES >> 20} MB and 64 levels"
    assert limits["`content` of a message · `metadata` · a JSON body"] == sizes
    files = limits["a file · files in one request · extracted text"]
    assert files.startswith(f"{FILE_BYTES >> 20} MB · {FILES} · ")
    each = Limits()
    at_once = f"{each.runs} runs, {each.streams:,} open streams and {each.uploads} uploads at once"
    assert limits["in one process, for one organization"] == f"{each.requests:,} requests a minute; {at_once}"
