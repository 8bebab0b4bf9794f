"""What the head of a request says, as lines that the parser has read. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

import httptools

from common.errors import InvalidRequestError

Headers = Sequence[tuple[bytes, bytes]]
"""Names in lower case."""
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[^\s:/?#@\[\],]*)(:[0-9]*)?")


def with_one_host(version: str, target: bytes, headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers with the Host that the target names, where that is a whole address (RFC 9112, 3.2).

    Raises InvalidRequestError unless there is one Host (HTTP/1.0: at most one) of the form of one. Whoever stands in
    between and the router must not differ about it: else it would be no use to check it.
    """
    hosts = [value for name, value in headers if name == b"host"]
    is_missing = not hosts and version != "1.0"
    if is_missing or len(hosts) > 1 or not all(_HOST.fullmatch(host) for host in hosts):
        raise InvalidRequestError("a request has one `Host` header: a name or an address, and perhaps a port")
    url = httptools.parse_url(target)
    if url.host is None:
        return list(headers)
    host = b"[%s]" % url.host if b":" in url.host else url.host
    port = b"" if url.port is None else b":%d" % url.port
    return [*(header for header in headers if header[0] != b"host"), (b"host", host + port)]


def head_without_upgrade(method: bytes, target: bytes, version: str, headers: Headers) -> bytes:
    """The same request without its offer to speak another protocol."""
    lines = [b"%s %s HTTP/%s" % (method, target, version.encode())]
    for name, value in headers:
        if name == b"connection":
            value = b", ".join(token for token in value.split(b",") if token.strip().lower() != b"upgrade")
        if name != b"upgrade":
            lines.append(name + b": " + value)
    return b"\r\n".join(lines) + b"\r\n\r\n"
