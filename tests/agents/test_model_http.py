"""Requests to a model's service: how many at the same time, and which redirects are followed."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable

import pytest
from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import Receive, Scope, Send

from agent_chat.agents import AgentError, Text
from agent_chat.agents.claude.agent import Claude
from tests.support.anthropic_api import StandIn, serving
from tests.support.claude_runs import answer, streams_at_once


@pytest.mark.slow
async def test_a_hundred_and_fifty_streams_are_open_at_the_same_time(service: StandIn) -> None:
    await streams_at_once(service, 150)


class Redirects:
    """A service that redirects every request, with the status 307; `keys` is the API key of each request."""

    def __init__(self, target: Callable[[str], str]) -> None:
        self.url = ""
        self.keys: list[str | None] = []
        self._target = target

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self.keys.append(headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer "))
        await RedirectResponse(self._target(self.url))(scope, receive, send)


@pytest.fixture
async def redirects(request: pytest.FixtureRequest) -> AsyncIterator[Redirects]:
    service = Redirects(request.param)
    async with serving(service) as service.url:
        yield service


def elsewhere(url: str) -> str:
    """The same service under another host name."""
    return url.replace("127.0.0.1", "localhost") + "/v1/messages"


@pytest.mark.parametrize(
    ("redirects", "requests"),
    [(lambda url: url + "/v1/messages", 3), (elsewhere, 1), (lambda url: "https://127.0.0.1:9/v1/messages", 1)],
    ids=["itself", "another host", "another port"],
    indirect=["redirects"],
)
async def test_a_redirect_is_followed_twice_on_the_same_host_and_never_to_another(
    redirects: Redirects, requests: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = Claude("a-key", redirects.url, retry_seconds=0.01)
    with pytest.raises(AgentError, match="redirect") as failure:
        await answer(model)
    assert redirects.keys == ["a-key"] * requests
    assert not failure.value.retryable
    assert [record.levelno for record in caplog.records if "redirect" in record.getMessage()][:1] == [logging.WARNING]
    await model.close()


@pytest.mark.parametrize("redirects", [lambda url: "/v2/messages"], indirect=True)
async def test_a_redirect_on_the_same_host_is_followed(redirects: Redirects, service: StandIn) -> None:
    async def moved(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/v1/messages":
            await redirects(scope, receive, send)
        else:
            await service({**scope, "path": "/v1/messages"}, receive, send)

    async with serving(moved) as url:
        model = Claude(service.key, url, retry_seconds=0.01)
        assert Text("Fine.") in await answer(model)
        await model.close()
    assert redirects.keys == [service.key]
