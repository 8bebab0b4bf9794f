"""Which web pages may ask this server. Without this any page that a user opens could: a browser sends what the page
says to 127.0.0.1 too, and only keeps the answer from it (https://fetch.spec.whatwg.org/#http-cors-protocol).

A page of another origin is served if it is in CORS_ORIGINS. A page may also have its own name point to 127.0.0.1, and
is of the same origin then (DNS rebinding): a server that listens on loopback serves names of loopback and
ALLOWED_HOSTS.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import ForbiddenError
from services.router.front.http.answers import error_answer

ANY = "*"
_METHODS = "GET, HEAD, POST, DELETE, OPTIONS"
_EXPOSED = "x-request-id, moemesh-request-id, retry-after"
_ASKED_METHOD = "access-control-request-method"
_PREFLIGHT_SECONDS = "600"
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class OriginPolicy:
    """What an operator allows. `*` in either allows all."""

    origins: frozenset[str] = frozenset()
    """They stand here as browsers send them: `https://chat.example`, `http://localhost:3000`, `null`."""
    hosts: frozenset[str] = frozenset()
    """Names without a port, beside those of loopback. If there are any, no other name is served anywhere."""
    is_loopback: bool = False
    """The server is reached at loopback only: nobody who means it calls it by another name."""

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises ForbiddenError for a request that no client of this server's users sends; names in lower case."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if (self.is_loopback or self.hosts) and host and not self._serves(host_name(host)):
            raise ForbiddenError(
                f"Host: `{host}` is no name of a loopback address, nor is it in ALLOWED_HOSTS, which lists the other "
                "names that this server is asked by (a proxy's, for example)"
            )
        if origin is not None and not self.allows(origin) and not is_same_origin(origin, host):
            raise ForbiddenError(
                f"Origin: pages of `{origin}` may not ask this server; CORS_ORIGINS lists those that may, and `*` "
                "stands for all"
            )

    def allows(self, origin: str) -> bool:
        """Says whether the origin is on the list."""
        return ANY in self.origins or origin.lower() in self.origins

    def _serves(self, name: str) -> bool:
        return ANY in self.hosts or name in self.hosts or is_loopback_name(name)


def host_name(host: str) -> str:
    """Returns the name in a Host header, without the port; brackets of an IPv6 address and the root's dot go too."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].removesuffix(".")


def is_loopback_name(name: str) -> bool:
    """Says so of `localhost`, names under it (RFC 6761: they never leave the machine), and loopback addresses."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def is_same_origin(origin: str, host: str) -> bool:
    """Says whether the page came from where it asks. The scheme does not count: a proxy in between may have ended
    TLS."""
    try:
        page, asked = urlsplit(origin.lower()), urlsplit(f"//{host.strip().lower()}")
        default_port = _PORTS.get(page.scheme)
        ports = page.port or default_port, asked.port or default_port
    except ValueError:  # a port that is none
        return False
    return bool(page.hostname) and default_port is not None and page.hostname == asked.hostname and ports[0] == ports[1]


class CrossOriginMiddleware:
    """Answers preflights and refusals itself, and lets the answers to allowed pages be read by them."""

    def __init__(self, app: ASGIApp, policy: OriginPolicy) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")

        async def send_readable(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer.add_vary_header("Origin")  # also where there is none: a cache may ask in the name of others
                if origin is not None and self._policy.allows(origin):
                    answer["access-control-allow-origin"] = ANY if ANY in self._policy.origins else origin
                    answer["access-control-expose-headers"] = _EXPOSED
            await send(message)

        try:
            self._policy.check(headers)
        except ForbiddenError as error:
            await error_answer(error)(scope, receive, send_readable)
            return
        is_preflight = origin is not None and scope["method"] == "OPTIONS" and _ASKED_METHOD in headers
        await (_preflight_answer(headers) if is_preflight else self._app)(scope, receive, send_readable)


def _preflight_answer(headers: Headers) -> Response:
    allowed = {
        "access-control-allow-methods": _METHODS,
        "access-control-max-age": _PREFLIGHT_SECONDS,
        "vary": "Access-Control-Request-Headers",
    }
    if asked := headers.get("access-control-request-headers"):
        # SDKs send a dozen of their own; none of them lets a page do more than the methods do.
        allowed["access-control-allow-headers"] = asked
    if headers.get("access-control-request-private-network") == "true":
        allowed["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=allowed)
