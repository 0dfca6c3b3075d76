"""The usage contract: one row for each run, totals, and rolled-up days (I25)."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from agent_chat.stores.contracts import Store, UsageTotal
from agent_chat.stores.contracts.usage import UsageGroup, UsageRow, build_usage
from agent_chat.stores.models import Principal, new_id
from tests.support.samples import completed, new_principal, started_run, started_thread


@pytest.fixture
def principal() -> Principal:
    return new_principal()


def row(principal: Principal, day: str, tokens: int = 1, *, agent_id: str = "a", model: str | None = "m") -> UsageRow:
    of = (new_id(), principal.organization_id, principal.user_id, agent_id, "thread", model, day, "completed")
    return UsageRow(
        *of,
        input_tokens=tokens,
        output_tokens=0,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=0,
        tool_calls=1,
    )


async def put(store: Store, principal: Principal, *rows: UsageRow) -> None:
    for each in rows:
        await store.delete_record(principal, each.id, each)


async def totals(
    store: Store,
    principal: Principal,
    group_by: UsageGroup = "day",
    *,
    first: str = "2026-01-01",
    last: str = "2026-12-31",
) -> dict[str | None, tuple[int, int, int]]:
    found = await store.sum_usage(principal, first_day=first, last_day=last, group_by=group_by, limit=100, offset=0)
    return {total.key: (total.runs, total.input_tokens, total.tool_calls) for total in found}


async def test_a_run_has_one_row_however_often_its_record_is_deleted(store: Store, principal: Principal) -> None:
    """I25."""
    thread = await started_thread(store, principal)
    answer = completed(await started_run(store, principal, thread.id))
    answer = answer.with_run(usage={"input_tokens": 7, "output_tokens": 3, "cache_read_input_tokens": 2**70, "x": 1})
    await store.finish(principal, answer)
    usage = build_usage(principal, "agent", answer, "2026-11-25")
    await asyncio.gather(*[store.delete_record(principal, answer.id, usage) for _ in range(5)])
    await store.delete_record(principal, answer.id, replace(usage, day="2026-11-26"))
    await store.delete(principal, thread.id)
    found = await store.sum_usage(
        principal, first_day="2026-11-25", last_day="2026-11-26", group_by="day", limit=9, offset=0
    )
    assert found == [UsageTotal("2026-11-25", 1, 7, 3, 0, 0, 0)]


async def test_totals_by_day_agent_model_and_user(store: Store, principal: Principal) -> None:
    colleague, stranger = new_principal(principal.organization_id), new_principal()
    await put(store, principal, row(principal, "2026-01-01", 1), row(principal, "2026-01-02", 2, agent_id="b"))
    await put(store, colleague, row(colleague, "2026-01-02", 4, model=None))
    await put(store, stranger, row(stranger, "2026-01-02", 100))
    assert await totals(store, principal) == {"2026-01-01": (1, 1, 1), "2026-01-02": (2, 6, 2)}
    assert await totals(store, principal, "agent") == {"a": (2, 5, 2), "b": (1, 2, 1)}
    assert await totals(store, principal, "model") == {None: (1, 4, 1), "m": (2, 3, 2)}
    assert await totals(store, principal, "user") == {principal.user_id: (2, 3, 2), colleague.user_id: (1, 4, 1)}
    assert await totals(store, principal, first="2026-01-02") == {"2026-01-02": (2, 6, 2)}
    assert await totals(store, principal, last="2026-01-01") == {"2026-01-01": (1, 1, 1)}
    page = await store.sum_usage(
        principal, first_day="2026-01-01", last_day="2026-01-31", group_by="day", limit=1, offset=1
    )
    assert [total.key for total in page] == ["2026-01-02"]


async def test_rolling_up_changes_no_total_at_any_time(store: Store, principal: Principal) -> None:
    """I25. Three sweepers together, one of which reads the totals after each step."""
    colleague = new_principal(principal.organization_id)
    groups: tuple[UsageGroup, ...] = ("day", "agent", "model", "user")
    for day in ("2026-01-01", "2026-01-02", "2026-06-01"):
        await put(store, principal, *[row(principal, day, n, model=None if n % 2 else "m") for n in range(6)])
        await put(store, colleague, row(colleague, day, 50, agent_id="b"))
    before = [await totals(store, principal, group) for group in groups]

    async def roll_up() -> int:
        count = 0
        while await store.roll_up_usage("2026-03-01"):
            count += 1
            assert [await totals(store, principal, group) for group in groups] == before
        return count

    assert sum(await asyncio.gather(*[roll_up() for _ in range(3)])) >= 1
    assert [await totals(store, principal, group) for group in groups] == before
    assert await store.roll_up_usage("2026-03-01") is False
    await put(store, principal, row(principal, "2026-06-01", 1))
    assert (await totals(store, principal))["2026-06-01"] == (8, 66, 8)
