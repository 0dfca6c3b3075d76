"""The operator's limits on models: which ones agents may use, and with how many tokens.

They are checked when an agent is created or changed, and applied again to each run, since an agent may have been stored
before the operator set a limit.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec
from msgspec.structs import replace

from agent_chat.agents import AgentError
from agent_chat.server.errors import InvalidRequest
from agent_chat.stores.models import Agent, JSONObject


class ModelPolicy(msgspec.Struct, frozen=True):
    """The limits.

    Attributes:
        models: the names of the allowed models; empty for all.
        max_tokens: the most that an agent may set.
        thinking_tokens: the largest thinking budget that an agent may set.
    """

    models: tuple[str, ...] = ()
    max_tokens: int = 32_000
    thinking_tokens: int = 16_000

    def check(self, agent: Agent, given: Collection[str]) -> None:
        """Check the fields of an agent that a client has sent. Raises: InvalidRequest."""
        if "model" in given and not self._allows(agent.model):
            names = ", ".join(self.models)
            raise InvalidRequest("model", f"This server does not offer the model {agent.model!r}; it offers {names}.")
        if "max_tokens" in given and agent.max_tokens is not None and agent.max_tokens > self.max_tokens:
            raise InvalidRequest("max_tokens", f"max_tokens may be at most {self.max_tokens} on this server.")
        thinking = _thinking(agent) if "metadata" in given else None
        if thinking and self._budget(thinking["budget_tokens"]) != thinking["budget_tokens"]:
            detail = f"The thinking budget must be a whole number, at most {self.thinking_tokens} on this server."
            raise InvalidRequest("metadata.thinking.budget_tokens", detail)

    def permitted(self, agent: Agent) -> Agent:
        """Limit the agent for a run. Raises: AgentError if its model is not allowed."""
        if not self._allows(agent.model):
            raise AgentError(f"This server does not offer the agent's model {agent.model!r} any more; set another one.")
        if agent.max_tokens is not None:
            agent = replace(agent, max_tokens=min(agent.max_tokens, self.max_tokens))
        if (thinking := _thinking(agent)) is not None:
            budget = self._budget(thinking["budget_tokens"])
            agent = replace(agent, metadata={**agent.metadata, "thinking": {**thinking, "budget_tokens": budget}})
        return agent

    def _allows(self, model: str | None) -> bool:
        return model is None or not self.models or model in self.models

    def _budget(self, wanted: object) -> int:
        if not isinstance(wanted, int) or isinstance(wanted, bool):
            return self.thinking_tokens
        return min(wanted, self.thinking_tokens)


def _thinking(agent: Agent) -> JSONObject | None:
    """The agent's `metadata.thinking`, if it sets a budget."""
    thinking = agent.metadata.get("thinking")
    return thinking if isinstance(thinking, dict) and "budget_tokens" in thinking else None
