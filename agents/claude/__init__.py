"""The kind `claude`: agents on any server that implements the Anthropic Messages API."""
