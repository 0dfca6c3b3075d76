"""The kind `demo`: an offline agent with no model behind it, for trying everything else out.

It looks for words in the last message and does what they ask: a long answer in Markdown, one tool call, several side by
side, one that fails, a slow one with progress. The tools are called for real, through `run.tools`. Pretending to be a
model was refused: every answer says what this is.
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
"""Between two pieces of text, so that streaming is visible; `metadata: {"demo": {"delay_ms": 0}}` changes it."""

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
- `several` – tool calls side by side
- `slow` – a tool that takes a while and tells its progress
- `fail` – a tool call that fails
"""

_LONG = """I am the **demo agent**: there is no model behind me, so this answer was written beforehand. \
It is long on purpose, to show how an answer streams.

## What happens while you read

1. Your message was **stored**, together with my empty answer, in one step.
2. Every piece of this text becomes an event in the log of this thread.
3. Whoever watches the thread reads that log: over *server-sent events*, over a *WebSocket*, or by waiting for JSON.
4. When I am done, the whole answer is stored first, and only then said to be complete.

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
- Press *stop*: what was said so far is kept.

That is all. With a key for a real model in the environment, the default agent becomes one that has something to say.
"""


async def reply(run: Run) -> AsyncIterator[Part]:
    """Answer the last message by the words in it."""
    message = run.messages[-1] if run.messages else None
    said = message.content if message else ""
    delay = _delay(run.agent)
    uses = wanted(said)
    if uses:
        async with aclosing(_with_tools(run, uses, delay)) as parts:
            async for part in parts:
                yield part
    else:
        files = [await _seen(run, each) for each in message.attachments] if message else []
        async for piece in _typed(_LONG if _asks_for_much(said) else _echo(said, files), delay):
            yield piece
    yield Ended(stop_reason="end_turn", model="demo")


def wanted(said: str) -> list[ToolUse]:
    """The tool calls that a message asks for; none where it asks for words."""
    text = said[:1_000]
    lower = text.lower()
    if re.search(r"\bseveral\b|\bparallel\b", lower):
        calls: list[tuple[str, JSONObject]] = [
            ("current_time", {"timezone": "Asia/Tokyo"}),
            ("calculate", {"expression": "2*(3+4)"}),
            ("roll_dice", {"dice": "3d6"}),
            ("slow_task", {"seconds": 1.5, "steps": 3}),
        ]
    else:
        calls = [*_times(text), *_sums(_DICE.sub(" ", text)), *_rolls(text)]
        if re.search(r"\bslow(ly)?\b|\bprogress\b", lower):
            calls.append(("slow_task", {"seconds": 3, "steps": 6}))
    if re.search(r"\bfail(s|ed|ing)?\b", lower):
        calls.append(("calculate", {"expression": "1/0"}))
    return [ToolUse(f"call_{number}", name, arguments) for number, (name, arguments) in enumerate(calls[:8], 1)]


def _times(text: str) -> list[tuple[str, JSONObject]]:
    if not re.search(r"\b(time|clock|date|o'clock)\b", text, re.IGNORECASE):
        return []
    cities = [zone for city, zone in _ZONES.items() if re.search(rf"\b{city}\b", text, re.IGNORECASE)]
    return [("current_time", {"timezone": zone}) for zone in [*cities, *_ZONE.findall(text)] or ["UTC"]]


def _sums(text: str) -> list[tuple[str, JSONObject]]:
    found = [match.strip() for match in _EXPRESSION.findall(text)]
    return [("calculate", {"expression": _balanced(each)}) for each in found]


def _balanced(expression: str) -> str:
    """Without the parentheses of the sentence around it: `(it is 2+3)`."""
    while expression.endswith(")") and expression.count(")") > expression.count("("):
        expression = expression[:-1].rstrip()
    return expression.rstrip(" .")


def _rolls(text: str) -> list[tuple[str, JSONObject]]:
    dice = _DICE.findall(text)
    if not dice and re.search(r"\broll\b|\bdice\b", text, re.IGNORECASE):
        dice = ["2d6"]
    return [("roll_dice", {"dice": each.lower()}) for each in dice]


def _asks_for_much(said: str) -> bool:
    return re.search(r"\b(tell me (more )?about|explain|describe|long|essay|markdown)\b", said.lower()) is not None


