"""The demo page in a real browser: what a newcomer does, and what may happen to them meanwhile."""

from __future__ import annotations

import asyncio
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.browser import CUT, Desk, Visit, comes_to, reads, text_of
from tests.support.client import KEY
from tests.support.proxy import HTTPProxy
from tests.support.servers import Live, live_server, server_process

if TYPE_CHECKING:
    from playwright.async_api import Page


def held(*gates: str) -> str:
    """A script of counting that waits at these gates."""
    script = ["say 🎈😀 "]
    for gate in gates:
        script += ["count 40 2", f"say before {gate} ", f"hold {gate}"]
    return "\n".join([*script, "count 40 2"])


async def exact(visit: Visit, page: Page | None = None) -> None:
    """The answer is shown as it is stored, and all that was shown on the way was a beginning of it, ever longer."""
    content = (await visit.stored())["content"].strip()
    assert await text_of(visit.answer("completed", page)) == content
    samples = [sample.strip() for sample in await visit.samples(page)]
    assert samples
    assert all(content.startswith(sample) for sample in samples)
    assert all(len(before) <= len(after) for before, after in pairwise(samples))


async def test_a_question_is_answered_with_a_tool_and_gets_a_title(visit: Visit) -> None:
    page = await visit.enter()
    await page.get_by_text("What time is it in Tokyo?").click()
    await visit.answer("completed").wait_for()
    card = page.locator(".tool[data-status=done]")
    await reads(card, "current_time")
    await reads(card, "Asia/Tokyo")
    await reads(page.locator("article.assistant strong"), re.compile(r"^\d\d:\d\d$"))
    await reads(page.locator("#title"), "What time is it in Tokyo?")
    await reads(page.locator("#threads a[aria-current=page]"), "What time is it in Tokyo?")
    await card.locator("summary").click()
    await reads(card.locator("pre").first, '"timezone": "Asia/Tokyo"')
    order = await page.locator("article.assistant .body > *").evaluate_all("all => all.map((each) => each.className)")
    assert order == ["plain", "tool", "plain"]


async def test_a_slow_tool_shows_its_progress_and_escape_stops_the_run(visit: Visit) -> None:
    page = visit.page
    await visit.choose(mcp_servers=["demo"])
    await visit.say('tool slow_task {"seconds": 100, "steps": 500}')
    await page.locator(".tool[data-status=running] progress[value]").wait_for()
    await page.locator("#stop").wait_for()
    await page.keyboard.press("Escape")
    await visit.answer("cancelled").wait_for()
    await reads(page.locator(".ending"), "Stopped")
    await page.locator(".tool[data-status=failed]").wait_for()
    await page.locator("#send").wait_for()
    assert (await visit.stored())["metadata"]["run"]["status"] == "cancelled"


async def test_the_stop_button_leaves_the_partial_answer(visit: Visit) -> None:
    await visit.choose()
    await visit.say("count 5000 5")
    await reads(visit.answer("in_progress"), "20 21")
    await visit.page.locator("#stop").click()
    answer = visit.answer("cancelled")
    await answer.wait_for()
    assert await text_of(answer) == (await visit.stored())["content"].strip()


async def test_a_reload_in_mid_answer_shows_all_of_it(visit: Visit, server: Live) -> None:
    await visit.choose()
    await visit.say(held("reload"))
    await reads(visit.answer("in_progress"), "before reload")
    await visit.page.reload()
    await reads(visit.answer("in_progress"), "before reload")
    server.gates.release("reload")
    await visit.answer("completed").wait_for()
    await exact(visit)


async def test_a_cut_network_in_mid_answer_heals_without_a_lost_or_doubled_character(desk: Desk, server: Live) -> None:
    async with HTTPProxy(server.port, [2500]) as proxy, desk.visit(server, base_url=proxy.url) as visit:
        visit.expected = [CUT.pattern]
        await visit.choose()
        await visit.say(held("cut", "return"))
        await reads(visit.answer("in_progress"), "before cut")
        assert proxy.cuts == 1
        before = len(proxy.streams)
        async with proxy.down():
            await reads(visit.page.locator("#light"), "Reconnecting")
            server.gates.release("cut")
            await server.gates.reached("return")
        await reads(visit.page.locator("#light"), "Live")
        await reads(visit.answer("in_progress"), "before return")
        server.gates.release("return")
        await visit.answer("completed").wait_for()
        await exact(visit)
        resumed = ["?after=" in head for head in proxy.streams[before:]]
        assert resumed, "it came back"
        assert all(resumed), "with its position: not so perhaps after the first cut, which may have left it none"


async def test_a_browser_that_was_offline_reconnects_immediately(visit: Visit, server: Live) -> None:
    visit.expected = [CUT.pattern]
    await visit.choose()
    await visit.say(held("offline"))
    await reads(visit.answer("in_progress"), "before offline")
    await visit.context.set_offline(True)
    await reads(visit.page.locator("#light"), "Offline")
    server.gates.release("offline")
    await visit.context.set_offline(False)
    await visit.answer("completed").wait_for()
    await exact(visit)


