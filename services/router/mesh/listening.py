"""Whether anybody still listens at an address whose connection has just closed."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections.abc import Iterable

WITHIN_S = 0.005
"""For all addresses together; a host that is there refuses within a round trip, and one that is not says nothing."""


def refused(endpoints: Iterable[str], within_s: float = WITHIN_S) -> set[str]:
    """Of these (`ipc://PATH` or `tcp://ADDRESS:PORT`), those where a connection is refused: nobody listens.

    Whoever listened there has ended, or has closed its sockets: its process need not be waited for. All else proves
    nothing: a connection that stands, one that gets no answer in time, a path that is gone, an address that is a name.
    """
    with contextlib.ExitStack() as probes:
        errors: dict[str, int] = {}
        waiting: dict[int, tuple[str, socket.socket]] = {}
        poll = select.poll()  # `select.select` takes no descriptor above 1023
        for endpoint in endpoints:
            probe, errors[endpoint] = _connect(endpoint)
            if probe is not None:
                probes.enter_context(probe)
                if errors[endpoint] == errno.EINPROGRESS:
                    waiting[probe.fileno()] = endpoint, probe
                    poll.register(probe, select.POLLOUT)
        deadline_s = time.monotonic() + within_s
        while waiting and (left_s := deadline_s - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left_s * 1000):
                endpoint, probe = waiting.pop(descriptor)
                poll.unregister(descriptor)
                errors[endpoint] = probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return {endpoint for endpoint, error in errors.items() if error == errno.ECONNREFUSED}


def _connect(endpoint: str) -> tuple[socket.socket | None, int]:
    kind, _, address = endpoint.partition("://")
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        if kind == "ipc":
            probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        elif kind == "tcp" and port.isdecimal() and _is_numeric(host):
            probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        else:
            return None, 0
    except OSError:
        return None, 0  # no descriptor is left: then there is no proof
    probe.setblocking(False)
    return probe, probe.connect_ex(address if kind == "ipc" else (host, int(port)))


def _is_numeric(host: str) -> bool:
    """A name would have to be looked up, which may take long."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return True
    return False
