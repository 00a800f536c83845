"""Who may ask what: the checks before, and the headers on, every answer of the web page."""

from __future__ import annotations

import hmac
import ipaddress
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_COOKIE = "amd_fast_token"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware.

    * The ``Host`` a browser names must be one of ours, or another site could have its own name point here (DNS rebinding).
    * What changes something must come from a page of ours: its ``Origin`` has to be this host (cross-site request forgery).
    * With a token, everything needs it: once in the address (``/?token=...``), then from the cookie which that sets.

    Args:
        app: what is guarded.
        hosts: names that are ours, without port; None for any.
        token: that every request has to carry; empty for none.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None = None, token: str = "") -> None:
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = self._token_in_address(scope)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    answered[name] = value
                if given:
                    secure = "; Secure" if scope["scheme"] == "https" else ""
                    answered.append("Set-Cookie", f"{TOKEN_COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Strict{secure}")
            await send(message)

        refusal = self._refusal(scope["method"], headers, given)
        await (refusal or self.app)(scope, receive, send_guarded)

    def _refusal(self, method: str, headers: Headers, token_given: bool) -> Response | None:
        if self.hosts is not None and _host_name(headers.get("host", "")) not in self.hosts:
            return PlainTextResponse("This server does not answer under that name; use the address that it printed.\n", 421)
        if self.token and not (token_given or self._same(_cookies(headers).get(TOKEN_COOKIE, ""))):
            return PlainTextResponse("This page needs its token: open the whole address that `amd-fast serve` printed.\n", 401)
        if method not in ("GET", "HEAD") and urlsplit(headers.get("origin", "")).netloc != headers.get("host"):
            return JSONResponse({"error": "this was not asked for by the page of this server; reload it and try again"}, 403)
        return None

    def _token_in_address(self, scope: Scope) -> bool:
        query = parse_qs(scope["query_string"].decode("latin-1"))
        return bool(self.token) and self._same(query.get("token", [""])[0])

    def _same(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self.token.encode())


def own_hosts(host: str) -> frozenset[str] | None:
    """The names under which a server that listens at ``host`` is reached; None (any) where it listens at all addresses."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return frozenset({"localhost", "127.0.0.1", "::1"} if host == "localhost" else {host.lower()})
    if address.is_unspecified:
        return None
    return frozenset({"localhost", "127.0.0.1", "::1", str(address)} if address.is_loopback else {str(address)})


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _cookies(headers: Headers) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}
