"""The stored result of a tool call: structured content, and the blocks that do not repeat it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from agent_chat.agents.mcp.connection import ToolResult
from agent_chat.agents.mcp.results import RESULT_BYTES, build_completion
from tests.support.http_mcp_server import PICTURE

IMAGE = {"type": "image", "mimeType": "image/png", "data": PICTURE}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def result(structured: object, *blocks: dict[str, Any]) -> Any:
    joined = "\n".join(block["text"] for block in blocks if block["type"] == "text")
    return build_completion("1", ToolResult(False, joined, structured, list(blocks))).result


@pytest.mark.parametrize(
    ("structured", "blocks"),
    [
        ({"rows": [1, 2]}, []),
        ({"rows": [1, 2]}, [text('{\n  "rows": [\n    1,\n    2\n  ]\n}')]),
        ({"rows": [1, 2]}, [text("")]),
        ({"result": 3}, [text("3")]),
        ({"result": "hello"}, [text("hello")]),
        ({"result": [1, 2]}, [text("1"), text("2")]),
        ({"result": [1, 2]}, [text("[1, 2]")]),
    ],
)
def test_structured_content_is_stored_alone_where_the_text_only_repeats_it(
    structured: dict[str, Any], blocks: list[dict[str, Any]]
) -> None:
    assert result(structured, *blocks) == structured


def test_other_text_and_images_are_stored_beside_structured_content() -> None:
    rows = {"rows": [1, 2]}
    both = {"structuredContent": rows, "content": [text("Two rows."), IMAGE]}
    assert result(rows, text("Two rows."), IMAGE) == both
    assert result(rows, text('{"rows":[1,2]}'), IMAGE) == {"structuredContent": rows, "content": [IMAGE]}
    assert result([1, 2], text("[1, 2]")) == {"structuredContent": [1, 2]}
    assert result(None, IMAGE) == {"content": [IMAGE]}


def test_a_truncated_result_has_the_beginning_and_a_note_for_each_image() -> None:
    truncated = result({"rows": ["é" * 50_000]}, text("Many rows."), {**IMAGE, "data": "A" * 80_000})
    assert truncated["truncated"] is True
    assert truncated["full_bytes"] > 180_000
    assert truncated["text"].startswith('{"rows":["éé')
    assert len(msgspec.json.encode(truncated)) <= RESULT_BYTES
    truncated = result({"rows": 1}, text("Many rows."), {**IMAGE, "data": "A" * 80_000})
    assert truncated["text"] == '{"rows":1}\nMany rows.\n[image, image/png: 80000 base64 characters, omitted]'
