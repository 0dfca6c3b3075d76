"""What a log says about its runs, on every backend."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from agent_chat.server.reading.queries import find_turn, is_in_run, read_run_events
from agent_chat.stores.contracts import EventLog
from agent_chat.stores.events import (
    Event,
    MessageCreated,
    MessageDelta,
    MessageSnapshot,
    RunCompleted,
    RunFailed,
    RunStarted,
    ThreadUpdated,
    ToolCallProgress,
    terminal_event,
)
from agent_chat.stores.fold import fold
from agent_chat.stores.models import new_id
from tests.support.log_reading import (
    build_turn,
    decoded,
    publish_all,
)
from tests.support.samples import (
    Lose,
    completed,
    failed,
    new_message,
    new_principal,
    new_thread,
    publish,
    rest,
    turn,
)


async def test_find_turn_returns_the_position_after_which_the_turn_is_read(log: EventLog) -> None:
    thread_id = new_id()
    first, one, first_events = build_turn(thread_id)
    second, two, second_events = build_turn(thread_id)
    await publish(log, thread_id, *first_events, *second_events)
    for question, answer, events in ((first, one, first_events + second_events), (second, two, second_events)):
        for run_id in (answer.id, None):
            position = await find_turn(log, thread_id, question.id, run_id)
            assert position is not None
            assert decoded(await rest(log, thread_id, position)) == events


async def test_find_turn_returns_the_position_before_a_message_that_started_no_run(log: EventLog) -> None:
    thread_id = new_id()
    note = MessageCreated(new_message(thread_id, role="system"))
    _, _, events = build_turn(thread_id)
    await publish(log, thread_id, *events[:4], note, *events[4:])
    position = await find_turn(log, thread_id, note.message.id, None)
    assert position is not None
    assert decoded(await rest(log, thread_id, position)) == [note, *events[4:]]


async def test_find_turn_distinguishes_the_runs_of_one_user_message(log: EventLog) -> None:
    thread_id = new_id()
    question, one = turn(thread_id)
    _, two = turn(thread_id)
    start = await log.tail(thread_id)
    await publish(
        log, thread_id, MessageCreated(question), RunStarted(one), terminal_event(failed(one, retryable=True))
    )
    between = await log.tail(thread_id)
    assert await find_turn(log, thread_id, question.id, two.id) is None
    await publish(log, thread_id, MessageCreated(question))
    assert await find_turn(log, thread_id, question.id, two.id) is None
    await publish(log, thread_id, RunStarted(two), RunCompleted(completed(two)))
    assert await find_turn(log, thread_id, question.id, one.id) == start
    assert await find_turn(log, thread_id, question.id, two.id) == between
    assert await find_turn(log, thread_id, question.id, None) == start


async def test_find_turn_returns_the_first_publication_of_a_message(log: EventLog) -> None:
    thread_id = new_id()
    question, answer, events = build_turn(thread_id)
    start = await log.tail(thread_id)
    await publish(log, thread_id, *events[:-1], MessageCreated(question), events[-1])
    assert await find_turn(log, thread_id, question.id, answer.id) == start
    assert await find_turn(log, thread_id, question.id, None) == start


async def test_find_turn_returns_none_for_what_the_log_does_not_contain(log: EventLog, lose: Lose) -> None:
    thread_id = new_id()
    question, answer, events = build_turn(thread_id)
    for run_id in (answer.id, None):
        assert await find_turn(log, thread_id, question.id, run_id) is None
    await publish(log, thread_id, *events)
    for run_id in (answer.id, None):
        assert await find_turn(log, thread_id, new_id(), run_id) is None
        assert await find_turn(log, new_id(), question.id, run_id) is None
    assert await find_turn(log, thread_id, answer.id, None) is None
    assert await find_turn(log, thread_id, question.id, new_id()) is None
    await lose()
    for run_id in (answer.id, None):
        assert await find_turn(log, thread_id, question.id, run_id) is None


@pytest.mark.slow
async def test_find_turn_returns_none_for_what_was_trimmed(log: EventLog) -> None:
    thread_id = new_id()
    question, answer, events = build_turn(thread_id)
    await publish(log, thread_id, *events)
    await publish(log, thread_id, *[ToolCallProgress("m", "call_0", 0, n, None, None) for n in range(12_000)])
    for run_id in (answer.id, None):
        assert await find_turn(log, thread_id, question.id, run_id) is None


async def is_in_run_after_each(log: EventLog, *events: Event) -> list[bool]:
    """`in_run` at the log's start and at each event's position, asked when all have been results."""
    thread_id = new_id()
    start, entries = await publish_all(log, thread_id, *events)
    return [await is_in_run(log, thread_id, position) for position in [start] + [entry.position for entry in entries]]


async def test_a_position_is_in_a_run_from_the_user_message_to_the_terminal_event(log: EventLog) -> None:
    _, _, events = build_turn("thread")
    expected = [False] + [True] * (len(events) - 1) + [False]
    assert await is_in_run_after_each(log, *events) == expected
    assert await is_in_run_after_each(log, *events, *build_turn("thread")[2]) == expected + expected[1:]


@pytest.mark.parametrize("ending", ["completed", "failed", "cancelled"])
async def test_every_terminal_event_ends_the_run(log: EventLog, ending: str) -> None:
    question, answer = turn("thread")
    error = {"code": "agent_failed", "detail": "It broke.", "retryable": False}
    final = terminal_event(answer.with_run(status=ending, error=error))
    assert (await is_in_run_after_each(log, MessageCreated(question), RunStarted(answer), final))[-1] is False


async def test_facts_about_the_thread_and_stored_messages_neither_begin_nor_end_a_run(log: EventLog) -> None:
    _, _, events = build_turn("thread")
    facts: list[Event] = [
        ThreadUpdated(new_thread(new_principal())),
        MessageCreated(new_message("thread", "note", "assistant")),
        MessageCreated(new_message("thread", "note", "system")),
    ]
    assert await is_in_run_after_each(log, *facts) == [False] * 4
    assert (await is_in_run_after_each(log, *events[:3], *facts))[-3:] == [True] * 3
    assert (await is_in_run_after_each(log, *events, *facts))[-3:] == [False] * 3


async def test_a_snapshot_of_a_running_message_is_within_its_run(log: EventLog) -> None:
    _, answer = turn("thread")
    assert await is_in_run_after_each(log, MessageSnapshot(answer), MessageDelta(answer.id, 0, "a")) == [
        False,
        True,
        True,
    ]


async def test_events_of_a_paused_worker_after_the_terminal_event_do_not_begin_the_run_again(log: EventLog) -> None:
    question, answer = turn("thread")
    late: list[Event] = [MessageDelta(answer.id, 0, "late"), MessageSnapshot(answer)]
    results = await is_in_run_after_each(
        log, MessageCreated(question), RunStarted(answer), RunCompleted(completed(answer)), *late
    )
    assert results == [False, True, True, False, False, False]


async def test_a_user_message_published_again_before_run_failed_begins_no_other_run(log: EventLog) -> None:
    question, answer = turn("thread")
    end = terminal_event(failed(answer, retryable=True))
    results = await is_in_run_after_each(
        log, MessageCreated(question), RunStarted(answer), MessageCreated(question), end
    )
    assert results == [False, True, True, True, False]


async def test_a_late_terminal_event_does_not_end_the_next_run(log: EventLog) -> None:
    first, one = turn("thread")
    second, two = turn("thread")
    end = RunCompleted(completed(one))
    begin: list[Event] = [MessageCreated(first), RunStarted(one)]
    results = await is_in_run_after_each(log, *begin, MessageCreated(second), end, RunStarted(two))
    assert results == [False, True, True, True, True, True]
    results = await is_in_run_after_each(log, *begin, MessageCreated(second), RunStarted(two), end)
    assert results == [False, True, True, True, True, True]


async def run_events(log: EventLog, run_id: str, *events: Event, upto: int | None = None) -> list[Event]:
    """`run_events` of a log of these events, up to and including the one numbered `upto`, or all."""
    thread_id = new_id()
    _, entries = await publish_all(log, thread_id, *events)
    return await read_run_events(log, thread_id, run_id, entries[-1 if upto is None else upto].position)


async def test_run_events_are_those_of_the_run_from_its_start_to_the_position(log: EventLog) -> None:
    _, one, before = build_turn("thread")
    _, two, events = build_turn("thread")
    fact = ThreadUpdated(new_thread(new_principal()))
    thread = [*before, *events[:3], fact, *events[3:]]
    running = len(before) + 5
    assert await run_events(log, two.id, *thread, upto=running) == events[1:5]
    assert await run_events(log, two.id, *thread, upto=len(before) + 1) == events[1:2]
    assert await run_events(log, two.id, *thread, upto=len(before)) == []
    assert await run_events(log, one.id, *thread, upto=len(before) - 2) == before[1:-1]


async def test_run_events_begin_at_the_newest_snapshot_or_terminal_event(log: EventLog) -> None:
    _, answer = turn("thread")
    snapshot = MessageSnapshot(replace(answer, content="ab"))
    end = RunCompleted(completed(answer))
    early: list[Event] = [RunStarted(answer), MessageDelta(answer.id, 0, "a"), snapshot]
    more = MessageDelta(answer.id, 2, "c")
    assert await run_events(log, answer.id, *early, more) == [snapshot, more]
    assert await run_events(log, answer.id, *early, snapshot, more) == [snapshot, more]
    assert await run_events(log, answer.id, *early, more, end) == [end]
    assert await run_events(log, answer.id, *early, end, more) == [end, more]


async def test_run_events_begin_where_the_log_does_if_it_has_no_whole_message(log: EventLog) -> None:
    events = [MessageDelta("run", 7, "a"), MessageDelta("other", 0, "x"), MessageDelta("run", 8, "b")]
    assert await run_events(log, "run", *events) == [events[0], events[2]]
    assert await run_events(log, "unknown", *events) == []


async def test_run_events_at_the_start_of_a_log_are_none(log: EventLog) -> None:
    thread_id = new_id()
    assert await read_run_events(log, thread_id, "run", await log.tail(thread_id)) == []


async def test_the_fold_of_run_events_has_the_content_of_the_stored_message(log: EventLog) -> None:
    thread_id = new_id()
    _, final, events = build_turn(thread_id, words=50)
    _, entries = await publish_all(log, thread_id, *events[:-1])
    _, bare = turn(thread_id)
    folded = fold(await read_run_events(log, thread_id, final.id, entries[-1].position), bare)
    assert (folded.content, folded.tool_calls) == (final.content, final.tool_calls)


async def test_run_events_of_a_failed_run_contain_its_error(log: EventLog) -> None:
    _, answer = turn("thread")
    end = terminal_event(failed(answer, retryable=True))
    assert isinstance(end, RunFailed)
    assert await run_events(log, answer.id, RunStarted(answer), end) == [end]
