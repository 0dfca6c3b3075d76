"""Isolation (I1): whatever a stranger calls, another organization's objects are not found and do not change.

A new method of the contracts fails here until it has a case, or is named as the operator's own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import pytest
from msgspec.structs import replace

from agent_chat.stores.contracts import AgentPage, Directory, OutboxStore, Store, ThreadStore
from agent_chat.stores.errors import AgentNotFound, NotFound, ThreadNotFound
from agent_chat.stores.events import ThreadUpdated
from agent_chat.stores.models import Agent, Message, Principal, StoredFile, Thread, User, new_id
from tests.support.backends import OpenStore
from tests.support.samples import (
    AWKWARD,
    WORKER,
    completed,
    exactly,
    finished_run,
    idempotent,
    new_agent,
    new_file,
    new_message,
    new_thread,
    started_run,
    turn,
)

CHAT = "chat-1"
"""The external id of the organization's thread."""


class World(msgspec.Struct, frozen=True):
    """What an organization has: a finished and a running turn, an agent, a user, idempotency keys of every kind."""

    principal: Principal
    user: User
    agent: Agent
    thread: Thread
    finished: Message
    running: Message
    file: StoredFile


async def populate(store: Store) -> World:
    user = await store.create_user((await store.create_organization("Acme")).id, "Ada")
    principal = Principal(user.organization_id, user.id)
    agent = await store.create_agent(principal, new_agent(principal))
    named = new_thread(principal, agent.id, metadata=AWKWARD).with_external_id(CHAT)
    thread = (await store.create(principal, named, idempotent())).thread
    finished = await finished_run(store, principal, thread.id)
    await store.append_message(principal, new_message(thread.id, role="system"), idempotent())
    file = new_file(thread.id)
    await store.add_file(principal, file)
    return World(principal, user, agent, thread, finished, await started_run(store, principal, thread.id), file)


async def everything(store: Store, world: World) -> str:
    """All that the organization's own principal sees, as text."""
    principal = world.principal
    return exactly(
        [
            await store.get(principal, world.thread.id),
            await store.find_thread(principal, world.agent.id, CHAT),
            await store.list_threads(
                principal, world.agent.id, limit=50, offset=0, archived=None, message_limit=50, max_bytes=2**23
            ),
            await store.find_record(principal, world.running.id),
            await store.get_file(principal, world.thread.id, world.file.attachment.id),
            await store.stored_bytes(principal.organization_id),
            await store.replay(principal, world.thread.id, idempotent()),
            await store.list_agents(principal),
            await store.get_agent(principal, None),
            await store.find_organization(principal.organization_id),
            await store.find_user(principal.organization_id, "Ada"),
            await store.find_user(principal.organization_id, "Mallory"),
        ]
    )


Case = Callable[[Store, Principal, World], Awaitable[object]]
Outcome = object
"""An exception's type, or the result."""


class Other:
    """Any result: what the stranger creates belongs to the stranger."""


async def page_threads(store: Store, principal: Principal, world: World) -> list[Thread]:
    return (
        await store.list_threads(
            principal, world.agent.id, limit=50, offset=0, archived=None, message_limit=50, max_bytes=2**23
        )
    ).threads


async def claim(store: Store, principal: Principal, world: World) -> object:
    question, answer = turn(world.thread.id)
    try:
        return await store.claim(principal, question, answer, worker=WORKER, idempotency=idempotent())
    finally:
        assert await store.find_record(world.principal, answer.id) is None


