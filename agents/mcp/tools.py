"""The tools that an MCP server lists: repaired on arrival, limited in number and size, with argument validators."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import msgspec
from jsonschema.exceptions import SchemaError  # type: ignore[import-untyped]
from jsonschema.validators import Draft202012Validator, validator_for  # type: ignore[import-untyped]
from mcp import Client
from mcp.types import Tool
from referencing import Registry

from agent_chat.stores.models import JSONObject

PAGES = 20
"""The largest number of pages read of one server's list."""
TOOLS = 500
"""The largest number of tools of one server; a model can use about a tenth of that."""
LIST_BYTES = 2 * 2**20
"""The largest size of the descriptions and schemas of one server. Tools beyond that are skipped."""
DESCRIPTION_CHARACTERS = 10_000
NAME_CHARACTERS = 200
_REMEMBERED_BYTES = 16 * 2**10
"""The largest schema whose validator is reused when a server lists it again."""
_HINTS = ("readOnlyHint", "idempotentHint")
_log = logging.getLogger(__name__)


class ListedTool(msgspec.Struct, frozen=True):
    """A tool as its server lists it.

    Attributes:
        parameters: the JSON Schema of the arguments.
        validator: a jsonschema validator for `parameters` (the package has no types).
        repeatable: the tool declares itself read-only or idempotent.
    """

    description: str
    parameters: JSONObject
    validator: Any
    repeatable: bool


def repair_tool_list(result: JSONObject) -> JSONObject:
    """Return a response's result with `tools` that the SDK accepts: it rejects a whole page for one invalid tool.

    Only the fields in use are passed on. Output schemas are dropped: a result that violates its schema is still used.
    """
    tools = result.get("tools")
    if not isinstance(tools, list):
        return result
    return {**result, "tools": [_repair_tool(tool) for tool in tools[:TOOLS] if _has_name(tool)]}


def _has_name(tool: object) -> bool:
    return isinstance(tool, dict) and isinstance(name := tool.get("name"), str) and 0 < len(name) <= NAME_CHARACTERS


def _repair_tool(tool: JSONObject) -> JSONObject:
    schema = tool.get("inputSchema")
    repaired: JSONObject = {
        "name": tool["name"],
        "inputSchema": {**(schema if isinstance(schema, dict) else {}), "type": "object"},
    }
    if isinstance(description := tool.get("description"), str):
        repaired["description"] = description[:DESCRIPTION_CHARACTERS]
    hints = tool.get("annotations")
    if isinstance(hints, dict):
        repaired["annotations"] = {key: hints[key] for key in _HINTS if isinstance(hints.get(key), bool)}
    return repaired


async def list_tools(client: Client) -> dict[str, ListedTool]:
    """List all pages of the server's tools. Tools with an invalid schema are skipped: arguments cannot be validated.

    The APIs of models accept fewer schemas than this; the kind of agent that calls one handles the difference.
    """
    tools: dict[str, ListedTool] = {}
    remaining_bytes = LIST_BYTES
    cursor: str | None = None
    for _ in range(PAGES):
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            if (listed := _parse_tool(tool)) is not None:
                remaining_bytes -= len(listed.description) + len(msgspec.json.encode(listed.parameters))
                if len(tools) == TOOLS or remaining_bytes < 0:
                    _log.warning("MCP server: only its first %d tools are used, the list is too large", len(tools))
                    return tools
                tools[tool.name] = listed
        cursor = page.next_cursor
        if cursor is None:
            break
    return tools


def _parse_tool(tool: Tool) -> ListedTool | None:
    try:
        schema = msgspec.json.encode(tool.input_schema)
        validator = (_reuse_validator if len(schema) <= _REMEMBERED_BYTES else _build_validator)(schema)
    except Exception as error:  # not only SchemaError: a deeply nested schema raises RecursionError
        reason = error.message if isinstance(error, SchemaError) else error
        _log.warning("MCP tool %s skipped: invalid input schema: %s", tool.name, str(reason)[:500])
        return None
    hints = tool.annotations
    repeatable = hints is not None and bool(hints.read_only_hint or hints.idempotent_hint)
    return ListedTool(tool.description or "", tool.input_schema, validator, repeatable)


def _build_validator(encoded: bytes) -> Any:
    schema = msgspec.json.decode(encoded)
    dialect = validator_for(schema, default=Draft202012Validator)
    dialect.check_schema(schema)
    return dialect(schema, registry=Registry())  # the empty registry: a $ref must not be fetched over the network


# Checking a schema against its dialect takes milliseconds of the event loop, and every reconnect lists the same ones.
_reuse_validator = lru_cache(1024)(_build_validator)
