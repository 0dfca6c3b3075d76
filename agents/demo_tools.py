"""A small MCP server over stdio: `python -m agent_chat.agents.demo_tools`.

The tools of the default agent, so that a server without any configuration has real tools to call: the time in a time
zone, arithmetic, dice, and a slow one that reports its progress. It is a process of its own that imports nothing of the
chat server; agents/mcp/pool.py starts it like any other MCP server. It exits when its stdin is closed.

Arithmetic walks the syntax tree and computes the operations that it supports. `eval` without builtins was refused: it
is not safe.
"""

from __future__ import annotations

import ast
import asyncio
import math
import operator
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated
from zoneinfo import ZoneInfo

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import Field

Number = int | float

MAX_EXPRESSION = 500
MAX_NUMBER = 1e300
EXACT = 2**53
"""Larger whole numbers are returned as floats: JSON parsers in JavaScript would round them anyway."""

server = MCPServer("demo-tools", log_level="WARNING")
READ_ONLY = ToolAnnotations(read_only_hint=True)


@dataclass(frozen=True)
class Moment:
    """What `current_time` returns."""

    timezone: str
    datetime: str
    weekday: str
    utc_offset: str


@dataclass(frozen=True)
class Calculation:
    """What `calculate` returns."""

    expression: str
    value: int | float


@dataclass(frozen=True)
class Roll:
    """What `roll_dice` returns."""

    dice: str
    rolls: list[int]
    modifier: int
    total: int


@dataclass(frozen=True)
class SlowResult:
    """What `slow_task` returns."""

    seconds: float
    steps: int


@server.tool(annotations=READ_ONLY)
async def current_time(
    timezone: Annotated[str, Field(description="An IANA time zone such as Asia/Tokyo or UTC")] = "UTC",
) -> Moment:
    """Return the current date and time in a time zone."""
    try:
        now = datetime.now(ZoneInfo(timezone))
    except (KeyError, ValueError, OSError):  # ZoneInfo reads a file: "America" is a folder, "../x" is refused
        raise ToolError(f"There is no time zone named {timezone[:100]!r}; use a name such as Europe/Paris.") from None
    return Moment(timezone, now.isoformat(timespec="seconds"), now.strftime("%A"), now.strftime("%z"))


@server.tool(annotations=READ_ONLY)
async def calculate(
    expression: Annotated[str, Field(description="Numbers with + - * / // % ** and parentheses")],
) -> Calculation:
    """Compute an arithmetic expression."""
    if len(expression) > MAX_EXPRESSION:
        raise ToolError(f"The expression has more than {MAX_EXPRESSION} characters.")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        raise ToolError("Division by zero.") from None
    except OverflowError:
        raise ToolError("The result is too large.") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError("This is not an arithmetic expression: use numbers, + - * / // % ** and parentheses.") from None
    return Calculation(expression, float(value) if abs(value) > EXACT else value)


@server.tool(annotations=READ_ONLY)
async def roll_dice(
    dice: Annotated[str, Field(description="How many dice of how many sides, such as 2d6, d20 or 3d8+2")] = "2d6",
) -> Roll:
    """Roll dice and add them up."""
    found = re.fullmatch(r"(\d{0,3})d(\d{1,4})([+-]\d{1,4})?", dice.strip().lower())
    if found is None:
        raise ToolError(f"{dice[:100]!r} is not a valid number of dice; use a form such as 2d6 or 3d8+2.")
    count, sides, modifier = int(found[1] or 1), int(found[2]), int(found[3] or 0)
    if not (1 <= count <= 100 and 2 <= sides <= 1000):
        raise ToolError("Roll 1 to 100 dice of 2 to 1000 sides.")
    rolls = [random.randint(1, sides) for _ in range(count)]
    return Roll(dice, rolls, modifier, sum(rolls) + modifier)


@server.tool(annotations=READ_ONLY)
async def slow_task(
    ctx: Context,
    seconds: Annotated[float, Field(ge=0, le=300, description="How long it takes")] = 3,
    steps: Annotated[int, Field(ge=1, le=1000, description="In how many steps it reports its progress")] = 6,
) -> SlowResult:
    """Take a while and report the progress."""
    for step in range(1, steps + 1):
        await asyncio.sleep(seconds / steps)
        await ctx.report_progress(step, steps, f"Step {step} of {steps}")
    return SlowResult(seconds, steps)


def _power(base: Number, exponent: Number) -> Number:
    """Compute base ** exponent, unless the result would be huge: that is checked beforehand.

    Raises:
        OverflowError: the result would exceed MAX_NUMBER.
        ValueError: the result is not a real number.
    """
    if (
        base
        and abs(exponent) * abs(math.log10(abs(base))) > math.log10(MAX_NUMBER)
        and (exponent > 0) == (abs(base) > 1)
    ):
        raise OverflowError
    result = base**exponent
    if isinstance(result, complex):
        raise ValueError
    return float(result) if isinstance(result, float) else int(result)


_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}


def _value(node: ast.expr) -> Number:
    """Compute a node of the syntax tree.

    Raises:
        ValueError: it contains something other than arithmetic.
        OverflowError: a number in it is too large.
        ZeroDivisionError.
    """
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value: Number = number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            value = _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            value = _BINARY[type(op)](_value(left), _value(right))
        case _:
            raise ValueError
    if not abs(value) <= MAX_NUMBER:
        raise OverflowError
    return value


if __name__ == "__main__":
    try:
        server.run("stdio")
    except* BrokenPipeError:  # the chat server was killed
        os._exit(1)  # an ordinary exit would flush into the broken pipe, and print a traceback