async def _seen(run: Run, attachment: Attachment) -> str:
    """A line on what the server understood of a file."""
    about = f"`{attachment.filename}` ({attachment.content_type}, {attachment.size:,} bytes)"
    if attachment.status != "ready":
        return f"- {about}: {attachment.error or attachment.status}"
    if attachment.is_image:
        return f"- {about}: a picture, which a model with eyes would be shown"
    beginning = " ".join(((await run.files.text(attachment)) or "")[:400].split())
    cut = ", cut" if attachment.truncated else ""
    return f"- {about}, {attachment.text_chars:,} characters of text{cut}, which begins: “{beginning[:200]}”"


def _echo(said: str, files: list[str]) -> str:
    heard = " ".join(said.split())
    heard = heard[:200] + ("…" if len(heard) > 200 else "")
    quoted = f"You said: “{heard}”. " if heard else ""
    attached = "You attached:\n\n" + "\n".join(files) + "\n\n" if files else ""
    return f"I am the demo agent; there is no model behind me. {quoted}{attached}Try one of these:\n{_WHAT_TO_TRY}"


async def _with_tools(run: Run, uses: list[ToolUse], delay: float) -> AsyncGenerator[Part, None]:
    """Say what will be done, do it, and say what came of it."""
    offered = [tool.name for tool in await run.tools.available()]
    known = {use.id: _offered_name(use.name, offered) for use in uses}
    able = [msgspec.structs.replace(use, name=name) for use in uses if (name := known[use.id])]
    absent = sorted({use.name for use in uses if known[use.id] is None})
    async for piece in _typed(_before(able, absent, run.tools.missing), delay):
        yield piece
    outcomes: dict[str, ToolCompleted] = {}
    if able:
        async with aclosing(_calls(run, able)) as parts:
            async for part in parts:
                if isinstance(part, ToolCompleted):
                    outcomes[part.id] = part
                yield part
    told = [_told(use, outcomes[use.id]) for use in uses if use.id in outcomes]
    async for piece in _typed("\n".join(told), delay):
        yield piece


async def _calls(run: Run, uses: list[ToolUse]) -> AsyncGenerator[ToolPart, None]:
    """`run.tools.call`, whatever kind of iterator it is, ended at once when this one is closed."""
    parts = run.tools.call(uses)
    try:
        async for part in parts:
            yield part
    finally:
        if isinstance(parts, AsyncGenerator):
            await parts.aclose()


def _offered_name(name: str, offered: list[str]) -> str | None:
    """The name under which a tool is offered: where two servers share it, it has its server's name before it."""
    return next((each for each in offered if each == name or each.endswith(f"__{name}")), None)


def _before(able: list[ToolUse], absent: list[str], missing: dict[str, str]) -> str:
    text = "I am the demo agent; there is no model behind me, but my tools are real. "
    if len(able) == 1:
        text += f"Let me call `{able[0].name}`.\n\n"
    elif able:
        text += f"Let me make {len(able)} calls side by side.\n\n"
    if absent:
        text += "I have no tool named " + ", ".join(f"`{name}`" for name in absent) + ". "
        text += "".join(f"The server `{server}` is missing: {reason} " for server, reason in missing.items())
    return text


def _told(use: ToolUse, outcome: ToolCompleted) -> str:
    result = outcome.result or {}
    match use.name.rpartition("__")[2], result:
        case _ if outcome.error is not None:
            return f"- `{use.name}` failed, as the tool says: {outcome.error}"
        case "current_time", {"timezone": zone, "datetime": str(moment), "weekday": day}:
            return f"- In {zone} it is **{moment[11:16]}** on {day}, {moment[:10]}."
        case "calculate", {"expression": expression, "value": value}:
            return f"- `{expression}` is **{value}**."
        case "roll_dice", {"dice": dice, "rolls": list(rolls), "total": total}:
            return f"- {dice} came to **{total}** ({', '.join(map(str, rolls))})."
        case "slow_task", {"seconds": seconds, "steps": steps}:
            return f"- The slow task took {seconds:g} seconds in {steps} steps."
    return f"- `{use.name}` gave `{msgspec.json.encode(result).decode()[:500]}`."


async def _typed(text: str, delay: float) -> AsyncIterator[Text]:
    """The text in small pieces with a pause between them."""
    for piece in re.findall(r"\S{1,12}\s*|\s+", text):
        yield Text(piece)
        await asyncio.sleep(delay)


def _delay(agent: Agent) -> float:
    """Seconds between pieces, from the agent's metadata if that makes sense (0 to 1000 ms)."""
    demo = agent.metadata.get("demo")
    value = demo.get("delay_ms") if isinstance(demo, dict) else None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1000:
        return value / 1000
    return DELAY_SECONDS
