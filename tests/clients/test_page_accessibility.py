"""The demo page as axe-core sees it: no violation in any state, in light and dark."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.browser import Visit, reads
from tests.support.servers import Live
from tests.support.services import missing

if TYPE_CHECKING:
    from playwright.async_api import Page

ANSWER = """### A heading that leaves levels out

Text with `code`, [a link](https://example.com) and a footnote[^1].

- [x] done
- [ ] to do

> quoted

| left | right |
|:-----|------:|
| a | b |

```python
print("a line of code that is far too long for its box, so that it can only be read by scrolling in it to the right")
```

###### A small heading

[^1]: Its source.
"""
GIF = "R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
VIOLATIONS = """
async (options) => (await axe.run(document, options)).violations.map(
  ({ id, nodes }) => `${id}: ${nodes.map(({ target, failureSummary }) => `${target} ${failureSummary}`).join("; ")}`
)
"""


async def violations(page: Page, state: str) -> list[str]:
    """What axe-core finds in light and (of colors only) in dark, each with the name of the state."""
    found = [f"{state}: {each}" for each in await page.evaluate(VIOLATIONS, {"resultTypes": ["violations"]})]
    await page.emulate_media(color_scheme="dark")
    found += [f"{state}, dark: {each}" for each in await page.evaluate(VIOLATIONS, {"runOnly": ["color-contrast"]})]
    await page.emulate_media(color_scheme="light")
    return found


async def show_answer(visit: Visit) -> None:
    """An answer with Markdown, an image, a finished and a failed tool call; then an answer that failed."""
    image = json.dumps({"content": [{"type": "image", "data": GIF, "mimeType": "image/gif"}]})
    failed_call = 'tool calculate {"expression": "1/0"}'
    await visit.say(f"text {json.dumps(ANSWER)}\n{failed_call}\nresult draw {image}\ntext {json.dumps(ANSWER)}")
    await reads(visit.answer("completed"), "Its source.")
    await visit.say('text "Well"\noverload Not now.')
    await visit.answer("failed").get_by_role("button", name="Try again").wait_for()
    for summary in await visit.page.locator(".tool summary").all():
        await summary.click()


async def test_no_state_of_the_page_has_a_violation(visit: Visit, server: Live) -> None:
    package = find_spec("axe_playwright_python")
    if not package:
        missing("axe-playwright-python is not installed")
    assert package is not None
    assert package.origin is not None
    visit.expected = ["status of 401"]
    await visit.page.add_init_script(path=Path(package.origin).with_name("axe.min.js"))
    page = await visit.enter()
    await page.locator("#starters button").first.wait_for()
    found = await violations(page, "empty")
    await page.locator("#edit-agent").click()
    found += await violations(page, "agent dialog")
    await page.keyboard.press("Escape")

    await visit.choose(name="Helper", mcp_servers=["demo"])
    await reads(page.locator("#welcome-name"), "Helper")
    await visit.say("say slowly\nhold axe")
    await reads(visit.answer("in_progress"), "slowly")
    await visit.say("impatient")
    await page.locator("#busy").wait_for()
    found += await violations(page, "writing")
    server.gates.release("axe")
    await visit.answer("completed").wait_for()
    await page.locator("#thread-menu").click()
    found += await violations(page, "menu")
    await page.locator("[data-do=rename]").click()
    found += await violations(page, "rename dialog")
    await page.keyboard.press("Escape")
    await page.locator("#thread-menu").click()
    await page.locator("[data-do=delete]").click()
    found += await violations(page, "confirm dialog")
    await page.keyboard.press("Escape")
    await show_answer(visit)
    found += await violations(page, "thread")
    await visit.context.clear_cookies()
    await page.reload()
    await page.locator("#signed-out").wait_for()
    found += await violations(page, "signed out")
    assert not found, "\n".join(found)
