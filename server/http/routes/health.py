"""/healthz, /readyz and /metrics."""

from __future__ import annotations

import hmac
from collections import Counter
from typing import cast

from msgspec import UNSET
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from agent_chat.agents.mcp.pool import Pool
from agent_chat.agents.mcp.slot import STATES
from agent_chat.server.errors import Unauthenticated
from agent_chat.server.http.operations import APIRoute, Operation, ResponseType
from agent_chat.server.http.requests import as_json, service_of
from agent_chat.server.http.schemas import Liveness, Readiness
from agent_chat.server.metrics import Metrics
from agent_chat.server.supervision import Supervisor


async def healthz(request: Request) -> Response:
    """Report that the process is alive."""
    return as_json(Liveness("ok"))


async def readyz(request: Request) -> Response:
    """Report whether the server is ready: the database is reachable, no background loop fails, no drain is in progress.

    An unreachable Redis and the states of tool servers are reported too, but do not change readiness. Names of tool
    servers are not: this endpoint needs no key.
    """
    service = service_of(request)
    draining = service.runner.draining
    database = await service.store.ready()
    failing = cast(Supervisor, request.state.supervisor).failing
    ready = database and not draining and not failing
    states = Counter(cast(Pool, request.state.tools).states.values())
    body = Readiness(
        ready=ready,
        database=database,
        events=not service.log.unreachable,
        draining=draining,
        tools={state: states[state] for state in STATES},
        failing=failing or UNSET,
    )
    return as_json(body, 200 if ready else 503)


async def metrics(request: Request) -> Response:
    """Return this process's Prometheus metrics. CHAT_METRICS_TOKEN is the bearer token."""
    wanted: str | None = request.state.metrics_token
    if wanted is None:
        raise HTTPException(404)
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
    if not hmac.compare_digest(given, wanted.encode()):
        raise Unauthenticated
    return Response(cast(Metrics, request.state.metrics).text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


ROUTES = [
    APIRoute(
        "GET", "/healthz", healthz, Operation(tag="operations", responses=(ResponseType(Liveness),), security=None)
    ),
    APIRoute(
        "GET",
        "/readyz",
        readyz,
        Operation(
            tag="operations",
            responses=(ResponseType(Readiness), ResponseType(Readiness, 503, description="Not ready.")),
            security=None,
        ),
    ),
    APIRoute(
        "GET",
        "/metrics",
        metrics,
        Operation(tag="operations", responses=(ResponseType(str, media_type="text/plain"),), security="metrics_token"),
    ),
]
