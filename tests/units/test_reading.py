"""What the reader of files must not trip over: asked of real workers, with limits that show it at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pypdfium2  # type: ignore[import-untyped]
import pytest
from msgspec.structs import replace

from agent_chat.server.files.extraction import LIMITS, Extractor
from agent_chat.server.files.reader import PAGES
from tests.support.documents import FILES, ORG


@pytest.fixture
async def extractor() -> AsyncIterator[Extractor]:
    extractor = Extractor(workers=1, limits=replace(LIMITS, cpu_seconds=5), document_seconds=5)
    yield extractor
    await extractor.close()


async def test_comments_without_an_end_cost_no_time(extractor: Extractor, tmp_path: Path) -> None:
    path = tmp_path / "0"
    path.write_bytes(b"<!---->" * 500 + b"x")
    found = await extractor.extract(ORG, path, "a.txt", None)
    assert (found.status, found.content_type) == ("ready", "text/plain")


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.slow
async def test_of_a_pdf_with_too_many_pages_the_first_are_read_and_that_is_told(
    extractor: Extractor, tmp_path: Path, more: int
) -> None:
    path = tmp_path / "0"
    with pypdfium2.PdfDocument(FILES / "pages.pdf") as hundred, pypdfium2.PdfDocument.new() as many:
        for start in range(0, PAGES + more, 100):
            many.import_pages(hundred, list(range(min(100, PAGES + more - start))))
        many.save(path)
    found = await extractor.extract(ORG, path, "a.pdf", None)
    assert (found.status, found.truncated) == ("ready", bool(more))
    assert found.text.count("Page 100") == PAGES // 100
