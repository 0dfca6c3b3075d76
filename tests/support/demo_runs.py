"""A run of the demo agent, without a server."""

from agent_chat.agents import Run, RunTools
from agent_chat.agents.mcp.pool import Pool
from agent_chat.stores.models import Agent, Attachment, JSONObject, Message, Principal

FAST: JSONObject = {"demo": {"delay_ms": 0}}


AGENT = Agent("a", "o", "Demo", "demo", None, "", ["demo"], None, None, True, FAST, "", "")


def run(pool: Pool, said: str, agent: Agent = AGENT, attachments: list[Attachment] | None = None) -> Run:
    message = Message("m", "t", said, "", "user", [], attachments or [], {}, "")
    return Run("r", Principal("o", "u"), agent, [message], RunTools(pool.toolbox(agent)))
