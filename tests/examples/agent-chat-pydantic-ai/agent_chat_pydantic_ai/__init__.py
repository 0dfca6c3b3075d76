from collections.abc import AsyncIterator

from pydantic_ai import Agent, FunctionToolset, PartDeltaEvent, PartStartEvent, RunContext, TextPart, TextPartDelta
from pydantic_ai import Tool as ModelTool

from agent_chat.agents import Part, Run, Text, Tool, ToolUse

agent = Agent(instructions="Answer the last message of this thread in one sentence.")


async def reply(run: Run) -> AsyncIterator[Part]:
    def model_tool(tool: Tool) -> ModelTool[object]:
        async def call(context: RunContext[object], **arguments: object) -> object:
            use = ToolUse(f"{context.run_step}.{context.tool_call_id}", tool.name, arguments)
            return (outcome := await run.tools.invoke(use)).error or outcome.result

        return ModelTool.from_schema(call, tool.name, tool.description, tool.parameters, takes_ctx=True)

    toolset = FunctionToolset([model_tool(tool) for tool in await run.tools.available()])
    thread = "\n".join(f"{message.role}: {message.content}" for message in run.messages)
    async with agent.run_stream_events(thread, model=run.agent.model, toolsets=[toolset]) as events:
        async for event in events:
            match event:
                case PartStartEvent(part=TextPart(text)) | PartDeltaEvent(delta=TextPartDelta(text)):
                    yield Text(text)