CASES: dict[str, tuple[Case, Outcome]] = {
    "create_user": (lambda store, principal, world: store.create_user(principal.organization_id, "Mallory"), Other),
    "find_user": (lambda store, principal, world: store.find_user(principal.organization_id, world.user.name), None),
    "find_user by id": (
        lambda store, principal, world: store.find_user(principal.organization_id, world.user.id),
        None,
    ),
    "create_agent": (
        lambda store, principal, world: store.create_agent(principal, new_agent(principal, is_default=True)),
        Other,
    ),
    "list_agents": (lambda store, principal, world: store.list_agents(principal), AgentPage([], more=False)),
    "get_agent": (lambda store, principal, world: store.get_agent(principal, world.agent.id), AgentNotFound),
    "get_agent deleted": (
        lambda store, principal, world: store.get_agent(principal, world.agent.id, deleted=True),
        AgentNotFound,
    ),
    "get_agent default": (lambda store, principal, world: store.get_agent(principal, None), AgentNotFound),
    "update_agent": (
        lambda store, principal, world: store.update_agent(
            principal, replace(world.agent, name="Mallory"), is_default=False
        ),
        AgentNotFound,
    ),
    "update_agent of theirs": (
        lambda store, principal, world: store.update_agent(
            principal, replace(world.agent, organization_id=principal.organization_id)
        ),
        AgentNotFound,
    ),
    "delete_agent": (lambda store, principal, world: store.delete_agent(principal, world.agent.id), AgentNotFound),
    "create": (
        lambda store, principal, world: store.create(principal, new_thread(principal, world.agent.id), idempotent()),
        Other,
    ),
    "create with an external id": (
        lambda store, principal, world: store.create(
            principal, new_thread(principal, world.agent.id).with_external_id(CHAT)
        ),
        Other,
    ),
    "find_thread": (lambda store, principal, world: store.find_thread(principal, world.agent.id, CHAT), None),
    "import_thread": (
        lambda store, principal, world: store.import_thread(
            principal,
            replace(new_thread(principal, world.agent.id), id=world.thread.id),
            [new_message(world.thread.id)],
        ),
        False,
    ),
    "scan_threads": (
        lambda store, principal, world: store.scan_threads(principal, user_id=None, agent_id=None, after=None, limit=9),
        [],
    ),
    "get": (lambda store, principal, world: store.get(principal, world.thread.id), ThreadNotFound),
    "read": (lambda store, principal, world: store.read(principal, world.thread.id, message_limit=5), ThreadNotFound),
    "list_threads": (page_threads, []),
    "update": (
        lambda store, principal, world: store.update(principal, world.thread.id, title="x", archived=True),
        ThreadNotFound,
    ),
    "delete": (lambda store, principal, world: store.delete(principal, world.thread.id), ThreadNotFound),
    "list_messages": (
        lambda store, principal, world: store.list_messages(principal, world.thread.id, before=None, limit=5),
        ThreadNotFound,
    ),
    "list_messages before": (
        lambda store, principal, world: store.list_messages(
            principal, world.thread.id, before=world.running.id, limit=5
        ),
        ThreadNotFound,
    ),
    "get_message": (
        lambda store, principal, world: store.get_message(principal, world.thread.id, world.finished.id),
        ThreadNotFound,
    ),
    "append_message": (
        lambda store, principal, world: store.append_message(principal, new_message(world.thread.id), idempotent()),
        ThreadNotFound,
    ),
    "add_file": (lambda store, principal, world: store.add_file(principal, new_file(world.thread.id)), ThreadNotFound),
    "get_file": (
        lambda store, principal, world: store.get_file(principal, world.thread.id, world.file.attachment.id),
        ThreadNotFound,
    ),
    "remove_file": (
        lambda store, principal, world: store.remove_file(principal, world.thread.id, world.file.attachment.id),
        ThreadNotFound,
    ),
    "replay": (lambda store, principal, world: store.replay(principal, world.thread.id, idempotent()), ThreadNotFound),
    "claim": (claim, ThreadNotFound),
    "checkpoint": (
        lambda store, principal, world: store.checkpoint(
            principal, world.running.id, worker=WORKER, partial=replace(world.running, content="x")
        ),
        "lost",
    ),
    "cancel": (lambda store, principal, world: store.cancel(principal, world.thread.id, world.running.id), None),
    "finish": (lambda store, principal, world: store.finish(principal, completed(world.running)), ThreadNotFound),
    "take_orphan": (lambda store, principal, world: store.take_orphan(principal, world.running.id, "worker-2"), None),
    "find_record": (lambda store, principal, world: store.find_record(principal, world.running.id), None),
    "mark_published": (
        lambda store, principal, world: store.mark_published(principal, world.thread.id, [ThreadUpdated(world.thread)]),
        None,
    ),
    "delete_record": (lambda store, principal, world: store.delete_record(principal, world.running.id), None),
}

