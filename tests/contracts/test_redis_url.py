"""The URL of Redis: what no connection takes is told when the log is opened."""

from __future__ import annotations

import pytest

from stores.redis_log import open_redis_log


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
async def test_a_url_that_no_connection_takes_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(ValueError, match=r"^this Redis URL is not understood: ") as told:
        await open_redis_log(url)
    assert "\n" not in str(told.value)
