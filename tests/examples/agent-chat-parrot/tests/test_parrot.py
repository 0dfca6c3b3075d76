import asyncio

from agent_chat_parrot import reply

from agent_chat.agents.testing import ScriptedTools, run_reply


def test_it_repeats_the_message_and_counts_its_words() -> None:
    tools = ScriptedTools({"count_words": {"words": 2}})
    answer = asyncio.run(run_reply(reply, "hello there", tools=tools))
    assert answer.content == "hello there!\n\n2 words."
    assert tools.uses[0].arguments == {"text": "hello there"}


def test_it_repeats_the_error_of_a_tool() -> None:
    answer = asyncio.run(run_reply(reply, "hello", tools=ScriptedTools({"count_words": "Out of order."})))
    assert answer.content == "hello!\n\nOut of order."
    assert answer.tool_calls[0].error == "Out of order."