OPERATORS = {
    "create_organization",
    "find_organization",
    "create_key",
    "list_keys",
    "revoke_key",
    "find_principal",
    "take_orphans",
    "take_outboxes",
    "hold_key",
    "revoke_unheld_keys",
    "create_session",
    "find_session_principal",
    "delete_session",
}
"""Methods without a principal: those of the command line, of sign-in and of the sweeper."""


def test_every_method_of_the_contracts_has_a_case() -> None:
    methods = {
        name
        for contract in (Directory, ThreadStore, OutboxStore)
        for name in vars(contract)
        if not name.startswith("_")
    }
    assert {name.split()[0] for name in CASES} | OPERATORS == methods


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stranger", ["stranger", "namesake"])
async def test_another_organization_finds_and_changes_nothing(open_store: OpenStore, name: str, stranger: str) -> None:
    """The namesake has the same user id in another organization. Every lease has expired, so any run may be taken."""
    async with open_store(lease=0.0) as store:
        world = await populate(store)
        elsewhere = await store.create_organization("Elsewhere")
        principal = Principal(elsewhere.id, world.user.id if stranger == "namesake" else new_id())
        before = await everything(store, world)
        case, outcome = CASES[name]
        if isinstance(outcome, type) and issubclass(outcome, NotFound):
            with pytest.raises(outcome):
                await case(store, principal, world)
        else:
            answer = await case(store, principal, world)
            assert outcome is Other or answer == outcome
        assert await everything(store, world) == before


async def test_what_a_stranger_creates_belongs_to_the_stranger(open_store: OpenStore) -> None:
    async with open_store() as store:
        world = await populate(store)
        principal = Principal((await store.create_organization("Elsewhere")).id, new_id())
        named = new_thread(principal, world.agent.id).with_external_id(CHAT)
        created = await store.create(principal, named, idempotent())
        assert (created.replayed, created.found) == (False, False)
        assert [thread.id for thread in await page_threads(store, principal, world)] == [created.thread.id]
        assert [thread.id for thread in await page_threads(store, world.principal, world)] == [world.thread.id]
        with pytest.raises(ThreadNotFound):
            await store.get(world.principal, created.thread.id)
        agent = await store.create_agent(principal, new_agent(principal))
        assert agent.is_default is True
        assert (await store.list_agents(principal)).agents == [agent]
        assert (await store.get_agent(world.principal, None)).id == world.agent.id


@pytest.mark.parametrize("target", ["another thread's run", "another thread's message"])
async def test_an_own_thread_gives_no_access_to_another_organizations_message(
    open_store: OpenStore, target: str
) -> None:
    """The stranger names an own thread together with another organization's message or run."""
    async with open_store(lease=0.0) as store:
        world = await populate(store)
        principal = Principal((await store.create_organization("Elsewhere")).id, new_id())
        own = (await store.create(principal, new_thread(principal))).thread
        before = await everything(store, world)
        if target == "another thread's run":
            await store.cancel(principal, own.id, world.running.id)
            with pytest.raises(NotFound):
                await store.finish(principal, replace(completed(world.running), thread_id=own.id))
        else:
            with pytest.raises(NotFound):
                await store.get_message(principal, own.id, world.finished.id)
            with pytest.raises(NotFound):
                await store.list_messages(principal, own.id, before=world.finished.id, limit=5)
        assert await everything(store, world) == before
