"""The kind `demo`: an offline agent without a model, to try out everything else.

It looks for words in the last message and generates what they request: a long answer in Markdown, one tool call,
several concurrent ones, one that fails, a slow one with progress. The tools are real ones, called through `run.tools`.
Pretending to be a model was refused: every answer states what this is.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import msgspec

from agent_chat.agents import Ended, Part, Run, Text, ToolCompleted, ToolPart, ToolUse
from agent_chat.stores.models import Agent, Attachment, JSONObject

DELAY_SECONDS = 0.015
"""The pause after each piece of text, which makes streaming visible. An agent with the metadata
`{"demo": {"delay_ms": 0}}` has another one."""

_ZONES = {
    "tokyo": "Asia/Tokyo", "london": "Europe/London", "paris": "Europe/Paris", "berlin": "Europe/Berlin",
    "madrid": "Europe/Madrid", "rome": "Europe/Rome", "new york": "America/New_York", "chicago": "America/Chicago",
    "los angeles": "America/Los_Angeles", "san francisco": "America/Los_Angeles", "toronto": "America/Toronto",
    "sao paulo": "America/Sao_Paulo", "sydney": "Australia/Sydney", "delhi": "Asia/Kolkata", "mumbai": "Asia/Kolkata",
    "singapore": "Asia/Singapore", "hong kong": "Asia/Hong_Kong", "beijing": "Asia/Shanghai", "dubai": "Asia/Dubai",
    "cairo": "Africa/Cairo", "nairobi": "Africa/Nairobi", "utc": "UTC",
}  # fmt: skip
_ZONE = re.compile(r"\b[A-Z][A-Za-z_]+/[A-Z][A-Za-z_/]+\b")
_DICE = re.compile(r"\b\d{0,3}d\d{1,4}(?:[+-]\d{1,4})?\b", re.IGNORECASE)
_EXPRESSION = re.compile(r"(?<![\w.])[-(]*\d[\d\s.()]*(?:(?:\*\*|//|[-+*/%])[\s(+-]*\d[\d\s.()]*)+")

_WHAT_TO_TRY = """
- `Tell me about this server` – a long answer in Markdown
- `What time is it in Tokyo?`, `What is 2*(3+4)?` or `Roll 3d6` – one tool call
- `several` – concurrent tool calls
- `slow` – a tool that takes a while and reports its progress
- `fail` – a tool call that fails
"""

_LONG = """I am the **demo agent**: there is no model behind me, so this answer was written beforehand. \
It is long on purpose, to show how an answer streams.

## What happens while you read

1. Your message was **stored**, together with my empty answer, in one step.
2. Every piece of this text becomes an event in the log of this thread.
3. Every client of the thread reads that log: over *server-sent events*, over a *WebSocket*, or by waiting for JSON.
4. When I am done, the whole answer is stored first, and only then published as complete.

> If your connection breaks in the middle, come back with the last position you saw: you get exactly what you missed.

## Three ways to the same answer

| way | good for | how it ends |
|---|---|---|
| JSON | scripts, other servers | one response with the message |
| SSE | browsers, command lines | a terminal event |
| WebSocket | apps that also send | a terminal event, the socket stays open |

## An agent is a function

This is all that it takes to write your own:

```python
from collections.abc import AsyncIterator

from agent_chat.agents import Part, Run, Text


async def reply(run: Run) -> AsyncIterator[Part]:
    yield Text(f"You said: {run.messages[-1].content}")
```

The server stores it, streams it, resumes it and cancels it; the function knows nothing of that.

### Things worth trying while this streams

- Open the same thread in a **second window**: both show the same text at the same time.
- Reload this page: the answer is still being written.
- Press *stop*: the answer so far remains.

