"""Query parameters: one struct for each endpoint declares them, for parsing and for the OpenAPI document.

An integer is decimal digits and a boolean is `true` or `false`: msgspec's lax conversion is not used, because it
accepts `1e1`, `True` and `null` too. Unknown parameters are ignored.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct
from starlette.requests import HTTPConnection

from agent_chat.server.errors import InvalidRequest
from agent_chat.stores.models import JSONObject

Q = TypeVar("Q", bound=Struct)

Offset = Annotated[int, Meta(ge=0, description="How many to skip.")]
PageLimit = Annotated[int, Meta(ge=1, le=100, description="How many to return.")]
MessageId = Annotated[
    str, Meta(pattern="^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", extra_json_schema={"format": "uuid"})
]
Day = Annotated[
    str, Meta(pattern=r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])$", extra_json_schema={"format": "date"})
]

_INTEGER = re.compile(r"\d{1,18}", re.ASCII)
"""At most 18 digits: databases take integers of 64 bits."""


def read_query(connection: HTTPConnection, type: type[Q]) -> Q:
    """Read the query parameters that `type` declares. Raises: InvalidRequest."""
    schemas = parameter_schemas(type)
    given = connection.query_params
    try:
        return msgspec.convert({name: _parse(given[name], schemas[name]) for name in schemas if name in given}, type)
    except msgspec.ValidationError as error:
        name = str(error).rpartition("`$.")[2].rstrip("`")
        raise InvalidRequest(name, f"{name} must be {_expected(schemas[name])}.") from error


@cache
def parameter_schemas(type: type[Struct]) -> dict[str, JSONObject]:
    """The JSON Schema of each parameter. One that may be absent has None as its default, which no client can send."""
    properties: dict[str, Any] = msgspec.json.schema(type)["$defs"][type.__name__]["properties"]
    return {name: _without_none(schema) for name, schema in properties.items()}


def _without_none(schema: JSONObject) -> JSONObject:
    if "anyOf" not in schema:
        return schema
    [kind] = [each for each in schema["anyOf"] if each != {"type": "null"}]
    return {**{name: value for name, value in schema.items() if name not in ("anyOf", "default")}, **kind}


def _parse(text: str, schema: JSONObject) -> object:
    """The value that the text spells, or the text itself if it does not fit: `convert` refuses it."""
    match schema.get("type"):
        case "integer" if _INTEGER.fullmatch(text):
            return int(text)
        case "boolean" if text in ("true", "false"):
            return text == "true"
        case _:
            return text


def _expected(schema: JSONObject) -> str:
    match schema:
        case {"type": "integer", "minimum": low, "maximum": high}:
            return f"a whole number from {low} to {high}"
        case {"type": "integer", "minimum": low}:
            return f"a whole number of at least {low}"
        case {"type": "boolean"}:
            return "true or false"
        case {"enum": choices}:
            return " or ".join(choices)
        case {"format": "date"}:
            return "a day such as 2026-01-31"
        case {"minLength": low, "maxLength": high}:
            return f"{low} to {high} characters long"
        case _:
            return "a message's id"
