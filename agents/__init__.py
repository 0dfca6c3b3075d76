"""The API for authors of agents. Everything in `__all__` is public and stays compatible; other modules are not.

An agent is an async generator: `async def reply(run: Run) -> AsyncIterator[Part]`. It is given a Run (the messages,
the agent's configuration, its tools) and yields parts. The server publishes the parts as events and stores the answer.
The agent does not deal with logs, stores or HTTP.

    async def reply(run: Run) -> AsyncIterator[Part]:
        yield Text("Let me look. ")
        async for part in run.tools.call([ToolUse("1", "current_time", {"timezone": "Asia/Tokyo"})]):
            yield part
        yield Text("Done.")

A base class was refused: there is one method, and a function is enough. The rules:

- **Exceptions.** Raise AgentError to fail the run with a sentence that the client reads. Any other exception fails it
  with "The agent failed."; its text goes to the log only. In either case the text and the tool calls so far are stored,
  and open tool calls are closed with an error. Yielding an object that is not a Part fails the run.
- **Cancellation.** When the run is cancelled, exceeds its time limit or the server stops, CancelledError is raised at
  the generator's current `await`, or GeneratorExit at its `yield`. Release resources in `finally` or `async with`;
  whatever is yielded after that is ignored. Do not suppress CancelledError, and end within 5 s. Close generators that
  you iterate over yourself (`contextlib.aclosing`), and leave no task behind. A client that disconnects does not
  cancel the run.
- **State.** Many runs use a reply function at the same time, in one event loop, but at most one run of each thread.
  Store a run's state in local variables, and what all runs share (clients, connection pools) in a kind that is opened
  (OpenKind), not in module variables. What the next run must know belongs in the answer: any process may run it, and
  it is given the thread's messages. Never block the event loop: call blocking code with `asyncio.to_thread`.
- **Configuration.** Users configure an agent through the API: `run.agent` has `model`, `instructions`, `max_tokens` and
  free-form `metadata` (use one key, named like the kind). These values come from users: validate them, and never take a
  URL or a path from them. Operators configure a kind through environment variables that the package reads when the
  kind is opened.
- **Tools.** `run.tools.call` for generators, `run.tools.invoke` for frameworks that call tools back. For a tool that
  the agent calls on its own yield ToolStarted before and ToolCompleted after the call, or from a callback await
  `run.tools.publish`.

A package announces its kind by an entry point in the group `chat.agents`: the name is the kind's, the object a reply
function, a Kind or an OpenKind. `agent_chat.agents.testing` runs reply functions in tests.
"""

from __future__ import annotations

from agent_chat.agents.parts import (
    AgentError,
    Ended,
    File,
    Part,
    Reasoning,
    Text,
    ToolCompleted,
    ToolPart,
    ToolProgress,
    ToolStarted,
)
from agent_chat.agents.registry import Kind, OpenKind
from agent_chat.agents.run import Files, MakeTitle, NoFiles, Reply, Run
from agent_chat.agents.tools import RunTools, Tool, Toolbox, ToolUse
from agent_chat.stores.models import Agent, Attachment, JSONObject, Message, Principal, ToolCall

__all__ = [
    "Agent",
    "AgentError",
    "Attachment",
    "Ended",
    "File",
    "Files",
    "JSONObject",
    "Kind",
    "MakeTitle",
    "Message",
    "NoFiles",
    "OpenKind",
    "Part",
    "Principal",
    "Reasoning",
    "Reply",
    "Run",
    "RunTools",
    "Text",
    "Tool",
    "ToolCall",
    "ToolCompleted",
    "ToolPart",
    "ToolProgress",
    "ToolStarted",
    "ToolUse",
    "Toolbox",
]
