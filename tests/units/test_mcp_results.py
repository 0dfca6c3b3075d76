"""What is stored of a tool's result: structured content, and the blocks that say more than it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from agent_chat.agents.mcp.connection import Answer
from agent_chat.agents.mcp.results import RESULT_BYTES, completed
from tests.support.http_mcp_server import PICTURE

IMAGE = {"type": "image", "mimeType": "image/png", "data": PICTURE}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def result(structured: object, *blocks: dict[str, Any]) -> Any:
    words = "\n".join(block["text"] for block in blocks if block["type"] == "text")
    return completed("1", Answer(False, words, structured, list(blocks))).result


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


def test_a_result_that_is_too_large_keeps_its_beginning_and_names_its_images() -> None:
    cut = result({"rows": ["é" * 50_000]}, text("Many rows."), {**IMAGE, "data": "A" * 80_000})
    assert cut["truncated"] is True
    assert cut["full_bytes"] > 180_000
    assert cut["text"].startswith('{"rows":["éé')
    assert len(msgspec.json.encode(cut)) <= RESULT_BYTES
    cut = result({"rows": 1}, text("Many rows."), {**IMAGE, "data": "A" * 80_000})
    assert cut["text"] == '{"rows":1}\nMany rows.\n[image, image/png: 80000 base64 characters, left out]'
