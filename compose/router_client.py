"""Asking a router over HTTP: how people write where it is, which way a request goes, and why there is no answer."""

from __future__ import annotations

import re
import ssl

import httpx

from common.errors import MoemeshError
from common.wire.tcp_addresses import is_ipv6, is_loopback, is_wildcard

_ROUTE = re.compile(r"/v1(/(chat/)?completions|/models)?$")


def named_url(given: str) -> str:
    """Returns where the router is, of what a person wrote: `http://` goes without saying, an IPv6 address may stand
    without brackets, and `/v1` is what SDKs need."""
    given = given.strip()
    if is_ipv6(given):
        given = f"[{given}]"
    url = given if "://" in given else f"http://{given}"
    return _ROUTE.sub("", url.rstrip("/"))


def open_client(url: str, timeout: httpx.Timeout | float) -> httpx.Client:
    """For the router at `url`. A proxy that the environment names is not asked for what is on this host: it has another
    one. Raises MoemeshError where the environment names one that cannot be used, or `url` no host."""
    try:
        host = httpx.URL(url).host
    except httpx.InvalidURL as error:
        raise MoemeshError(f"this is not an address: {error}") from None
    if not host:
        raise MoemeshError("this is not an address: it names no host")
    if host.endswith(".localhost") or is_loopback(host) or is_wildcard(host):
        return httpx.Client(base_url=url, timeout=timeout, trust_env=False)
    try:
        return httpx.Client(base_url=url, timeout=timeout)
    except (ImportError, ValueError) as error:
        raise MoemeshError(
            f"the proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names cannot be used ({error}); NO_PROXY={host} goes "
            "without it"
        ) from None


def why_not_answered(error: Exception) -> str:
    """Returns a sentence; where nothing listens with what to start."""
    if isinstance(error.__cause__, ssl.SSLError) or "[SSL" in str(error):
        return f"what answers there does not speak TLS as https:// asks for ({error}); a router is asked by http://"
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return (
            f"nothing answers there ({error}). `make run` or `moemesh up` starts a mesh on this machine, and says "
            "`ready URL` once it can be asked; --url or MOEMESH_URL names one that runs elsewhere"
        )
    if isinstance(error, httpx.TimeoutException):
        return "something listens there and does not answer in time"
    return str(error)
