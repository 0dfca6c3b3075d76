"""What the reader of files must not trip over: asked of real workers, with limits that show it at once."""

from __future__ import annotations

from pathlib import Path

from server.extraction import Extractor, Limits


async def test_comments_without_an_end_cost_no_time(tmp_path: Path) -> None:
    path = tmp_path / "0"
    path.write_bytes(b"<!---->" * 500 + b"x")
    extractor = Extractor(workers=1, limits=Limits(cpu_seconds=5))
    try:
        found = await extractor.extract(path, "a.txt", None)
    finally:
        await extractor.close()
    assert (found.status, found.content_type) == ("ready", "text/plain")
