"""TCP addresses as settings name them: IPv4, IPv6 in brackets, or host names; and this host's own."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Sequence

from common.errors import ConfigurationError

_ENDPOINT = re.compile(r"tcp://(?:\[(?P<in_brackets>[^\[\]\s/]+)\]|(?P<plain>[^\[\]\s:/]+)):(?:\d{1,5}|\*)")
_LAST_PORT = 65_535
Resolve = Callable[[str], Sequence[str]]
"""A host name's addresses, IPv4 and IPv6. Raises OSError."""


def control_host(control: str) -> str:
    """Returns the host of CONTROL, without brackets. Raises ConfigurationError."""
    match = _ENDPOINT.fullmatch(control)
    host = (match["in_brackets"] or match["plain"]) if match else ""
    port = control.rpartition(":")[2]
    if match is None or (match["in_brackets"] and not is_ipv6(host)) or (port != "*" and int(port) > _LAST_PORT):
        hint = "; an IPv6 address stands in brackets: tcp://[::1]:PORT" if control.count(":") > 2 else ""
        raise ConfigurationError(f"CONTROL={control}: must be ipc://PATH or tcp://HOST:PORT{hint}")
    return host


def advertised_host(name: str) -> str:
    """Returns ADVERTISE_HOST without brackets. Raises ConfigurationError for what is neither a name nor an address."""
    has_brackets = name.startswith("[") and name.endswith("]")
    host = name[1:-1] if has_brackets else name
    if not is_ipv6(host) and (has_brackets or re.fullmatch(r"[^\[\]\s:/]+", host) is None):
        raise ConfigurationError(f"ADVERTISE_HOST={name}: must be a host name or an address, without scheme and port")
    return host


def bracketed(host: str) -> str:
    """Returns it as it stands in an endpoint."""
    return f"[{host}]" if ":" in host else host


def is_ipv6(host: str) -> bool:
    """Returns whether it is an IPv6 address, with or without the name of an interface behind `%`."""
    return isinstance(_address(host), ipaddress.IPv6Address)


def is_wildcard(host: str) -> bool:
    """Returns whether it stands for all addresses of this host."""
    address = _address(host)
    return host == "*" or (address is not None and address.is_unspecified)


def is_loopback(host: str) -> bool:
    """Returns whether only this host can reach it."""
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def resolve(host: str) -> Sequence[str]:
    """Asks the system. Raises OSError."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


def speaks_ipv6(host: str, resolve: Resolve = resolve) -> bool:
    """Returns whether a mesh whose router has this address needs IPv6: an address of that kind, or a name that has no
    other.

    A name that cannot be looked up now is taken for one of IPv4; that its router is not there is told later.
    """
    if is_wildcard(host) or _address(host) is not None:
        return is_ipv6(host)
    try:
        addresses = resolve(host)
    except OSError:
        return False
    return bool(addresses) and all(is_ipv6(address) for address in addresses)


def own_address(with_ipv6: bool, resolve: Resolve = resolve) -> str:
    """This host's address on the network that its name stands for (in a container: its address there).

    Raises ConfigurationError where the name has none that others can use.
    """
    try:
        # Without the interface, which is another one on each host, a link-local address leads nowhere.
        addresses = [one for one in resolve(socket.gethostname()) if not one.lower().startswith("fe80:")]
    except OSError as error:
        raise ConfigurationError(f"ADVERTISE_HOST is not set and this host's name has no address: {error}") from None
    of_kind = [address for address in addresses if is_ipv6(address) == with_ipv6]
    if not addresses or (not of_kind and not with_ipv6):
        raise ConfigurationError("ADVERTISE_HOST is not set and this host's name has no address that others reach")
    return (of_kind or addresses)[0]


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Returns None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
