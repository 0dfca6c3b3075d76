import asyncio
from collections.abc import AsyncIterator

from agent_chat_pydantic_ai import agent, reply
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, DeltaToolCalls, FunctionModel
from pydantic_ai.models.test import TestModel

from agent_chat.agents import JSONObject, Text, Tool, ToolCompleted, ToolStarted
from agent_chat.agents.testing import Answer, ScriptedTools, run_reply

SCHEMA: JSONObject = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool("weather", "Reports the weather in a city.", SCHEMA)


async def model(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | DeltaToolCalls]:
    """Streams text and two calls of the weather tool at once, then their results."""
    if len(messages) == 1:
        assert [tool.name for tool in info.function_tools] == ["weather"]
        yield "Let me "
        yield "look."
        for index, city in enumerate(["Oslo", "Rome"]):
            yield {index: DeltaToolCall("weather", f'{{"city": "{city}"}}', tool_call_id=f"call_{index}")}
    else:
        results = [part.content for part in messages[-1].parts if part.part_kind == "tool-return"]
        yield "It is "
        yield " and ".join(map(str, results))


async def ask(tools: ScriptedTools) -> Answer:
    with agent.override(model=FunctionModel(stream_function=model)):
        return await run_reply(reply, "How is the weather in Oslo and Rome?", tools=tools)


def test_its_tools_are_called_concurrently_between_the_texts_around_them() -> None:
    async def weather(arguments: JSONObject) -> JSONObject:
        await both.wait()  # each call waits for the other one
        return {arguments["city"]: "sunny"}

    async def run() -> Answer:
        return await ask(ScriptedTools({"weather": weather}, tools=[WEATHER]))

    both = asyncio.Barrier(2)
    answer = asyncio.run(run())
    assert answer.content == "Let me look.\n\nIt is {'Oslo': 'sunny'} and {'Rome': 'sunny'}"
    assert [call.arguments for call in answer.tool_calls] == [{"city": "Oslo"}, {"city": "Rome"}]
    kinds = [type(part) for part in answer.parts]
    assert kinds == [Text, Text, ToolStarted, ToolStarted, ToolCompleted, ToolCompleted, Text, Text]
    run_metadata = answer.message.run or {}
    assert [(call["round"], call["offset"]) for call in run_metadata["tool_calls"]] == [(0, 12), (0, 12)]


def test_the_model_is_given_the_error_of_a_tool() -> None:
    answer = asyncio.run(ask(ScriptedTools({"weather": "Out of order."}, tools=[WEATHER])))
    assert answer.content == "Let me look.\n\nIt is Out of order. and Out of order."
    assert [call.error for call in answer.tool_calls] == ["Out of order.", "Out of order."]


def test_it_works_with_the_test_model() -> None:
    tools = ScriptedTools({"weather": {"sky": "clear"}}, tools=[WEATHER])
    with agent.override(model=TestModel()):
        answer = asyncio.run(run_reply(reply, "Hello", tools=tools))
    assert [use.name for use in tools.uses] == ["weather"]
    assert answer.content == '{"weather":{"sky":"clear"}}'
