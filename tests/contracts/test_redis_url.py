"""The URL of Redis: an option that no connection accepts is reported at the start, with the name of the setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_chat.stores.open import Where, open_backends


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1?foo=bar",
        "redis://127.0.0.1?timeout=20",
        "redis://127.0.0.1?db=many",
        "rediss://127.0.0.1?ssl_cert_reqs=perhaps",
        "http://127.0.0.1",
    ],
)
async def test_a_url_that_no_connection_accepts_is_refused_in_one_line(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match=r"^CHAT_EVENTS_URL: this Redis URL is not understood: ") as refused:
        async with open_backends(Where(tmp_path, events_url=url)):
            pass
    assert "\n" not in str(refused.value)
