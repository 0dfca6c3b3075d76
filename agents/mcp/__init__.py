"""MCP servers: the tools of agents."""