That is all. With a key for a real model in the environment, the default agent becomes one that has something to say.
"""


async def reply(run: Run) -> AsyncIterator[Part]:
    """Generate what the words of the last message request."""
    message = run.messages[-1] if run.messages else None
    text = message.content if message else ""
    delay = _delay(run.agent)
    uses = requested_calls(text)
    if uses:
        async with aclosing(_reply_with_tools(run, uses, delay)) as parts:
            async for part in parts:
                yield part
    else:
        files = [await _describe_file(run, each) for each in message.attachments] if message else []
        async for piece in _type(_LONG if _requests_long_text(text) else _introduction(text, files), delay):
            yield piece
    yield Ended(stop_reason="end_turn", model="demo")


def requested_calls(message: str) -> list[ToolUse]:
    """The tool calls that a message requests; none where it requests text."""
    text = message[:1_000]
    lower = text.lower()
    if re.search(r"\bseveral\b|\bparallel\b", lower):
        calls: list[tuple[str, JSONObject]] = [
            ("current_time", {"timezone": "Asia/Tokyo"}),
            ("calculate", {"expression": "2*(3+4)"}),
            ("roll_dice", {"dice": "3d6"}),
            ("slow_task", {"seconds": 1.5, "steps": 3}),
        ]
    else:
        calls = [*_time_calls(text), *_calculate_calls(_DICE.sub(" ", text)), *_dice_calls(text)]
        if re.search(r"\bslow(ly)?\b|\bprogress\b", lower):
            calls.append(("slow_task", {"seconds": 3, "steps": 6}))
    if re.search(r"\bfail(s|ed|ing)?\b", lower):
        calls.append(("calculate", {"expression": "1/0"}))
    return [ToolUse(f"call_{number}", name, arguments) for number, (name, arguments) in enumerate(calls[:8], 1)]


def _time_calls(text: str) -> list[tuple[str, JSONObject]]:
    if not re.search(r"\b(time|clock|date|o'clock)\b", text, re.IGNORECASE):
        return []
    cities = [zone for city, zone in _ZONES.items() if re.search(rf"\b{city}\b", text, re.IGNORECASE)]
    return [("current_time", {"timezone": zone}) for zone in [*cities, *_ZONE.findall(text)] or ["UTC"]]


def _calculate_calls(text: str) -> list[tuple[str, JSONObject]]:
    expressions = [match.strip() for match in _EXPRESSION.findall(text)]
    return [("calculate", {"expression": _balance(each)}) for each in expressions]


def _balance(expression: str) -> str:
    """Remove closing parentheses that belong to the sentence around it: `(it is 2+3)`."""
    while expression.endswith(")") and expression.count(")") > expression.count("("):
        expression = expression[:-1].rstrip()
    return expression.rstrip(" .")


def _dice_calls(text: str) -> list[tuple[str, JSONObject]]:
    dice = _DICE.findall(text)
    if not dice and re.search(r"\broll\b|\bdice\b", text, re.IGNORECASE):
        dice = ["2d6"]
    return [("roll_dice", {"dice": each.lower()}) for each in dice]


def _requests_long_text(text: str) -> bool:
    return re.search(r"\b(tell me (more )?about|explain|describe|long|essay|markdown)\b", text.lower()) is not None


async def _describe_file(run: Run, attachment: Attachment) -> str:
    """One line about what the server could read of a file."""
    about = f"`{attachment.filename}` ({attachment.content_type}, {attachment.size:,} bytes)"
    if attachment.status != "ready":
        return f"- {about}: {attachment.error or attachment.status}"
    if attachment.is_image:
        return f"- {about}: a picture, which a model that accepts pictures would be given"
    beginning = " ".join(((await run.files.text(attachment)) or "")[:400].split())
    cut = ", cut" if attachment.truncated else ""
    return f"- {about}, {attachment.text_chars:,} characters of text{cut}, which begins: “{beginning[:200]}”"


def _introduction(text: str, files: list[str]) -> str:
    quote = " ".join(text.split())
    quote = quote[:200] + ("…" if len(quote) > 200 else "")
    quoted = f"You said: “{quote}”. " if quote else ""
    attached = "You attached:\n\n" + "\n".join(files) + "\n\n" if files else ""
    return f"I am the demo agent; there is no model behind me. {quoted}{attached}Try one of these:\n{_WHAT_TO_TRY}"


async def _reply_with_tools(run: Run, uses: list[ToolUse], delay: float) -> AsyncGenerator[Part, None]:
    """Announce the calls, make them, and describe their outcomes."""
    offered = [tool.name for tool in await run.tools.available()]
    names = {use.id: _offered_name(use.name, offered) for use in uses}
    possible = [msgspec.structs.replace(use, name=name) for use in uses if (name := names[use.id])]
    absent = sorted({use.name for use in uses if names[use.id] is None})
    async for piece in _type(_announcement(possible, absent, run.tools.missing), delay):
        yield piece
    outcomes: dict[str, ToolCompleted] = {}
    if possible:
        async with aclosing(_make_calls(run, possible)) as parts:
            async for part in parts:
                if isinstance(part, ToolCompleted):
                    outcomes[part.id] = part
                yield part
    lines = [_describe_outcome(use, outcomes[use.id]) for use in uses if use.id in outcomes]
    async for piece in _type("\n".join(lines), delay):
        yield piece


async def _make_calls(run: Run, uses: list[ToolUse]) -> AsyncGenerator[ToolPart, None]:
    """`run.tools.call` as a generator: closing it cancels the calls immediately."""
    parts = run.tools.call(uses)
    try:
        async for part in parts:
            yield part
    finally:
        if isinstance(parts, AsyncGenerator):
            await parts.aclose()


def _offered_name(name: str, offered: list[str]) -> str | None:
    """The name under which a tool is offered; if two servers share it, it is prefixed with its server's name."""
    return next((each for each in offered if each == name or each.endswith(f"__{name}")), None)


