"""An agent that repeats the message, and counts its words with a tool."""

from collections.abc import AsyncIterator

from agent_chat.agents import Part, Run, Text, ToolUse


async def reply(run: Run) -> AsyncIterator[Part]:
    text = run.messages[-1].content
    yield Text(f"{text}!")
    counted = await run.tools.invoke(ToolUse("count", "count_words", {"text": text}))
    yield Text(counted.error or "{words} words.".format_map(counted.result or {}))
