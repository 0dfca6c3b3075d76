"""The application: its routes, its middleware, and what lives as long as it does. Begin to read here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple, TypedDict

from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.middleware import Middleware

from agent_chat.agents import demo
from agent_chat.agents.mcp import pool as mcp
from agent_chat.agents.mcp.config import Server as McpServer
from agent_chat.agents.mcp.config import read_servers
from agent_chat.agents.registry import Kind, OpenKind, Registry, open_registry
from agent_chat.server.ai_chat_service import AIChatService
from agent_chat.server.facts import FactPublisher
from agent_chat.server.files.attachments import Attachments
from agent_chat.server.files.content_html import Renderer
from agent_chat.server.files.extraction import Extractor
from agent_chat.server.http.allowed_hosts import AllowedHosts
from agent_chat.server.http.auth import Authentication, Authenticator
from agent_chat.server.http.auth_failures import AuthFailures
from agent_chat.server.http.connections import Connections
from agent_chat.server.http.front import Front, LifespanState
from agent_chat.server.http.openapi import APIDescription
from agent_chat.server.http.problems import EXPECTED, respond
from agent_chat.server.http.request_log import RequestLog
from agent_chat.server.http.routes import (
    agents,
    attachments,
    docs,
    events,
    health,
    messages,
    pages,
    sessions,
    threads,
    usage,
)
from agent_chat.server.http.upload_folder import upload_folder
from agent_chat.server.http.uploads import Uploads
from agent_chat.server.limits import Limits, RequestRate
from agent_chat.server.loop_share import LoopShares
from agent_chat.server.metrics import Metrics
from agent_chat.server.organizations import first_member
from agent_chat.server.own_key import OwnKey, hold_forever, open_own_key, refuse_lost_database
from agent_chat.server.principals import Principals
from agent_chat.server.quota import Quota
from agent_chat.server.reading.streams import Streams
from agent_chat.server.runs.runner import Runner
from agent_chat.server.settings import Settings, environment
from agent_chat.server.supervision import Supervisor
from agent_chat.server.timing import Timing
from agent_chat.stores.blobs import Blobs, open_blobs
from agent_chat.stores.contracts import EventLog, Store
from agent_chat.stores.models import utcnow
from agent_chat.stores.open import Where, open_backends

Backends = Callable[[Where], AbstractAsyncContextManager[tuple[Store, EventLog]]]

KINDS = {"demo": Kind(demo.reply)}
ROUTES = [
    *health.ROUTES,
    *agents.ROUTES,
    *threads.ROUTES,
    *messages.ROUTES,
    *attachments.ROUTES,
    *events.ROUTES,
    *usage.ROUTES,
    *docs.ROUTES,
    *sessions.ROUTES,
    *pages.ROUTES,
]


def default_kind(settings: Settings) -> str:
    """The kind of agents for which the client names none."""
    return "claude" if _has_claude(settings) else "demo"


def _has_claude(settings: Settings) -> bool:
    return settings.anthropic_api_key is not None or settings.anthropic_base_url is not None


class State(TypedDict):
    """The contents of `request.state`."""

    service: AIChatService
    streams: Streams
    supervisor: Supervisor
    metrics: Metrics
    rate: RequestRate
    shares: LoopShares
    uploads: Uploads
    api: APIDescription
    authenticator: Authenticator
    tools: mcp.Pool
    metrics_token: str | None
    timing: Timing


class Setup(NamedTuple):
    """The arguments of `create_app`, which documents them, and what it opens of them."""

    settings: Settings
    servers: Mapping[str, McpServer]
    blobs: Blobs
    kinds: Mapping[str, Kind | OpenKind]
    backends: Backends
    limits: Limits
    timing: Timing
    connect_tools: bool


def create_app(
    settings: Settings,
    *,
    kinds: Mapping[str, Kind | OpenKind] | None = None,
    backends: Backends = open_backends,
    limits: Limits = Limits(),
    timing: Timing = Timing(),
    connect_tools: bool = True,
) -> Starlette:
    """Create the ASGI application.

    Args:
        kinds: further kinds of agents, beside `demo` and those of installed packages.
        backends: opens the store and the log.
        timing: the time constants; tests pass shorter ones.
        connect_tools: connect to the MCP servers at start instead of when they are first needed.

    Raises: InvalidMcpFile, BadBlobsURL for settings that cannot be used.

    While it runs, `app.state.own_key` is the server's own key, if it has one, and `app.state.drain` ends it gently,
    waiting for `app.state.running()` runs; `app.state.failure` is why it could not start.
    """
    servers = read_servers(settings.mcp_config, environment())
    blobs = open_blobs(settings.blobs_url, settings.data_dir)
    setup = Setup(settings, servers, blobs, {**KINDS, **(kinds or {})}, backends, limits, timing, connect_tools)
    running = LifespanState()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[State]:
        async with AsyncExitStack() as stack:
            try:
                state = await _start(app, stack, setup)
            except Exception as error:
                app.state.failure = error
                raise
            running.state = state
            try:
                yield state
            finally:
                running.state = None

    app = Starlette(
        routes=ROUTES,
        middleware=[
            Middleware(Front, running=running, root_path=settings.root_path),
            Middleware(RequestLog, lines=settings.access_log),
            Middleware(AllowedHosts, hosts=settings.hosts),
            Middleware(Authentication),
        ],
        exception_handlers=dict.fromkeys([*EXPECTED, Exception], respond),
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # its redirects are built from the Host header
    return app


async def _start(app: Starlette, stack: AsyncExitStack, setup: Setup) -> State:
    """Open what lives as long as the application; the stack closes it, in the opposite order."""
    settings, limits = setup.settings, setup.limits
    store, log = await stack.enter_async_context(setup.backends(replace(settings.where, lease=setup.timing.lease)))
    pool = _pool(stack, setup, store)
    registry = await stack.enter_async_context(open_registry(_kinds(setup)))
    uploads = Uploads(stack.enter_context(upload_folder(settings.data_dir)), limits)
    service = _service(stack, setup, store, log, registry, pool, uploads.folder)
    own_key = app.state.own_key = await _first_key(setup, store)
    await service.runner.repairer.sweep()  # so that the first request finds no run of a dead process
    streams = Streams(limits, setup.timing)
    principals = Principals(store, setup.timing.key_lookup)
    failures = AuthFailures(limits.auth_failures)
    shares = LoopShares(limits, others_seconds=setup.timing.others)

    async def drain() -> None:
        await service.runner.drain(settings.drain_seconds)
        streams.close()

    app.state.drain = drain
    app.state.running = lambda: service.runner.count
    connections: Connections | None = getattr(app.state, "connections", None)
    supervisor = Supervisor(setup.timing)
    stack.push_async_callback(supervisor.close)
    _start_loops(supervisor, service, streams, principals)
    if connections is not None:
        supervisor.start("check connections", connections.check_forever)
    if settings.database_url is not None:
        supervisor.start("hold key", lambda: hold_forever(store, own_key, setup.timing.key_hold))
    return {
        "service": service,
        "streams": streams,
        "supervisor": supervisor,
        "metrics": Metrics(service, streams, supervisor, failures, shares, connections, pool),
        "rate": RequestRate(limits),
        "shares": shares,
        "uploads": uploads,
        "api": APIDescription(ROUTES),
        "authenticator": Authenticator(principals, failures, setup.timing.auth_delay),
        "tools": pool,
        "metrics_token": settings.metrics_token,
        "timing": setup.timing,
    }


async def _first_key(setup: Setup, store: Store) -> OwnKey | None:
    """Create the first organization and the server's own key if they are missing. Raises: DataFolderUnusable."""
    settings = setup.settings
    await refuse_lost_database(store, settings.data_dir)
    kind, model = default_kind(settings), settings.default_model
    owner = await first_member(store, kind=kind, model=model, servers=setup.servers)
    shared = settings.database_url is not None
    return await open_own_key(store, owner, settings.data_dir, settings.api_key, shared=shared)


