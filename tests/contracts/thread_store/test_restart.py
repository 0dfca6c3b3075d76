"""A store that was closed and opened again has what it acknowledged; embedded runs are orphans (I5)."""

from __future__ import annotations

import pytest

from agent_chat.stores.errors import ThreadBusy
from agent_chat.stores.models import Principal
from tests.contracts.thread_store.calls import PostedIds, claim, posted_ids, read_page, with_content
from tests.support.backends import OpenStore
from tests.support.samples import (
    AWKWARD,
    WORKER,
    cancelled,
    exactly,
    failed,
    idempotent,
    new_message,
    new_thread,
    started_run,
    started_thread,
)


@pytest.mark.usefixtures("embedded")
async def test_every_run_is_an_orphan_after_an_embedded_store_was_reopened(
    open_store: OpenStore, principal: Principal
) -> None:
    async with open_store() as store:
        answers = [await started_run(store, principal, (await started_thread(store, principal)).id) for _ in range(3)]
    async with open_store() as store:
        records = await store.take_orphans("anew")
        assert {record.id for record in records} == {answer.id for answer in answers}
        assert {record.worker for record in records} == {"anew"}
        assert await store.take_orphans("another") == []
        assert await store.checkpoint(principal, answers[0].id, worker=WORKER, partial=None) == "lost"


async def test_a_reopened_store_has_everything_that_was_acknowledged(
    open_store: OpenStore, principal: Principal
) -> None:
    async with open_store() as store:
        thread = (await store.create(principal, new_thread(principal, metadata=AWKWARD), idempotent())).thread
        question, answer, _ = await claim(store, principal, thread.id, idempotent())
        await store.finish(principal, failed(answer, retryable=True))
        await store.delete_record(principal, answer.id)
        note = new_message(thread.id, role="system")
        await store.append_message(principal, note, idempotent("note"))
        running = await started_run(store, principal, thread.id)
        await store.checkpoint(principal, running.id, worker=WORKER, partial=with_content(running, "Hal"))
        await store.cancel(principal, thread.id, running.id)
        before, listed = await store.get(principal, thread.id), await read_page(store, principal)
    async with open_store() as store:
        assert exactly(await store.get(principal, thread.id)) == exactly(before)
        assert exactly(await read_page(store, principal)) == exactly(listed)
        assert (await store.create(principal, new_thread(principal), idempotent())).thread.id == thread.id
        assert posted_ids(await store.replay(principal, thread.id, idempotent("note"))) == PostedIds(
            note.id, None, replayed=True
        )
        assert await store.find_record(principal, answer.id) is None
        record = await store.find_record(principal, running.id)
        assert record is not None
        assert (record.cancelled, record.partial.content) == (True, "Hal")
        with pytest.raises(ThreadBusy):
            await claim(store, principal, thread.id)
        assert (await store.finish(principal, cancelled(running))).won is True
        _, second, posted = await claim(store, principal, thread.id, idempotent())
        assert posted_ids(posted) == PostedIds(question.id, second.id, replayed=False, again=True)
