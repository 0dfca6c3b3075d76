"""The decisions that every store makes alike."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from agent_chat.stores.errors import IdempotencyMismatch, ThreadArchived, ThreadBusy
from agent_chat.stores.models import Idempotency, User, hash_of, is_id, new_answer
from agent_chat.stores.rules import (
    KEY_SECONDS,
    PostDecision,
    UsedKey,
    decide_post,
    default_after_creation,
    default_after_deletion,
    default_after_update,
    frees_key,
    granted_bytes,
    key_counts,
    new_key,
    next_timestamp,
)
from tests.support.samples import cancelled, completed, failed, new_agent, new_principal

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
KEY = UsedKey("body", "message", "run", 0.0, free=False)
FREE = replace(KEY, free=True)


@pytest.mark.parametrize(
    ("stamp", "previous", "expected"),
    [
        ("2026-01-31T12:00:00.000Z", None, "2026-01-31T12:00:00.000Z"),
        ("2026-01-31T12:00:00.001Z", "2026-01-31T12:00:00.000Z", "2026-01-31T12:00:00.001Z"),
        ("2026-01-31T12:00:00.000Z", "2026-01-31T12:00:00.000Z", "2026-01-31T12:00:00.001Z"),
        ("2025-01-31T12:00:00.000Z", "2026-12-31T23:59:59.999Z", "2027-01-01T00:00:00.000Z"),
    ],
    ids=["first", "later", "equal", "earlier"],
)
def test_a_time_is_moved_past_its_predecessor(stamp: str, previous: str | None, expected: str) -> None:
    assert next_timestamp(stamp, previous) == expected


@pytest.mark.parametrize(("age", "expected"), [(0, True), (KEY_SECONDS - 1, True), (KEY_SECONDS, False)])
def test_a_key_counts_for_24_hours(age: int, expected: bool) -> None:
    assert key_counts(Idempotency("key", "body"), "body", 1000.0, 1000.0 + age) is expected


def test_a_key_with_another_body_is_refused_while_it_counts() -> None:
    with pytest.raises(IdempotencyMismatch):
        key_counts(Idempotency("key", "body"), "another body", 1000.0, 1000.0)
    assert key_counts(Idempotency("key", "body"), "another body", 1000.0, 1000.0 + KEY_SECONDS) is False


@pytest.mark.parametrize("starts_run", [True, False])
@pytest.mark.parametrize("archived", [True, False])
@pytest.mark.parametrize("running", ["another run", None])
def test_a_used_key_is_replayed_whatever_the_thread_is(starts_run: bool, archived: bool, running: str | None) -> None:
    assert decide_post("thread", KEY, archived=archived, running=running, starts_run=starts_run) == "replay"


@pytest.mark.parametrize("key", [None, FREE])
@pytest.mark.parametrize("starts_run", [True, False])
def test_an_archived_thread_takes_no_message(key: UsedKey | None, starts_run: bool) -> None:
    with pytest.raises(ThreadArchived):
        decide_post("thread", key, archived=True, running="run", starts_run=starts_run)


@pytest.mark.parametrize("key", [None, FREE])
def test_a_busy_thread_is_not_claimed_but_takes_messages_that_start_no_run(key: UsedKey | None) -> None:
    with pytest.raises(ThreadBusy) as refusal:
        decide_post("thread", key, archived=False, running="another run", starts_run=True)
    assert refusal.value.message_id == "another run"
    assert decide_post("thread", key, archived=False, running="another run", starts_run=False) == "store"


@pytest.mark.parametrize(
    ("key", "starts_run", "expected"),
    [(None, True, "store"), (None, False, "store"), (FREE, True, "retry"), (FREE, False, "store")],
)
def test_a_free_key_retries_its_first_message_only_with_a_run(
    key: UsedKey | None, starts_run: bool, expected: PostDecision
) -> None:
    assert decide_post("thread", key, archived=False, running=None, starts_run=starts_run) == expected


def test_only_a_failure_that_may_be_retried_frees_its_key() -> None:
    answer = new_answer("thread", "question", None, "2026-01-31T12:00:00.000Z")
    assert frees_key(failed(answer, retryable=True))
    for finished in (failed(answer, retryable=False), completed(answer), cancelled(answer), answer):
        assert not frees_key(finished)
    assert not frees_key(replace(answer, metadata={}))


def test_a_new_agent_is_the_default_if_it_says_so_or_is_the_first() -> None:
    agent = new_agent(new_principal())
    assert default_after_creation(None, agent) == agent.id
    assert default_after_creation("another", agent) == "another"
    assert default_after_creation("another", replace(agent, is_default=True)) == agent.id


@pytest.mark.parametrize(
    ("current", "is_default", "expected"),
    [
        ("another", None, "another"),
        ("agent", None, "agent"),
        (None, None, None),
        ("another", True, "agent"),
        ("another", False, "another"),
        ("agent", False, None),
        (None, False, None),
    ],
)
def test_an_update_changes_the_default_only_where_it_mentions_it(
    current: str | None, is_default: bool | None, expected: str | None
) -> None:
    assert default_after_update(current, "agent", is_default) == expected


def test_the_oldest_remaining_agent_replaces_a_deleted_default() -> None:
    assert default_after_deletion("agent", "agent", "oldest") == "oldest"
    assert default_after_deletion("agent", "agent", None) is None
    assert default_after_deletion("another", "agent", "oldest") == "another"
    assert default_after_deletion(None, "agent", "oldest") is None


def test_a_keys_record_has_the_hash_and_a_hint_of_its_secret() -> None:
    key = new_key(User("user", "organization", "Ada", "2026"), "a-long-secret", "environment", NOW)
    assert is_id(key.id)
    assert (key.organization_id, key.user_id, key.source) == ("organization", "user", "environment")
    assert (key.hash, key.hint) == (hash_of("a-long-secret"), "…cret")
    assert (key.created_at, key.revoked_at) == ("2026-01-31T12:00:00.000Z", None)


@pytest.mark.parametrize(("stored", "expected"), [(0, 50), (50, 50), (70, 30), (90, 10), (91, 0), (100, 0), (200, 0)])
def test_bytes_are_granted_as_far_as_the_limit_allows(stored: int, expected: int) -> None:
    assert granted_bytes(stored, need=10, want=50, limit=100) == expected
