"""The numbered invariants of the stores: each is cited where the code keeps it, and by a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent_chat.stores import contracts

ROOT = Path(__file__).parents[2]
NUMBERS = [int(number) for number in re.findall(r"^ +I(\d+)\.", contracts.__doc__ or "", re.M)]


def citations(*folders: str, leave_out: str) -> set[int]:
    """Return the numbers that the modules in these folders cite, without those below `leave_out`."""
    modules = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".lua")]
    texts = [path.read_text("utf-8") for path in modules if leave_out not in path.as_posix()]
    return {int(number) for text in texts for number in re.findall(r"\bI(\d+)\b", text)}


def test_the_invariants_are_numbered_without_holes() -> None:
    assert list(range(1, len(NUMBERS) + 1)) == NUMBERS


@pytest.mark.parametrize("place", ["code", "tests"])
def test_every_invariant_is_cited(place: str) -> None:
    if place == "code":
        cited = citations("stores", "server", leave_out="stores/contracts/")
    else:
        cited = citations("tests", leave_out="test_invariants")
    assert set(NUMBERS) - cited == set()
    assert cited - set(NUMBERS) == set()
