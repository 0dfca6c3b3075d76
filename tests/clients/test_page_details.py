"""Details of the demo page and its client, which break unseen: the keyboard, a failed request, a deleted agent."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.browser import Visit, reads
from tests.support.client import KEY
from tests.support.servers import Live
from tests.support.services import missing

if TYPE_CHECKING:
    from playwright.async_api import Page, Route

pytestmark = pytest.mark.timeout(40)

CLIENT = Path(__file__).parents[2] / "web_demo" / "client.js"
MARKDOWN = """# A *heading*

Intro with `a*b*c`, __init__ and 2 ** 3:
1. **bold** one
   - inner
2. two

> quoted

| a | b |
|---|---|
| 1 | <b>2</b> |

```js
  let x = `1`;
```

[link](https://example.com/x) 🎈 end"""
GROWN = """
async (markdown) => {
  const { GrowingText } = await import("./growing_text.js");
  const [grown, once] = [new GrowingText(), new GrowingText()];
  const [seen, items] = [[], new Set()];
  let text = "";
  for (const letter of markdown) {
    grown.show((text += letter), true);
    seen.push([...grown.element.children].map((each) => (each.querySelector("pre") ?? each).textContent).join());
    items.add(grown.element.querySelector("li strong")?.firstChild);
  }
  once.show(text, true);
  const kept = grown.element.firstChild;
  grown.show(text + "!", true);
  const html = (each) => each.element.innerHTML.replaceAll(/ (dir|tabindex|data-tip|target|rel)="[^"]*"|\\n(?=<)/g, "");
  const same = html(grown) === html(once).replace("end", "end!");
  return { html: html(once), same, kept: kept === grown.element.firstChild && items.size === 2, seen };
}
"""


HURT = """
let [thrown, seen] = [0, 0];
process.on("unhandledRejection", (error) => { thrown += error.message === "mine"; });
const chat = new ChatClient({ base: BASE, key: KEY });
const { id } = await (await chat.request("POST", "/api/v1/chat/default/threads")).json();
const thread = `/api/v1/chat/default/threads/${id}`;
await new Promise((resolve) => {
  const watching = chat.watch(thread, {
    onStatus() { throw new Error("mine"); },
    onState(state, { type }) {
      seen++;
      if (type === "thread.snapshot" && seen > 1) console.log("reconnected");
      if (type === "run.completed") resolve(watching.close());
      throw new Error("mine");
    },
  });
  chat.post(thread, { content: "2*3" });
});
process.on("exit", () => console.log(thrown === seen + 1));
"""


BUSY = """
import { createServer } from "node:http";
let asked = 0;
const server = createServer((request, response) => {
  asked++;
  response.writeHead(503, { "Retry-After": "60" }).end("{}");
}).listen(0, "127.0.0.1", () => {
  const chat = new ChatClient({ base: `http://127.0.0.1:${server.address().port}` });
  const watching = chat.watch("/thread", {
    onStatus(status) {
      console.log(status);
      setTimeout(() => { watching.close(); server.closeAllConnections(); server.close(); }, 3000);
    },
  });
});
process.on("exit", () => console.log(asked));
"""


async def with_client(script: str) -> list[str]:
    """Run a script with web_demo/client.js in Node; its lines."""
    node = shutil.which("node")
    if not node:
        missing("node is not installed")
    given = f"import {{ ChatClient }} from {json.dumps(CLIENT.as_uri())};\n{script}"
    process = await asyncio.create_subprocess_exec(
        str(node), "--input-type=module", "-e", given, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(20):
        out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode().splitlines()


async def focused(page: Page) -> str:
    """What the element with the focus is: its id, its name, or its text."""
    found: str = await page.evaluate(
        "() => { const e = document.activeElement; return e.id || e.name || e.ariaLabel || e.textContent }"
    )
    return found


async def test_peoples_words_are_shown_as_they_wrote_them(visit: Visit) -> None:
    text = "say def __init__(self):\n    **bold**"
    await visit.choose()
    await visit.page.locator("#input").fill(text)
    await visit.page.keyboard.press("Enter")
    await visit.answer("completed").wait_for()
    await visit.page.reload()
    await visit.answer("completed").wait_for()
    assert await visit.page.locator("article.user .body").inner_text() == text


async def test_markdown_is_rendered_while_it_is_written(visit: Visit, server: Live) -> None:
    await visit.choose()
    await visit.say("say **bold** and `code`\nhold the reader")
    answer = visit.answer("in_progress")
    await reads(answer.locator("strong"), "bold")
    await reads(answer.locator("code"), "code")
    server.gates.release("the reader")
    await visit.answer("completed").wait_for()


async def test_markdown_that_arrives_letter_by_letter_renders_as_the_whole_does(visit: Visit) -> None:
    found = await (await visit.enter()).evaluate(GROWN, MARKDOWN)
    assert found["same"]
    assert found["kept"]
    for part in (
        "<h1>A <em>heading</em></h1>",
        "<p>Intro with <code>a*b*c</code>, <strong>init</strong> and 2 ** 3:</p>",
        "<ol><li><strong>bold</strong> one<ul><li>inner</li></ul></li><li>two</li></ol>",
        "<blockquote><p>quoted</p></blockquote>",
        "<tbody><tr><td>1</td><td>&lt;b&gt;2&lt;/b&gt;</td></tr></tbody>",
        '<pre><code class="language-js">  let x = `1`;</code></pre>',
        '<p><a href="https://example.com/x">link</a> 🎈 end</p>',
    ):
        assert part in found["html"]
    seen = ["".join(re.findall(r"\w", each)) for each in found["seen"]]
    assert all(after.startswith(before) for before, after in pairwise(seen) if len(before) <= len(after))


async def test_agents_that_cannot_be_loaded_at_first_are_requested_again(visit: Visit) -> None:
    page = visit.page
    visit.expected = ["status of 503"]
    await page.route("**/api/v1/agents?*", lambda route: route.fulfill(status=503, body="{}"))
    await page.goto(f"/?key={KEY}")
    await reads(page.locator("#welcome"), "Trying again")
    assert await page.locator("#starters").is_hidden()
    assert "Make an agent" not in await page.locator("body").inner_text()
    await page.unroute("**/api/v1/agents?*")
    await page.evaluate("() => { dispatchEvent(new Event('online')) }")
    await page.locator("#attach:enabled").wait_for()
    await page.locator("#starters button").first.wait_for()


async def test_a_half_written_text_stays_with_its_thread(visit: Visit) -> None:
    page = visit.page
    await visit.choose()
    await visit.say("say first")
    await visit.answer("completed").wait_for()
    await page.locator("#input").fill("half of the first")
    await page.locator("#new-thread").click()
    await page.locator("#welcome").wait_for()
    assert await page.locator("#input").input_value() == ""
    await page.locator("#input").fill("half of a new one")
    await page.locator("#threads a").click()
    await visit.answer("completed").wait_for()
    assert await page.locator("#input").input_value() == "half of the first"
    await page.locator("#new-thread").click()
    await page.locator("#welcome").wait_for()
    assert await page.locator("#input").input_value() == "half of a new one"


async def test_the_keyboard_moves_in_the_menu_and_comes_back_to_its_button(visit: Visit) -> None:
    page = visit.page
    await visit.choose()
    await visit.say("say hello")
    await visit.answer("completed").wait_for()
    await reads(page.locator("#threads li"), "say hello")
    row = page.locator("#threads li button")
    name = await row.get_attribute("aria-label")
    await row.focus()
    await page.keyboard.press("Enter")
    assert await focused(page) == "Rename"
    await page.keyboard.press("ArrowUp")
    assert await focused(page) == "Delete"
    await page.keyboard.press("ArrowDown")
    await page.keyboard.press("ArrowDown")
    assert await focused(page) == "Archive"
    await page.keyboard.press("Escape")
    await page.locator("#menu-popover").wait_for(state="hidden")
    assert await focused(page) == name
    await page.keyboard.press("Enter")
    await page.keyboard.press("Enter")
    await page.locator("#rename-dialog input").fill("Renamed")
    await page.keyboard.press("Enter")
    await reads(page.locator("#threads li"), "Renamed")
    assert await focused(page) == "What to do with Renamed"
    await page.locator("#thread-menu").click()
    await page.locator("#menu-popover").wait_for()
    await page.locator("#thread-menu").click()
    await page.locator("#menu-popover").wait_for(state="hidden")
    await page.locator("#input").fill("say more")
    await page.locator("#send").click()
    assert await focused(page) == "input"


async def test_a_row_keeps_the_focus_while_the_list_is_fetched_and_moves(visit: Visit, server: Live) -> None:
    page = visit.page
    agent = await visit.choose()
    threads = [await server.thread(agent["id"], title=f"Thread {number}") for number in range(3)]
    async with page.expect_response(re.compile("/threads[?]")):
        await page.evaluate("() => { dispatchEvent(new Event('online')) }")
    await reads(page.locator("#threads li").nth(2), "Thread 0")
    await page.locator("#threads a").nth(2).focus()
    await server.post(threads[0], "say up")
    async with page.expect_response(re.compile("/threads[?]")):
        await page.evaluate("() => { dispatchEvent(new Event('online')) }")
    await reads(page.locator("#threads li").first, "Thread 0")
    assert (await focused(page)).startswith("Thread 0")


async def test_an_answer_costs_no_request_for_the_list(visit: Visit) -> None:
    page = visit.page
    await visit.choose()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "message_limit=0" in request.url else None)
    await visit.say("say quickly")
    await visit.answer("completed").wait_for()
    await reads(page.locator("#threads li"), "say quickly")
    assert len(asked) <= 1


async def test_a_new_agent_is_offered_the_tools_of_the_one_that_is_shown(visit: Visit) -> None:
    page, dialog = visit.page, visit.page.locator("#agent-dialog")
    await visit.enter()
    await reads(page.locator("#welcome-text"), "real tools")
    await page.locator("#new-agent").click()
    assert await dialog.locator("[name=mcp_servers]").input_value() == "demo"
    await dialog.locator("[name=name]").fill("Bare")
    await dialog.locator("[name=kind]").fill("demo")
    await dialog.locator("[name=mcp_servers]").fill("")
    await dialog.locator(".primary").click()
    await reads(page.locator("#welcome-name"), "Bare")
    await reads(page.locator("#welcome-text"), "no tools")


@pytest.mark.parametrize(("place", "notice"), [("/", "Not signed in"), ("/?key=wrong", "This key is not known here")])
async def test_without_a_key_nothing_behind_the_notice_takes_the_focus(visit: Visit, place: str, notice: str) -> None:
    visit.expected = ["status of 401"]
    await visit.page.goto(place)
    await visit.page.locator("#signed-out").wait_for()
    assert await visit.page.locator("h1:focus").inner_text() == notice
    assert await visit.page.locator("aside[inert], main[inert]").count() == 2
    assert "wrong" not in visit.page.url


async def test_a_deleted_agents_thread_can_be_read_but_not_written_in(visit: Visit, server: Live) -> None:
    page = visit.page
    visit.expected = ["status of 404"]
    agent = await visit.choose()
    await visit.say("say still here")
    await visit.answer("completed").wait_for()
    await reads(page.locator("#title"), "say still here")  # else the request for a title would find the agent deleted
    await server.http.delete(f"/api/v1/agents/{agent['id']}")
    await page.reload()
    await visit.answer("completed").wait_for()
    await page.get_by_placeholder("This agent was deleted").wait_for()
    assert await page.locator("#input").is_disabled()
    await page.goto("/#/00000000-0000-4000-8000-000000000000")
    await page.wait_for_url(lambda url: "00000000" not in url)
    await page.locator("#attach:enabled").wait_for()


async def test_nothing_is_shown_as_empty_before_the_response_arrives(visit: Visit) -> None:
    page = visit.page
    await visit.choose()
    await visit.say("say hello")
    await visit.answer("completed").wait_for()
    answers = asyncio.Event()

    async def hold(route: Route) -> None:
        await answers.wait()
        await route.continue_()

    await page.route(re.compile(r"/threads(\?|/.*/events)"), hold)
    await page.reload()
    await reads(page.locator("#no-threads"), "Loading…")
    await reads(page.locator("#loading"), "Loading…")
    await reads(page.locator("#light"), "Connecting")
    assert await page.locator("#welcome").is_hidden()
    answers.set()
    await visit.answer("completed").wait_for()
    await page.locator("#threads li").wait_for()


async def test_what_is_only_drawn_has_a_name(visit: Visit, server: Live) -> None:
    page = visit.page
    await visit.choose(name="Helper", mcp_servers=["demo"])
    await visit.say('tool calculate {"expression": "1/0"}\nhold the name\nopen other')
    await page.get_by_role("article", name="You").wait_for()
    await page.get_by_role("article", name="Helper").wait_for()
    await page.get_by_role("img", name="Failed").wait_for()
    server.gates.release("the name")
    await visit.answer("completed").wait_for()


async def test_the_clients_own_example_runs(server: Live) -> None:
    example = [line[7:] for line in CLIENT.read_text(encoding="utf-8").splitlines() if line.startswith("//     ")]
    script = "\n".join(example).replace("http://localhost:8000", server.url).replace('"…"', json.dumps(KEY))
    assert any(line.startswith("I am the **demo agent**") for line in await with_client(script))


async def test_errors_in_callbacks_are_reported_and_watching_continues(server: Live) -> None:
    script = HURT.replace("BASE", json.dumps(server.url)).replace("KEY", json.dumps(KEY))
    assert await with_client(script) == ["true"]


async def test_the_client_waits_as_long_as_the_server_requests_and_close_ends_the_wait() -> None:
    assert await with_client(BUSY) == ["reconnecting", "1"]
