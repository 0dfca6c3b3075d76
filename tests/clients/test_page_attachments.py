"""Files in the demo page: chosen, dropped or pasted, uploaded immediately, sent, and downloaded again."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.browser import Visit, reads

CSV = b"berth,depth\n" + b"7,12.5\n" * 100_000
DROP = """
({ name, type, data, event }) => {
  const carried = new DataTransfer();
  const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
  carried.items.add(new File([bytes], name, { type }));
  const place = document.querySelector(event === "paste" ? "#input" : "main");
  const options = { bubbles: true, cancelable: true };
  if (event === "paste") place.dispatchEvent(new ClipboardEvent(event, { ...options, clipboardData: carried }));
  else place.dispatchEvent(new DragEvent(event, { ...options, dataTransfer: carried }));
}
"""
"""What the browser does when a person drags, drops or pastes a file."""


async def bring(visit: Visit, event: str, name: str, content_type: str, data: bytes) -> None:
    file = {"event": event, "name": name, "type": content_type, "data": b64encode(data).decode()}
    await visit.page.evaluate(DROP, file)


@asynccontextmanager
async def slow_line(visit: Visit) -> AsyncIterator[None]:
    """Uploads go at 50 KB a second until the context is left."""
    devtools = await visit.context.new_cdp_session(visit.page)
    line = {"offline": False, "latency": 0, "downloadThroughput": -1}
    await devtools.send("Network.enable")
    await devtools.send("Network.emulateNetworkConditions", {**line, "uploadThroughput": 50_000})
    try:
        yield
    finally:
        await devtools.send("Network.emulateNetworkConditions", {**line, "uploadThroughput": -1})


async def choose_demo(visit: Visit) -> None:
    await visit.choose(kind="demo", metadata={"demo": {"delay_ms": 0}})


async def download(visit: Visit, name: str, folder: Path) -> bytes:
    async with visit.page.expect_download() as waiting:
        await visit.page.locator("article.user a.file", has_text=name).click()
    found = await waiting.value
    assert found.suggested_filename == name
    await found.save_as(folder / "downloaded")
    return (folder / "downloaded").read_bytes()


async def test_files_are_uploaded_immediately_extracted_sent_and_downloaded(visit: Visit, tmp_path: Path) -> None:
    page, chips = visit.page, visit.page.locator("#drafts .file")
    await choose_demo(visit)
    picture, table = tmp_path / "picture ü.png", tmp_path / "berths.csv"
    picture.write_bytes(await page.screenshot())
    table.write_bytes(CSV)
    async with slow_line(visit):
        await page.locator("#files").set_input_files([table, picture])
        await chips.locator("progress[value]").first.wait_for()
        await reads(chips, "% of 684 KB")
        await page.locator("#input").fill("What is in them?")
        assert await page.locator("#send").is_disabled()
    await reads(chips.first, "CSV · cut after 200,000 characters")
    await reads(chips.last, "PNG picture")
    await page.locator("#drafts img").evaluate("image => image.decode()")
    await page.locator("#send:enabled").wait_for()
    await page.locator("#input").press("Enter")
    answer = visit.answer("completed")
    await reads(answer, "200,000 characters of text, cut, which begins: “berth,depth 7,12.5")
    await reads(answer, "a picture, which a model that accepts pictures would be given")
    assert await chips.count() == 0
    assert await download(visit, "berths.csv", tmp_path) == CSV
    assert await download(visit, "picture ü.png", tmp_path) == picture.read_bytes()


async def test_files_are_dropped_pasted_and_removed_and_need_no_text(visit: Visit) -> None:
    page, chips = visit.page, visit.page.locator("#drafts .file")
    await choose_demo(visit)
    picture = await page.screenshot()
    await bring(visit, "dragenter", "notes.md", "", b"")
    await page.locator("#veil").wait_for()
    await bring(visit, "drop", "notes.md", "", b"# The launch is on 3 May")
    await page.locator("#veil").wait_for(state="hidden")
    await bring(visit, "drop", "nothing.bin", "", bytes(range(256)))
    await bring(visit, "paste", "image.png", "image/png", picture)
    await reads(chips, "Markdown · 24 characters")
    await reads(chips, "PNG picture")
    await reads(chips, "Not read. Files of this kind can't be read.")
    await page.get_by_label("Remove nothing.bin").click()
    await page.locator("#send:enabled").click()
    await reads(visit.answer("completed"), "which begins: “# The launch is on 3 May”")
    await page.reload()
    await visit.answer("completed").wait_for()
    names = await page.locator("article.user a.file .name").all_inner_texts()
    assert sorted(names) == ["image.png", "notes.md"]
    assert await page.locator("#threads li").count() == 1


async def test_a_refused_file_shows_the_reason_and_can_be_retried(visit: Visit, tmp_path: Path) -> None:
    page, refused = visit.page, visit.page.locator("#drafts .file[data-status=refused]")
    visit.expected = ["status of 413", "status of 429"]
    await choose_demo(visit)
    huge = tmp_path / "huge.bin"
    with huge.open("wb") as file:
        file.truncate(26 * 2**20)
    await page.locator("#files").set_input_files(huge)
    await reads(refused, "Not uploaded. huge.bin is larger than 25 MB.")
    await reads(page.locator("#toast"), "huge.bin is larger than 25 MB.")
    assert not await refused.get_by_text("Try again").is_visible()
    assert await page.locator("#send").is_disabled()
    await page.get_by_label("Remove huge.bin").click()

    busy = json.dumps({"status": 429, "code": "rate_limited", "detail": "Too many requests."})
    await page.route("**/attachments", lambda route: route.fulfill(status=429, body=busy), times=1)
    await bring(visit, "drop", "a.txt", "", b"x")
    await reads(refused, "Not uploaded. Too many requests.")
    await refused.get_by_text("Try again").click()
    await reads(page.locator("#drafts .file"), "Text · 1 character")
    await page.locator("#send:enabled").wait_for()
