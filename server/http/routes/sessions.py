"""Signing in and out: a valid key starts a session, whose token is stored in the browser's cookie.

A link on another site must not replace the session of the user who follows it: what they write would belong to the
link's account. Such a link, and one whose origin the browser does not report, gets a page that asks for confirmation;
its form is accepted from this origin only.
"""

from __future__ import annotations

import logging
import secrets
from html import escape
from typing import cast
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from agent_chat.server.errors import Forbidden, MalformedBody, TooLarge, Unauthenticated
from agent_chat.server.http.auth import authenticator_of, client_address, same_origin
from agent_chat.server.http.cookies import SESSION_SECONDS, clear_session, session_token, set_session
from agent_chat.server.http.requests import public_path, service_of
from agent_chat.server.limits import RequestRate
from agent_chat.server.log_lines import security_facts
from agent_chat.server.principals import Credential

_FORM_BYTES = 8 * 2**10
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Sign in</title>
<style>:root { color-scheme: light dark } body { font: 16px/1.5 system-ui, sans-serif; max-width: 30rem;
margin: 4rem auto; padding: 0 1rem } button { font: inherit; padding: .4rem 1rem }</style>
<h1>Sign in?</h1>
<p>This link signs you in with the key in its address. If another site sent you here, go on only if you trust it:
what you write will belong to the account of that key.</p>
<form method="post" action="login"><input type="hidden" name="key" value="%s"><button>Sign in</button></form>
<p><a href="./">Cancel</a></p></html>"""
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "same-origin",  # with no-referrer the form's Origin would be null
}

logger = logging.getLogger("chat.security")


def needs_confirmation(request: Request) -> bool:
    """Return False if the browser reports that its user or a page of this origin opened the link."""
    return request.headers.get("sec-fetch-site") not in ("none", "same-origin")


def confirmation_page(key: str) -> Response:
    """Return the page that asks for confirmation."""
    return HTMLResponse(_PAGE % escape(key), headers=_PAGE_HEADERS)


async def sign_in(request: Request, key: str) -> Response:
    """End the browser's earlier session, start a new one and redirect to the page.

    Raises: Unauthenticated, AuthRateLimited, RateLimited, StoreUnavailable.
    """
    principal = await authenticator_of(request).authenticate(request, Credential("key", key))
    cast(RequestRate, request.state.rate).count(principal.organization_id)
    store = service_of(request).store
    token = secrets.token_urlsafe(32)
    created = await store.create_session(key, token, seconds=SESSION_SECONDS)
    if created is None:  # the key was revoked after it was checked
        raise Unauthenticated
    await _end_session(request)
    facts = security_facts(principal)
    logger.info("signed in", extra={**facts, "address": client_address(request)})
    response = RedirectResponse(public_path(request, "/"), 303, headers={"Referrer-Policy": "no-referrer"})
    set_session(response, request, token)
    return response


async def login(request: Request) -> Response:
    """Sign in with the form of the confirmation page."""
    if not same_origin(request):
        raise Forbidden
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _FORM_BYTES:
            raise TooLarge("body", _FORM_BYTES)
    try:
        [key] = parse_qs(body.decode(), max_num_fields=1)["key"]
    except (KeyError, ValueError) as error:
        raise MalformedBody("Send a form with the field `key`.") from error
    return await sign_in(request, key)


async def logout(request: Request) -> Response:
    """End the session and clear its cookie."""
    if not same_origin(request):
        raise Forbidden
    await _end_session(request)
    response = Response(status_code=204)
    clear_session(response, request)
    return response


async def _end_session(request: Request) -> None:
    token = session_token(request)
    if not token:
        return
    principals = authenticator_of(request).principals
    principal = await principals.check(Credential("session", token))
    await service_of(request).store.delete_session(token)
    principals.forget(Credential("session", token))
    if principal is not None:
        facts = security_facts(principal)
        logger.info("signed out", extra={**facts, "address": client_address(request)})


ROUTES = [Route("/login", login, methods=["POST"]), Route("/logout", logout, methods=["POST"])]
