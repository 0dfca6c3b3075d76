"""What authentication keeps in memory: lookups for a few seconds, failures per address, both bounded."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_chat.server.http import auth_failures
from agent_chat.server.http.auth_failures import AuthFailures
from agent_chat.server.http.hosts import default_hosts, is_allowed
from agent_chat.server.principals import Credential, Principals
from agent_chat.stores.contracts import Store
from agent_chat.stores.models import User
from agent_chat.stores.sqlite.store import open_sqlite


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_sqlite(tmp_path / "chat.db")
    try:
        yield opened
    finally:
        await opened.close()


@pytest.fixture
async def user(store: Store) -> User:
    return await store.create_user((await store.create_organization("Acme")).id, "Ada")


async def test_a_lookup_is_used_for_a_few_seconds_and_a_revoked_key_ends_with_it(store: Store, user: User) -> None:
    clock = Clock()
    principals = Principals(store, 3.0, clock=clock)
    key = await store.create_key(user, "secret")
    found = await principals.find(Credential("key", "secret"))
    assert found is not None
    await store.revoke_key(key.id)
    clock.now += 2.9
    assert await principals.find(Credential("key", "secret")) == found
    clock.now += 0.1
    assert await principals.find(Credential("key", "secret")) is None
    assert len(principals) == 0


async def test_a_fresh_check_ends_a_cached_lookup(store: Store, user: User) -> None:
    principals = Principals(store, 1000.0)
    key = await store.create_key(user, "secret")
    await principals.find(Credential("key", "secret"))
    await store.revoke_key(key.id)
    assert await principals.check(Credential("key", "secret")) is None
    assert await principals.find(Credential("key", "secret")) is None


async def test_a_key_is_no_session_and_a_session_no_key(store: Store, user: User) -> None:
    principals = Principals(store, 1000.0)
    await store.create_key(user, "secret")
    await store.create_session("secret", "token", seconds=60)
    assert await principals.find(Credential("key", "secret")) is not None
    assert await principals.find(Credential("session", "token")) is not None
    assert await principals.find(Credential("session", "secret")) is None
    assert await principals.find(Credential("key", "token")) is None
    assert await principals.find(Credential("key", "")) is None


async def test_the_lookups_in_memory_are_bounded_and_failed_ones_are_not_stored(store: Store, user: User) -> None:
    principals = Principals(store, 1000.0, size=4)
    for number in range(20):
        assert await principals.find(Credential("key", f"unknown {number}")) is None
    assert len(principals) == 0
    for number in range(6):
        await store.create_key(user, f"secret {number}")
        assert await principals.find(Credential("key", f"secret {number}")) is not None
    assert len(principals) == 4


def test_failures_are_counted_per_address_and_minute_and_logged_up_to_the_limit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    failures = AuthFailures(3, clock=clock)
    assert [failures.record("192.0.2.1", "key") for _ in range(5)] == [0.0, 0.0, 0.0, 60.0, 60.0]
    assert failures.record("192.0.2.2", "key") == 0.0
    clock.now += 59
    assert failures.record("192.0.2.1", "key") == 1.0
    clock.now += 1
    assert failures.record("192.0.2.1", "key") == 0.0
    assert failures.total == 8
    assert len(caplog.records) == 3 + 1 + 1 + 1
    assert {record.name for record in caplog.records} == {"chat.security"}


def test_one_ipv6_network_is_one_client_and_addresses_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("chat.security").disabled = True
    monkeypatch.setattr(auth_failures, "_MAX_ADDRESSES", 100)
    try:
        failures = AuthFailures(1)
        assert failures.record("2001:db8::1", "key") == 0.0
        assert failures.record("2001:db8::2:3", "key") > 0.0
        assert failures.record("2001:db8:0:1::1", "key") == 0.0
        assert failures.record("::ffff:192.0.2.1", "key") == 0.0
        assert failures.record("192.0.2.1", "key") > 0.0
        for number in range(1000):
            failures.record(f"10.0.{number // 250}.{number % 250}", "key")
        failures.record("x" * 100_000, "key")
        assert len(failures) == 100
    finally:
        logging.getLogger("chat.security").disabled = False


def test_the_host_header_must_name_this_server() -> None:
    assert default_hosts("0.0.0.0") == default_hosts("192.0.2.1") == default_hosts("chat.example") == ()
    for listening in ("127.0.0.1", "localhost", "::1", "127.0.0.5"):
        hosts = default_hosts(listening)
        for name in ("localhost", "LocalHost:8000", "127.0.0.1:1", "[::1]", "[::1]:8000"):
            assert is_allowed(name, hosts), (listening, name)
        for name in ("", "evil.example", "localhost.evil.example", "localhost:80:80", "127.0.0.1.", "[::2]", "[::1]x"):
            assert not is_allowed(name, hosts), (listening, name)
    assert is_allowed("127.0.0.5:8000", default_hosts("127.0.0.5"))
    assert is_allowed("a.chat.example:443", ["*.chat.example"])
    assert not is_allowed("chat.example", ["*.chat.example"])
    assert not is_allowed("evilchat.example", ["*.chat.example"])
    assert is_allowed("anything", ["*"])
