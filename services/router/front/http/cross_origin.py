"""Which web pages may ask this server. Without this any page that a user opens could: a browser sends what the page
says to 127.0.0.1 too, and only keeps the answer from it (https://fetch.spec.whatwg.org/#http-cors-protocol).

A page of another origin is served if it is in CORS_ORIGINS. A page may also have its own name point to 127.0.0.1, and
is of the same origin then (DNS rebinding): a server that listens on loopback serves names of loopback and
ALLOWED_HOSTS. Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from common.errors import ForbiddenError

ANY = "*"
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class OriginPolicy:
    """What an operator allows. `*` in either allows all."""

    origins: frozenset[str] = frozenset()
    """They stand here as browsers send them: `https://chat.example`, `http://localhost:3000`, `null`."""
    hosts: frozenset[str] = frozenset()
    """Names without a port, beside those of loopback. If there are any, no other name is served anywhere."""
    is_loopback: bool = False
    """The server is reached at loopback only: no client of its users calls it by another name."""

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises ForbiddenError for a request that no client of this server's users sends; names in lower case."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if (self.is_loopback or self.hosts) and host and not self._serves(host_name(host)):
            raise ForbiddenError(
                f"Host: `{host}` is neither a name of a loopback address nor in ALLOWED_HOSTS, which lists the other "
                "names by which this server may be asked (a proxy's, for example)"
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
