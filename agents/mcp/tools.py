"""The tools that an MCP server lists: repaired as they arrive, bounded, and with what checks their arguments."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from jsonschema.exceptions import SchemaError  # type: ignore[import-untyped]
from jsonschema.validators import Draft202012Validator, validator_for  # type: ignore[import-untyped]
from mcp import Client
from mcp.types import Tool
from referencing import Registry

from agent_chat.stores.models import JSONObject

PAGES = 20
TOOLS = 500
"""How many tools of one server are listed; a model can use a tenth of that."""
LIST_BYTES = 2 * 2**20
"""Descriptions and schemas of one server's tools; what is listed beyond that is not used."""
DESCRIPTION_CHARACTERS = 10_000
NAME_CHARACTERS = 200
_log = logging.getLogger(__name__)


class Listed(msgspec.Struct, frozen=True):
    """A tool as its server lists it. `repeatable`: it declares itself read-only or idempotent."""

    description: str
    parameters: JSONObject
    check: Any  # a jsonschema validator: the package has no types
    repeatable: bool


def repaired(result: JSONObject) -> JSONObject:
    """The result of a request, its `tools` such that the SDK accepts them: it refuses a whole page for one of them.

    Only what is used is kept. Output schemas are not: a result that does not match its schema is still the result.
    """
    tools = result.get("tools")
    if not isinstance(tools, list):
        return result
    return {**result, "tools": [_repaired(tool) for tool in tools[:TOOLS] if _has_name(tool)]}


def _has_name(tool: object) -> bool:
    return isinstance(tool, dict) and isinstance(name := tool.get("name"), str) and 0 < len(name) <= NAME_CHARACTERS


def _repaired(tool: JSONObject) -> JSONObject:
    schema = tool.get("inputSchema")
    kept: JSONObject = {
        "name": tool["name"],
        "inputSchema": {**(schema if isinstance(schema, dict) else {}), "type": "object"},
    }
    if isinstance(description := tool.get("description"), str):
        kept["description"] = description[:DESCRIPTION_CHARACTERS]
    hints = tool.get("annotations")
    if isinstance(hints, dict):
        kept["annotations"] = {key: hints[key] for key in _HINTS if isinstance(hints.get(key), bool)}
    return kept


_HINTS = ("readOnlyHint", "idempotentHint")


async def list_tools(client: Client) -> dict[str, Listed]:
    """All pages of the server's tools. Tools with an invalid schema are skipped: arguments could not be validated.

    A model's API accepts less; that is seen to by the kind of agent that calls it.
    """
    tools: dict[str, Listed] = {}
    room = LIST_BYTES
    cursor: str | None = None
    for _ in range(PAGES):
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            if (listed := _listed(tool)) is not None:
                room -= len(listed.description) + len(msgspec.json.encode(listed.parameters))
                if len(tools) == TOOLS or room < 0:
                    _log.warning("MCP server: only its first %d tools are used", len(tools))
                    return tools
                tools[tool.name] = listed
        cursor = page.next_cursor
        if cursor is None:
            break
    return tools


def _listed(tool: Tool) -> Listed | None:
    try:
        check = _validator(tool.input_schema)
    except Exception as error:  # not only SchemaError: one nested too deep is a RecursionError
        why = error.message if isinstance(error, SchemaError) else error
        _log.warning("MCP tool %s skipped: invalid input schema: %s", tool.name, str(why)[:500])
        return None
    hints = tool.annotations
    repeatable = hints is not None and bool(hints.read_only_hint or hints.idempotent_hint)
    return Listed(tool.description or "", tool.input_schema, check, repeatable)


def _validator(schema: JSONObject) -> Any:
    """The schema's validator. The empty registry prevents that a $ref is fetched over the network."""
    kind = validator_for(schema, default=Draft202012Validator)
    kind.check_schema(schema)
    return kind(schema, registry=Registry())
