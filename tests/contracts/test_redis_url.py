"""The URL of Redis: what no connection takes is told when the log is opened, with the setting's name."""

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
async def test_a_url_that_no_connection_takes_is_refused_in_one_line(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match=r"^CHAT_EVENTS_URL: this Redis URL is not understood: ") as told:
        async with open_backends(Where(tmp_path, events_url=url)):
            pass
    assert "\n" not in str(told.value)
