"""The reducer: the message is the same whatever events are repeated, late or cut differently (I22, I23)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from agent_chat.stores.events import (
    Event,
    MessageSnapshot,
    RunCompleted,
    RunStarted,
    ThreadDeleted,
    ToolCallProgress,
    join_deltas,
)
from agent_chat.stores.fold import Fold, fold
from agent_chat.stores.models import Message, ToolCall
from tests.support.run_events import (
    EMPTY,
    NOT_STORING,
    NOW,
    a_run,
    delta,
    ended,
    in_other_pieces,
    read_again,
    repeated,
    started,
    think,
    without_snapshots,
)


def content(events: Sequence[Event]) -> str:
    return fold(events, EMPTY).content


def test_deltas_are_appended() -> None:
    assert content([delta(0, "He"), delta(2, "llo"), delta(5, "!")]) == "Hello!"


def test_applying_a_delta_twice_changes_nothing() -> None:
    assert content([delta(0, "He"), delta(0, "He"), delta(2, "llo"), delta(0, "He"), delta(2, "llo")]) == "Hello"


def test_only_the_new_part_of_an_overlapping_delta_is_appended() -> None:
    assert content([delta(0, "Hel"), delta(1, "ello")]) == "Hello"


def test_a_delta_after_a_missing_one_is_not_applied() -> None:
    assert content([delta(0, "He"), delta(3, "lo")]) == "He"


def test_what_follows_a_missing_delta_is_applied_after_it_arrives() -> None:
    assert content([delta(0, "He"), delta(3, "lo"), delta(2, "l"), delta(3, "lo")]) == "Hello"


def test_an_empty_delta_changes_nothing() -> None:
    assert content([delta(0, ""), delta(0, "a"), delta(1, ""), delta(5, "")]) == "a"


def test_offsets_count_code_points() -> None:
    assert content([delta(0, "😀👩‍👧"), delta(4, "e\u0301"), delta(5, "\u0301!"), delta(7, "?")]) == "😀👩‍👧e\u0301!?"


def test_length_is_the_number_of_code_points_so_far() -> None:
    folding = Fold(replace(EMPTY, content="😀"))
    folding.apply(delta(1, "漢😀"))
    assert folding.length == len(folding.message().content) == 3


def test_fold_continues_the_message_that_it_is_given() -> None:
    base = replace(EMPTY, content="Hel", tool_calls=[ended(0).tool_call])
    folded = fold([delta(0, "He"), delta(2, "llo"), started(0), started(1)], base)
    assert folded.content == "Hello"
    assert folded.tool_calls == [ended(0).tool_call, ToolCall("look", {"n": 1}, start_time=NOW)]


def test_a_tool_call_is_open_until_it_is_completed() -> None:
    folding = Fold(EMPTY)
    folding.apply(started(0))
    assert folding.message().tool_calls == [ToolCall("look", {"n": 0}, None, None, NOW, None)]
    folding.apply(ended(0))
    assert folding.message().tool_calls == [ended(0).tool_call]


def test_tool_calls_may_end_in_any_order() -> None:
    folded = fold([started(0), started(1), ended(1, 11), ended(0, 10)], EMPTY)
    assert folded.tool_calls == [ended(0, 10).tool_call, ended(1, 11).tool_call]


@pytest.mark.parametrize("again", [started(0), started(0, "other"), ended(0, 2)], ids=["same", "other", "completed"])
def test_a_completed_tool_call_is_never_reopened_or_replaced(again: Event) -> None:
    assert fold([started(0), ended(0), again], EMPTY).tool_calls == [ended(0).tool_call]


def test_a_tool_call_after_a_missing_one_is_not_applied() -> None:
    assert fold([started(1), ended(1), ended(0)], EMPTY).tool_calls == []


def test_blocks_of_reasoning_have_their_places_among_text_and_calls() -> None:
    events: list[Event] = [
        think(0, "Hm, "),
        think(0, "well 😀", offset=4),
        delta(0, "He"),
        started(0),
        think(1, "And", after=2),
        ended(0),
        think(1, " then?", after=2, offset=3),
        started(1),
        think(2, "So.", after=2),
        delta(2, "llo"),
    ]
    assert fold(events, EMPTY).reasoning == [
        {"index": 0, "after": 0, "calls": 0, "text": "Hm, well 😀"},
        {"index": 1, "after": 2, "calls": 1, "text": "And then?"},
        {"index": 2, "after": 2, "calls": 2, "text": "So."},
    ]


def test_reasoning_after_a_missing_delta_is_not_applied() -> None:
    assert fold([think(0, "m", offset=1)], EMPTY).reasoning == []
    assert fold([think(1, "hm")], EMPTY).reasoning == []
    assert fold([think(0, "hm", after=1)], EMPTY).reasoning == []
    partial = fold([think(0, "h"), think(0, "!", offset=2), think(0, "hm")], EMPTY)
    assert [block["text"] for block in partial.reasoning or ()] == ["hm"]


def test_a_run_that_does_not_store_reasoning_never_does() -> None:
    events: list[Event] = [RunStarted(NOT_STORING), think(0, "hm"), MessageSnapshot(NOT_STORING), think(1, "so")]
    assert fold(events, NOT_STORING) == NOT_STORING
    assert "reasoning" not in (NOT_STORING.run or {})


def test_what_a_checkpoint_has_of_the_reasoning_is_replaced_where_the_log_begins_anew() -> None:
    checkpoint = fold([think(0, "hm, well")], EMPTY)
    assert fold([RunStarted(EMPTY), think(0, "hm")], checkpoint) == fold([think(0, "hm")], EMPTY)
    assert fold([think(0, "hm, well, so")], checkpoint) == fold([think(0, "hm, well, so")], EMPTY)


def test_progress_and_events_of_the_thread_change_nothing() -> None:
    events: list[Event] = [
        started(0),
        ToolCallProgress(EMPTY.id, "call_0", 0, 1.0, 2.0, "half"),
        ThreadDeleted("thread"),
    ]
    assert fold(events, EMPTY) == fold(events[:1], EMPTY)


def test_the_terminal_event_is_ignored() -> None:
    final = replace(EMPTY, content="something else").with_run(status="completed")
    assert fold([delta(0, "Hello"), RunCompleted(final)], EMPTY).content == "Hello"


@pytest.mark.parametrize("kind", [RunStarted, MessageSnapshot])
def test_a_snapshot_replaces_everything(kind: type[RunStarted] | type[MessageSnapshot]) -> None:
    whole = replace(EMPTY, content="Anew", tool_calls=[ended(0, 7).tool_call])
    folded = fold([delta(0, "Hello"), started(0), started(1), kind(whole), delta(4, "!"), ended(0, 8)], EMPTY)
    assert folded == replace(whole, content="Anew!")


PLACES = [{"id": "toolu_a", "round": 0, "offset": 2}, {"id": "toolu_b", "round": 0, "offset": 2}]
CHECKPOINT = replace(EMPTY, content="Hello", tool_calls=[ended(0).tool_call, ended(1).tool_call]).with_run(
    tool_calls=PLACES, model="model-20260131", usage={"output_tokens": 7}
)


def test_what_a_checkpoint_knows_of_its_run_stays_though_the_log_begins_anew() -> None:
    events: list[Event] = [
        RunStarted(EMPTY),
        delta(0, "He"),
        started(0),
        started(1),
        ended(0),
        ended(1),
        delta(2, "llo"),
    ]
    assert fold(events, CHECKPOINT) == CHECKPOINT
    surplus = fold([*events, started(2), delta(5, "!")], CHECKPOINT)
    assert (surplus.content, len(surplus.tool_calls)) == ("Hello!", 3)
    invented = {"id": "call_2", "round": 2, "offset": 5}
    assert surplus.run == {**(CHECKPOINT.run or {}), "tool_calls": [*PLACES, invented]}


def test_a_log_that_ends_before_the_checkpoint_gives_no_places_of_later_calls() -> None:
    folded = fold([RunStarted(EMPTY), delta(0, "He"), started(0)], CHECKPOINT)
    assert (folded.content, len(folded.tool_calls)) == ("He", 1)
    assert (folded.run or {})["tool_calls"] == PLACES[:1]


def test_what_a_snapshot_knows_of_the_run_is_added_to_an_older_checkpoint() -> None:
    folded = fold([MessageSnapshot(CHECKPOINT), delta(5, "!")], EMPTY.with_run(model=None))
    assert folded == replace(CHECKPOINT, content="Hello!")


def test_fold_changes_neither_its_base_nor_messages_that_it_returned() -> None:
    base = replace(EMPTY, content="a")
    folding = Fold(base)
    early = folding.message()
    for event in (delta(1, "b"), started(0), think(0, "h", after=2)):
        folding.apply(event)
    before = folding.message()
    folding.apply(ended(0))
    folding.apply(think(0, "m", after=2, offset=1))
    assert (base.reasoning, early.reasoning) == ([], [])
    assert [block["text"] for block in before.reasoning or ()] == ["h"]
    assert (base.content, base.tool_calls) == (early.content, early.tool_calls) == ("a", [])
    assert before.tool_calls[0].end_time is None


@pytest.mark.parametrize("seed", range(200))
def test_any_duplication_of_events_with_overlap_gives_the_same_message(seed: int) -> None:
    chance = random.Random(seed)
    events = a_run(chance)
    expected: Message = fold(events, EMPTY)
    assert fold(read_again(events, chance), EMPTY) == expected
    assert fold(join_deltas(events), EMPTY) == expected
    assert fold(in_other_pieces(events, chance), EMPTY) == expected
    bare = without_snapshots(events)
    assert fold(bare, EMPTY) == expected
    assert fold(repeated(bare, chance), EMPTY) == expected
    assert fold(bare, fold(events[: chance.randrange(len(events))], EMPTY)) == expected