def _announcement(possible: list[ToolUse], absent: list[str], missing: dict[str, str]) -> str:
    text = "I am the demo agent; there is no model behind me, but my tools are real. "
    if len(possible) == 1:
        text += f"Let me call `{possible[0].name}`.\n\n"
    elif possible:
        text += f"Let me make {len(possible)} calls at the same time.\n\n"
    if absent:
        text += "I have no tool named " + ", ".join(f"`{name}`" for name in absent) + ". "
        text += "".join(f"The server `{server}` is missing: {reason} " for server, reason in missing.items())
    return text


def _describe_outcome(use: ToolUse, outcome: ToolCompleted) -> str:
    result = outcome.result or {}
    match use.name.rpartition("__")[2], result:
        case _ if outcome.error is not None:
            return f"- `{use.name}` failed: {outcome.error}"
        case "current_time", {"timezone": zone, "datetime": str(moment), "weekday": day}:
            return f"- In {zone} it is **{moment[11:16]}** on {day}, {moment[:10]}."
        case "calculate", {"expression": expression, "value": value}:
            return f"- `{expression}` is **{value}**."
        case "roll_dice", {"dice": dice, "rolls": list(rolls), "total": total}:
            return f"- {dice} gave **{total}** ({', '.join(map(str, rolls))})."
        case "slow_task", {"seconds": seconds, "steps": steps}:
            return f"- The slow task took {seconds:g} seconds in {steps} steps."
    return f"- `{use.name}` gave `{msgspec.json.encode(result).decode()[:500]}`."


async def _type(text: str, delay: float) -> AsyncIterator[Text]:
    """Yield the text in small pieces, with a pause after each."""
    for piece in re.findall(r"\S{1,12}\s*|\s+", text):
        yield Text(piece)
        await asyncio.sleep(delay)


def _delay(agent: Agent) -> float:
    """Seconds between pieces: those of the agent's metadata, if they are 0 to 1000 ms."""
    demo = agent.metadata.get("demo")
    value = demo.get("delay_ms") if isinstance(demo, dict) else None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1000:
        return value / 1000
    return DELAY_SECONDS