def _start_loops(supervisor: Supervisor, service: AIChatService, streams: Streams, principals: Principals) -> None:
    supervisor.start("sweep runs", service.runner.repairer.sweep_forever)
    supervisor.start("publish facts", service.facts.sweep_forever)
    supervisor.start("sweep storage", service.attachments.sweep_forever)
    supervisor.start("roll up usage", service.usage.sweep_forever)
    supervisor.start("ping streams", streams.ping_forever)
    supervisor.start("check keys", lambda: streams.check_keys_forever(principals))


def _pool(stack: AsyncExitStack, setup: Setup, store: Store) -> mcp.Pool:
    async def organization_name(organization_id: str) -> str | None:
        found = await store.find_organization(organization_id)
        return found.name if found else None

    pool = mcp.Pool(setup.servers, organization_name=organization_name)
    if setup.connect_tools:
        pool.connect()
    stack.push_async_callback(pool.close)
    return pool


def _kinds(setup: Setup) -> Mapping[str, Kind | OpenKind]:
    return {"claude": _claude(setup.settings), **setup.kinds} if _has_claude(setup.settings) else setup.kinds


def _service(
    stack: AsyncExitStack,
    setup: Setup,
    store: Store,
    log: EventLog,
    registry: Registry,
    pool: mcp.Pool,
    uploads: Path,
) -> AIChatService:
    """Assemble the service. The stack closes what must be closed, the runs first."""
    settings, limits = setup.settings, setup.limits
    renderer = Renderer()
    stack.push_async_callback(renderer.close)
    extractor = Extractor()
    stack.push_async_callback(extractor.close)
    quota = Quota(store, settings.storage_megabytes * 2**20 if limits.stored_bytes is None else limits.stored_bytes)
    stack.push_async_callback(quota.close)
    attached = Attachments(
        store, setup.blobs, extractor, quota=quota, clock=utcnow, folder=uploads, timing=setup.timing
    )
    runner = Runner(
        store,
        log,
        registry,
        pool.toolbox,
        renderer.render_answer,
        files=attached.files_of,
        store_file=attached.add_generated,
        permitted=settings.model_policy.permitted,
        charge=quota.charge,
        keep_reasoning=settings.keep_reasoning,
        run_seconds=settings.run_seconds,
        timing=setup.timing,
    )
    stack.push_async_callback(runner.drain, 0.0)
    facts = FactPublisher(store, log, setup.timing)
    stack.push_async_callback(facts.close)
    return AIChatService(
        store,
        log,
        runner,
        facts,
        registry,
        renderer,
        servers=setup.servers,
        default_kind=default_kind(settings),
        model_policy=settings.model_policy,
        limits=limits,
        attachments=attached,
        quota=quota,
        timing=setup.timing,
    )


def _claude(settings: Settings) -> OpenKind:
    @asynccontextmanager
    async def open_claude() -> AsyncIterator[Kind]:
        from agent_chat.agents.claude.agent import Claude  # the SDK takes a second to import: only where it is used

        claude = Claude(
            settings.anthropic_api_key,
            settings.anthropic_base_url,
            model=settings.default_model,
            max_tokens=settings.max_tokens,
            title_model=settings.title_model,
        )
        try:
            yield Kind(claude.reply, claude.title)
        finally:
            await claude.close()

    return OpenKind(open_claude)