@pytest.mark.timeout(120)  # two processes start, and the page waits longer after each failure
async def test_a_server_killed_in_mid_answer_heals_and_the_answer_can_be_tried_again(
    desk: Desk, tmp_path: Path
) -> None:
    async with server_process(tmp_path) as server, desk.visit(server) as visit:
        visit.expected = [CUT.pattern]
        await visit.choose()
        await visit.say("count 40 2\nhold the kill")  # nobody lets it go on: it is there until the server dies
        await reads(visit.answer("in_progress"), "20 21")
        await server.stop()
        await reads(visit.page.locator("#light"), "Reconnecting")
        await server.start()
        await reads(visit.page.locator("#light"), "Live")
        failed = visit.answer("failed")
        await failed.wait_for()
        assert await text_of(failed) == (await visit.stored())["content"].strip()
        await visit.page.get_by_text("Try again").click()
        await reads(visit.answer("in_progress"), "38 39")
        await visit.page.locator("#stop").click()
        await visit.answer("cancelled").wait_for()
        assert await text_of(visit.answer("cancelled")) == (await visit.stored())["content"].strip()
        await visit.say("say and on it goes")
        await visit.answer("completed").wait_for()
        assert await text_of(visit.answer("completed")) == (await visit.stored())["content"].strip()


async def test_two_tabs_show_the_same(visit: Visit, server: Live) -> None:
    await visit.choose()
    await visit.say(held("tab"))
    await reads(visit.answer("in_progress"), "before tab")
    second = await visit.tab()
    await second.goto(visit.page.url)
    await reads(visit.answer("in_progress", second), "before tab")
    server.gates.release("tab")
    await asyncio.gather(visit.answer("completed").wait_for(), visit.answer("completed", second).wait_for())
    await exact(visit)
    await exact(visit, second)
    await second.locator("#input").fill("say from the second")
    await second.locator("#input").press("Enter")
    await reads(visit.answer("completed"), "from the second")
    await reads(visit.answer("completed", second), "from the second")
    assert await visit.page.locator("article").count() == await second.locator("article").count() == 4


async def menu(page: Page, action: str) -> None:
    await page.locator("#thread-menu").click()
    await page.locator(f"#menu-popover [data-do={action}]").click()


async def test_a_thread_is_renamed_archived_brought_back_and_deleted(visit: Visit) -> None:
    page = visit.page
    await visit.choose()
    await visit.say("say hello")
    await reads(page.locator("#title"), "say hello")
    await menu(page, "rename")
    await page.locator("#rename-dialog input").fill("A better name")
    await page.keyboard.press("Enter")
    await reads(page.locator("#title"), "A better name")
    await reads(page.locator("#threads li"), "A better name")
    await menu(page, "archive")
    await page.locator("#no-threads", has_text="No threads yet.").wait_for()
    await page.locator("#input:disabled").wait_for()
    await page.locator("#show-archived").click()
    await reads(page.locator("#threads li"), "A better name")
    await menu(page, "archive")
    await page.locator("#show-active").click()
    await reads(page.locator("#threads li"), "A better name")
    second = await visit.tab()
    await second.goto(page.url)
    await reads(second.locator("#light"), "Live")
    await menu(page, "delete")
    await page.locator("#confirm-dialog .primary").click()
    await page.locator("#welcome").wait_for()
    await reads(second.locator("#toast"), "This thread was deleted.")
    await second.locator("#welcome").wait_for()
    await page.locator("#no-threads", has_text="No threads yet.").wait_for()
    assert await page.locator("#threads li").count() == 0


async def test_an_agent_is_created_edited_and_deleted(visit: Visit) -> None:
    page, dialog = await visit.enter(), visit.page.locator("#agent-dialog")
    visit.expected = ["status of 422"]
    await page.locator("#new-agent").click()
    await dialog.locator("[name=name]").fill("Helper")
    await dialog.locator("[name=kind]").fill("scripted")
    await dialog.locator("[name=mcp_servers]").fill("demo, nonsense")
    await dialog.locator(".primary").click()
    await reads(dialog.locator(".problem"), "nonsense")
    await dialog.locator("[name=mcp_servers]").fill("demo")
    await dialog.locator(".primary").click()
    await reads(page.locator("#welcome-name"), "Helper")
    await visit.say('tool calculate {"expression": "6*7"}')
    await reads(page.locator(".tool[data-status=done]"), "42")
    await page.locator("#edit-agent").click()
    assert await dialog.locator("[name=mcp_servers]").input_value() == "demo"
    await dialog.locator("[name=name]").fill("Better helper")
    await dialog.locator(".primary").click()
    await page.locator("#agent option", has_text="Better helper").wait_for(state="attached")
    await page.locator("#edit-agent").click()
    await page.locator("#delete-agent").click()
    await page.locator("#confirm-dialog .primary").click()
    await page.locator("#agent option", has_text="Better helper").wait_for(state="detached")
    await reads(page.locator("#welcome-name"), "Demo")


