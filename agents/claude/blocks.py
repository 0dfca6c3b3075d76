"""Content blocks of the Anthropic Messages API: https://platform.claude.com/docs/en/api/messages"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence

import msgspec

from agent_chat.stores.models import JSONObject

_IMAGES = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/gif": re.compile(rb"GIF8[79]a"),
    "image/webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}


def text_block(text: str) -> JSONObject:
    """Build a text block."""
    return {"type": "text", "text": text}


def json_block(value: object) -> JSONObject:
    """Build a text block that holds a value as JSON."""
    return text_block(msgspec.json.encode(value).decode())


def image_block(data: str) -> JSONObject | None:
    """A block for a picture in base64; None for formats that the API does not accept, judged by the bytes."""
    try:
        head = base64.b64decode(data, validate=True)[:16]
    except (ValueError, binascii.Error):
        return None
    for kind, magic in _IMAGES.items():
        if magic.match(head):
            return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}
    return None


def steady_start(ids: Sequence[str]) -> int:
    """The index at which to begin where not all items fit, oldest first: that of the smallest id in the older half.

    A plain sliding window would begin at another item with each new one, and nothing would stay cached. Ids are random,
    so the smallest one remains the smallest for a quarter of the window on average, until it leaves the window.
    (These are the minimizers of https://doi.org/10.1145/872757.872770.)
    """
    return min(range((len(ids) + 1) // 2), key=ids.__getitem__)
