"""The bundled MCP server: the results of its tools, and its process. One process serves this whole file."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_chat.agents import Toolbox, ToolCompleted, ToolUse
from agent_chat.agents.mcp.config import read_servers
from agent_chat.agents.mcp.pool import Pool
from agent_chat.stores.models import Agent, JSONObject

pytestmark = pytest.mark.usefixtures("patient")

ROOT = Path(__file__).parents[2]
AGENT = Agent("a", "o", "", "demo", None, "", ["demo"], None, None, True, {}, "", "")


@pytest.fixture(scope="module")
async def tools() -> AsyncIterator[Toolbox]:
    pool = Pool(read_servers(None, {}))
    yield pool.toolbox(AGENT)
    await pool.close()


async def call(tools: Toolbox, name: str, arguments: JSONObject) -> ToolCompleted:
    parts = [part async for part in tools.call([ToolUse("1", name, arguments)])]
    assert isinstance(parts[-1], ToolCompleted)
    return parts[-1]


async def result(tools: Toolbox, name: str, arguments: JSONObject) -> JSONObject:
    completed = await call(tools, name, arguments)
    assert completed.result is not None, completed.error
    return completed.result


async def test_it_offers_four_tools_with_descriptions(tools: Toolbox) -> None:
    offered = await tools.available()
    assert [tool.name for tool in offered] == ["current_time", "calculate", "roll_dice", "slow_task"]
    assert all(tool.description and tool.parameters["type"] == "object" for tool in offered)


async def test_the_time_is_that_of_the_zone(tools: Toolbox) -> None:
    time = await result(tools, "current_time", {"timezone": "Asia/Tokyo"})
    assert time["timezone"] == "Asia/Tokyo"
    assert time["utc_offset"] == "+0900"
    assert time["datetime"].endswith("+09:00")


@pytest.mark.parametrize("zone", ["Mars/Base", "America", "../etc/passwd", "/etc/passwd", "", "a\0b"])
async def test_an_unknown_zone_is_an_error(tools: Toolbox, zone: str) -> None:
    assert "There is no time zone named" in str((await call(tools, "current_time", {"timezone": zone})).error)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2*(3+4)", 14), ("7//2", 3), ("7 % 4", 3), ("-2**2", -4), ("+1/4", 0.25), ("2**53", 2**53), ("0**0", 1),
        ("2**100", 2.0**100), ("10**-400", 0.0), ("1**10**9", 1), (" 1 ", 1),
    ],
)  # fmt: skip
async def test_arithmetic_is_computed(tools: Toolbox, expression: str, value: float) -> None:
    assert await result(tools, "calculate", {"expression": expression}) == {"expression": expression, "value": value}


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("1/0", "Division by zero"), ("1%0", "Division by zero"), ("0**-1", "Division by zero"),
        ("9**9**9**9", "too large"), ("10**300*10", "too large"), ("1e999", "too large"), ("2.5**9999", "too large"),
        ("(-8)**0.5", "not an arithmetic"), ("__import__('os')", "not an arithmetic"), ("a+1", "not an arithmetic"),
        ("'a'*3", "not an arithmetic"), ("True+1", "not an arithmetic"), ("1+", "not an arithmetic"),
        ("1<<9", "not an arithmetic"), ("(" * 250, "not an arithmetic"), ("-" * 499 + "1", ""), ("1" * 501, "500"),
        ("9" * 400, "too large"), ("1\0", "not an arithmetic"), ("", "not an arithmetic"), ("1j", "not an arithmetic"),
    ],
)  # fmt: skip
async def test_an_invalid_or_too_large_expression_is_an_error(tools: Toolbox, expression: str, words: str) -> None:
    completed = await call(tools, "calculate", {"expression": expression})
    assert words in str(completed.error)
    if words:
        assert completed.result is None


@pytest.mark.parametrize(("dice", "low", "high"), [("2d6", 2, 12), ("d20", 1, 20), ("3D8+2", 5, 26), ("1d2-5", -4, -3)])
async def test_dice_add_up(tools: Toolbox, dice: str, low: int, high: int) -> None:
    rolled = await result(tools, "roll_dice", {"dice": dice})
    assert rolled["total"] == sum(rolled["rolls"]) + rolled["modifier"]
    assert low <= rolled["total"] <= high


@pytest.mark.parametrize("dice", ["0d6", "101d6", "2d1", "2d9999", "six", ""])
async def test_impossible_dice_are_an_error(tools: Toolbox, dice: str) -> None:
    assert (await call(tools, "roll_dice", {"dice": dice})).error


async def test_a_slow_task_has_bounds(tools: Toolbox) -> None:
    assert await result(tools, "slow_task", {"seconds": 0, "steps": 1}) == {"seconds": 0.0, "steps": 1}
    assert (await call(tools, "slow_task", {"seconds": 10_000})).error
    assert (await call(tools, "slow_task", {"steps": 0})).error


@pytest.mark.slow
def test_the_process_writes_only_protocol_and_ends_with_its_stdin() -> None:
    request = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "ping"})
    done = subprocess.run(
        [sys.executable, "-m", "agent_chat.agents.demo_tools"],
        cwd=ROOT,
        input=f"{request}\nnonsense\n",
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert done.returncode == 0
    assert all(json.loads(line)["jsonrpc"] == "2.0" for line in done.stdout.splitlines())
