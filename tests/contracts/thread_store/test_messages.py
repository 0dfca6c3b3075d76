"""Reading the messages of one thread: order, paging, the bound in bytes (I9), and JSON that is returned equal."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from agent_chat.stores.contracts import Store
from agent_chat.stores.errors import MessageNotFound
from agent_chat.stores.models import Message, Principal, Thread, new_id
from tests.contracts.thread_store.calls import read_page
from tests.support.samples import (
    AWKWARD,
    WORKER,
    awkward_call,
    completed,
    exactly,
    ids,
    new_file,
    new_message,
    started_run,
    started_thread,
    turn,
)


async def test_messages_are_paged_backwards(store: Store, principal: Principal, thread: Thread) -> None:
    appended = [new_message(thread.id, str(n), "system") for n in range(10)]
    for message in appended:
        await store.append_message(principal, message)

    async def page_of(before: Message | None, limit: int) -> list[str]:
        return ids(
            (
                await store.list_messages(principal, thread.id, before=before.id if before else None, limit=limit)
            ).messages
        )

    assert await page_of(None, 4) == ids(appended[6:])
    assert await page_of(appended[6], 4) == ids(appended[2:6])
    assert await page_of(appended[2], 4) == ids(appended[:2])
    assert await page_of(appended[0], 4) == []
    assert await page_of(None, 10) == await page_of(None, 99) == ids(appended)


async def test_a_long_thread_is_paged_to_its_beginning(store: Store, principal: Principal, thread: Thread) -> None:
    appended = [new_message(thread.id, str(n), "system") for n in range(230)]
    for message in appended:
        await store.append_message(principal, message)
    found: list[Message] = []
    while older := (
        await store.list_messages(principal, thread.id, before=found[0].id if found else None, limit=40)
    ).messages:
        found = older + found
    assert [message.content for message in found] == [message.content for message in appended]
    assert (await store.get_message(principal, thread.id, appended[0].id)).content == "0"
    with pytest.raises(MessageNotFound):
        await store.list_messages(principal, thread.id, before=new_id(), limit=40)


async def test_a_page_has_the_messages_that_fit_and_paging_continues_before_them(
    store: Store, principal: Principal, thread: Thread
) -> None:
    """I9."""
    stored = [new_message(thread.id, f"{n}" * 100_000, "system") for n in range(9)]
    for message in stored:
        await store.append_message(principal, message)
    found: list[Message] = []
    while True:
        before = found[0].id if found else None
        page = await store.list_messages(principal, thread.id, before=before, limit=100, max_bytes=350_000)
        found = page.messages + found
        assert 1 <= len(page.messages) <= 3
        assert page.cut == (found[0].id != stored[0].id)
        if not page.cut:
            break
    assert ids(found) == ids(stored)
    one = await store.list_messages(principal, thread.id, before=None, limit=2, max_bytes=1)
    assert (ids(one.messages), one.cut) == (ids(stored[-1:]), True)
    assert not (await store.list_messages(principal, thread.id, before=None, limit=3, max_bytes=350_000)).cut


async def test_a_thread_is_read_with_the_messages_that_fit_and_the_one_in_progress(
    store: Store, principal: Principal, thread: Thread
) -> None:
    answer = await started_run(store, principal, thread.id)
    await store.checkpoint(principal, answer.id, worker=WORKER, partial=replace(answer, content="x" * 200_000))
    later = [new_message(thread.id, "y" * 100_000, "system") for _ in range(5)]
    for message in later:
        await store.append_message(principal, message)
    part = await store.read(principal, thread.id, message_limit=50, max_bytes=350_000)
    assert (ids(part.thread.messages), part.cut) == ([answer.id, *ids(later[2:])], True)
    page = await store.list_messages(principal, thread.id, before=later[1].id, limit=50, max_bytes=350_000)
    assert (ids(page.messages)[1:], page.cut) == (ids([answer, later[0]]), False)
    few = await store.list_messages(principal, thread.id, before=later[0].id, limit=50, max_bytes=150_000)
    assert (ids(few.messages), few.cut) == ([answer.id], True)  # its checkpoint counts, not how it began


async def test_an_unknown_message_or_one_of_another_thread_is_not_found(
    store: Store, principal: Principal, thread: Thread
) -> None:
    elsewhere = new_message((await started_thread(store, principal)).id)
    await store.append_message(principal, elsewhere)
    await store.append_message(principal, new_message(thread.id))
    for message_id in (new_id(), elsewhere.id, "", "nonsense"):
        with pytest.raises(MessageNotFound):
            await store.get_message(principal, thread.id, message_id)
        with pytest.raises(MessageNotFound):
            await store.list_messages(principal, thread.id, before=message_id, limit=5)


async def test_json_of_clients_and_tools_is_returned_equal(store: Store, principal: Principal, thread: Thread) -> None:
    attachment = new_file(thread.id, filename="ü 😀.txt", size=2**40).attachment
    question, answer = turn(thread.id, "nul \x00, 😀, e\u0301, \u2028, \r\n")
    question = replace(question, metadata=AWKWARD, attachments=[attachment], content_html="<p>&amp;</p>")
    await store.claim(principal, question, answer, worker=WORKER)
    partial = replace(answer, content="a\x00😀", tool_calls=[awkward_call(), replace(awkward_call(), result=None)])
    await store.checkpoint(principal, answer.id, worker=WORKER, partial=partial)
    running = (await store.list_messages(principal, thread.id, before=None, limit=2)).messages
    assert exactly(running[1].tool_calls) == exactly(partial.tool_calls)
    final = completed(replace(partial, metadata={**AWKWARD, **partial.metadata}), "a\x00😀").with_run(usage=AWKWARD)
    await store.finish(principal, final)
    for stored in (
        (await store.get(principal, thread.id)).messages,
        (await read_page(store, principal)).threads[0].messages,
        (await store.list_messages(principal, thread.id, before=None, limit=2)).messages,
        [
            await store.get_message(principal, thread.id, question.id),
            await store.get_message(principal, thread.id, answer.id),
        ],
    ):
        for message, wanted in zip(stored, [question, final], strict=True):
            assert exactly(replace(message, created_at="")) == exactly(replace(wanted, created_at=""))
