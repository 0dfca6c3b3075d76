"""The chat server: `agent_chat.server`, `agent_chat.agents`, `agent_chat.stores` and its page, `agent_chat.web_demo`."""
