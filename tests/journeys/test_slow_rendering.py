"""An answer that waits to be rendered: its run stays its owner's, and is complete in the end."""

from __future__ import annotations

from pathlib import Path

from agent_chat.server.files.content_html import Renderer
from agent_chat.server.timing import Timing
from tests.support.gates import critical
from tests.support.thread_view import status


async def test_a_run_renews_its_lease_while_its_answer_waits_to_be_rendered(
    tmp_path: Path,
) -> None:
    async with critical(tmp_path, timing=Timing(checkpoint=0.05)) as race:
        renderer = race.runner._finisher._render.__self__  # type: ignore[attr-defined]
        assert isinstance(renderer, Renderer)
        thread = await race.live.scripted_thread()
        run = await race.live.start_run(thread, "hold start\nsay " + "*word* " * 100)
        for organization in ("a", "b"):
            await renderer.turns._enter(organization, 1, True)
        renewed, stored = race.store.hold("checkpoint", "before", skip=5), race.store.hold("finish", "after")
        race.live.gates.release("start")
        await renewed.reached()
        assert renderer.turns.waiting == 1
        renewed.release()
        for organization in ("a", "b"):
            renderer.turns._leave(organization)
        await stored.passed()
        answer = await race.live.get(f"{thread}/messages/{run}")
        assert status(answer) == "completed"
        assert "<em>word</em>" in answer["content_html"]


async def test_a_stop_stores_the_answers_that_wait_to_be_rendered(
    tmp_path: Path,
) -> None:
    async with critical(tmp_path, timing=Timing(agent_stop=0.1)) as race:
        renderer = race.runner._finisher._render.__self__  # type: ignore[attr-defined]
        thread = await race.live.scripted_thread()
        run = await race.live.start_run(thread, "hold start\nsay " + "*word* " * 100)
        for organization in ("a", "b"):
            await renderer.turns._enter(organization, 1, True)
        waiting = race.store.hold("checkpoint", "before")
        race.live.gates.release("start")
        await waiting.reached()
        waiting.release()
        await race.runner.drain(0.1)
        answer = await race.live.get(f"{thread}/messages/{run}")
        for organization in ("a", "b"):
            renderer.turns._leave(organization)
        assert status(answer) == "completed"
        assert answer["content"] == "*word* " * 100
        assert answer["content_html"].startswith("<pre>*word*")
