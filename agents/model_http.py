"""The HTTP client for a model's service: its limits, its time limits, and which redirects it follows.

The SDK follows up to 20 redirects and sends the API key with each, to whatever host they name. Here a redirect is
followed at most twice and only within the configured host: a key must not reach a host that the operator did not name.
"""

from __future__ import annotations

import httpx2

MAX_REDIRECTS = 2
CONNECT_SECONDS = 10.0


class RedirectRefused(httpx2.RequestError):
    """A redirect to another host than the configured one, or from https to http."""

    def __init__(self, source: httpx2.URL, target: httpx2.URL, request: httpx2.Request) -> None:
        super().__init__(f"{_origin(source)} redirects to {_origin(target)}, which is not followed", request=request)


def model_client(client: type[httpx2.AsyncClient], *, stall_seconds: float, idle_seconds: float) -> httpx2.AsyncClient:
    """Create the client. The number of its connections is not limited.

    Args:
        client: the SDK's client class.
        stall_seconds: how long a response may send nothing.
        idle_seconds: how long an idle connection may be used again.
    """
    return client(
        timeout=httpx2.Timeout(stall_seconds, connect=min(CONNECT_SECONDS, stall_seconds)),
        limits=httpx2.Limits(
            max_connections=0,  # no limit in aiohttp; None is not passed on, and its default is 100
            max_keepalive_connections=100,
            keepalive_expiry=idle_seconds,
        ),
        max_redirects=MAX_REDIRECTS,
        event_hooks={"response": [_check_redirect]},
    )


async def _check_redirect(response: httpx2.Response) -> None:
    """Raises: RedirectRefused before the redirect is followed."""
    if not response.has_redirect_location:
        return
    source = response.request.url
    target = source.join(response.headers["location"])
    upgrade = (source.scheme, target.scheme) == ("http", "https") and source.port == target.port is None
    if target.host != source.host or (_origin(target) != _origin(source) and not upgrade):
        raise RedirectRefused(source, target, response.request)


def _origin(url: httpx2.URL) -> str:
    """The URL without its path and query, which may contain secrets."""
    return f"{url.scheme}://{url.netloc.decode()}"
