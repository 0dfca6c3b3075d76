"""The kind `claude`: any server of the Anthropic Messages API."""
