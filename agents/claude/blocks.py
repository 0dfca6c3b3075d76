"""The blocks of the Anthropic Messages API that this package makes: https://platform.claude.com/docs/en/api/messages"""

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
    return {"type": "text", "text": text}


def json_block(value: object) -> JSONObject:
    return text_block(msgspec.json.encode(value).decode())


def image_block(data: str) -> JSONObject | None:
    """The picture, given in base64, if the API takes its kind; it looks at the bytes, whatever they are called."""
    try:
        head = base64.b64decode(data, validate=True)[:16]
    except (ValueError, binascii.Error):
        return None
    for kind, magic in _IMAGES.items():
        if magic.match(head):
            return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}
    return None


def steady_start(ids: Sequence[str]) -> int:
    """Where to begin with things that don't all fit, oldest first: at the smallest id in the older half.

    A plain sliding window would begin somewhere else with everything new, and nothing would stay cached. Ids are
    random, so the smallest one stays the smallest for a quarter of the window on average, until it slides out; then
    the next begins. (The minimizers of https://doi.org/10.1145/872757.872770.)
    """
    return min(range((len(ids) + 1) // 2), key=ids.__getitem__)