async def test_reasoning_can_be_opened_and_markdown_is_rendered(visit: Visit, server: Live) -> None:
    await visit.choose()
    await visit.say("hold until watched\nthink Let me see\nsay **bold** <b>no tag</b>\nthink Enough")
    await visit.answer("in_progress").wait_for()
    server.gates.release("until watched")
    answer = visit.answer("completed")
    await reads(answer.locator("strong"), "bold")
    await reads(answer.locator(".body"), "<b>no tag</b>")
    await answer.locator("summary").click()
    await reads(answer.locator(".thoughts"), "Let me see")
    await reads(answer.locator(".thoughts"), "Enough")
    await visit.page.reload()
    await reads(answer.locator("strong"), "bold")
    await answer.locator("summary").click()
    assert (await answer.locator(".thoughts").inner_text()).strip() == "Let me see\n\nEnough"


async def test_the_text_is_followed_unless_the_reader_goes_up(visit: Visit, server: Live) -> None:
    page, scroll = visit.page, visit.page.locator("#scroll")
    below = "scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight"
    at_end, left_behind = f"scroll => {below} < 60", f"scroll => {below} > 600"
    await page.set_viewport_size({"width": 600, "height": 400})
    await visit.choose()
    await visit.say("count 800 0\nhold going up\ncount 800 0\nsay said below\nhold coming back\ncount 800 0")
    await reads(visit.answer("in_progress"), "798 799")
    await comes_to(scroll, at_end)
    await page.mouse.move(300, 200)
    await page.mouse.wheel(0, -200)
    await page.locator("#latest").wait_for()
    server.gates.release("going up")
    await reads(visit.answer("in_progress"), "said below")
    await comes_to(scroll, left_behind)
    await page.locator("#latest").click()
    await page.locator("#latest").wait_for(state="hidden")
    await comes_to(scroll, at_end)
    server.gates.release("coming back")
    await visit.answer("completed").wait_for()
    await comes_to(scroll, at_end)


async def test_without_a_key_the_page_explains_how_to_sign_in(desk: Desk, server: Live) -> None:
    async with desk.visit(server) as visit:
        visit.expected = ["status of 401"]
        await visit.page.goto("/")
        await reads(visit.page.locator("#signed-out"), "Open the URL that the server printed")


async def test_it_fits_a_phone(desk: Desk, server: Live) -> None:
    phone: dict[str, Any] = {
        "viewport": {"width": 360, "height": 700},
        "has_touch": True,
        "is_mobile": True,
        "color_scheme": "dark",
        "reduced_motion": "no-preference",
    }
    async with desk.visit(server, **phone) as visit:
        page = await visit.enter()
        await visit.say("What time is it in Tokyo?\nx")
        await page.locator("#send").click()
        await page.locator(".tool[data-status=done]").wait_for()
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360
        await page.locator("#show-sidebar").click()
        await page.locator("#new-thread").click()
        await page.locator("#welcome").wait_for()


async def test_signing_out_ends_the_session_in_every_tab(desk: Desk, server: Live) -> None:
    async with desk.visit(server) as visit:
        visit.expected = ["status of 401"]
        page = visit.page
        await visit.choose()
        await visit.say("say hello")
        await visit.answer("completed").wait_for()
        second = await visit.tab()
        await second.goto("/")
        await second.locator("#attach:enabled").wait_for()
        await page.get_by_role("button", name="Sign out").click()
        await reads(page.locator("h1:focus"), "Not signed in")
        assert page.url == f"{server.url}/"
        await second.evaluate("() => { dispatchEvent(new Event('online')) }")
        await reads(second.locator("#signed-out h1"), "Not signed in")
        assert await page.locator("article").count() == 0
        assert not await visit.context.cookies()


async def test_it_works_under_a_prefix(desk: Desk, tmp_path: Path) -> None:
    async with live_server(tmp_path, root_path="/behind/a/proxy") as server, desk.visit(server) as visit:
        page, elsewhere = visit.page, []
        page.on("request", lambda each: elsewhere.append(each.url) if "/behind/a/proxy/" not in each.url else None)
        agent = await server.agent()
        await page.goto(f"/behind/a/proxy/?key={KEY}#/{agent['id']}")
        await page.locator("#attach:enabled").wait_for()
        picture = tmp_path / "picture.png"
        picture.write_bytes(await page.screenshot())
        await page.locator("#files").set_input_files(picture)
        await page.locator("#drafts img").evaluate("image => image.decode()")
        await page.locator("#send:enabled").wait_for()
        await visit.say("say hello")
        await reads(visit.answer("completed"), "hello")
        await page.locator("article.user img").evaluate("image => image.decode()")
        await page.reload()
        await visit.answer("completed").wait_for()
        assert page.url.startswith(f"{server.url}/behind/a/proxy/#/")
        assert not elsewhere


async def test_the_page_offers_every_agent_however_many_there_are(desk: Desk, tmp_path: Path) -> None:
    async with live_server(tmp_path) as server, desk.visit(server) as visit:
        names = [f"Agent {number}" for number in range(101)]
        for name in names:
            await server.agent(name=name)
        page = await visit.enter()
        offered = await page.locator("#agent option").all_text_contents()
        assert offered[1:] == names
