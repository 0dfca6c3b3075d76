"""Tools as the Anthropic Messages API describes them, and which input schemas it accepts.

https://platform.claude.com/docs/en/agents-and-tools/tool-use/implement-tool-use
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import msgspec
from jsonschema import Draft202012Validator, SchemaError  # type: ignore[import-untyped]

from agent_chat.agents import Tool
from agent_chat.agents.claude.history import model_name
from agent_chat.stores.models import JSONObject

logger = logging.getLogger(__name__)

NO_TOOL: JSONObject = {
    "name": "none",
    "description": "There are no tools now. Don't call this.",
    "input_schema": {"type": "object"},
}
"""For a history with tool calls when no tool is available: the API requires a list of tools then."""

_PROPERTY_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_NOT_AT_TOP = ("$schema", "oneOf", "anyOf", "allOf")


def accepted_tools(tools: Sequence[Tool]) -> list[Tool]:
    """The tools whose input schemas the API accepts; one that it does not accept would fail the whole request."""
    return [tool for tool in tools if _is_accepted(msgspec.json.encode(tool.parameters))]


def describe_tool(tool: Tool) -> JSONObject:
    """A tool in the API's form: the schema is that of an object, without alternatives at the top level."""
    schema = {key: value for key, value in tool.parameters.items() if key not in _NOT_AT_TOP}
    schema["type"] = "object"
    return {"name": model_name(tool.name), "description": tool.description, "input_schema": schema}


def describe_missing(missing: Mapping[str, str]) -> str:
    """A note for the model about unreachable tool servers. The reasons are this server's sentences, not theirs."""
    return "\n".join(f"[The tools of the server {name} are not available now. {why}]" for name, why in missing.items())


@lru_cache(4096)
def _is_accepted(schema: bytes) -> bool:
    """Whether the schema is valid in JSON Schema 2020-12, whatever its own dialect, and with the API's names."""
    parameters = {name: value for name, value in msgspec.json.decode(schema).items() if name != "$schema"}
    try:
        Draft202012Validator.check_schema(parameters)
    except SchemaError as error:
        logger.warning("a tool is skipped: its schema is not valid in JSON Schema 2020-12: %s", error.message)
        return False
    for name in parameters.get("properties", {}):
        if not _PROPERTY_NAME.fullmatch(name):
            logger.warning("a tool is skipped: the model's API does not accept its parameter name %r", name)
            return False
    return True
