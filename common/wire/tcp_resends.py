"""How soon TCP sends again what a network has lost: set on every connection of the mesh, where the kernel can.

By default a packet that is lost again and again is sent after 0.2, 0.4, 0.8, 1.6, 3.2 s and so on, up to two minutes.
On a link that loses a third of its packets such waits add up to most of what a stream stands still, and reach the
silence after which a connection counts as broken. A mesh sends little and waits for all of it, so that it is polite
enough to ask once a second. The two options are in Linux from 6.15; an older kernel keeps its own times.
"""

from __future__ import annotations

import os
import socket

FIRST_RESEND_S = 0.05
"""At least this long after a packet was sent, plus what the way there and back has been taking."""
LAST_RESEND_S = 1.0
"""At most this long between two of them; the least that Linux takes."""

_TCP_RTO_MAX_MS = 44
_TCP_RTO_MIN_US = 45
"""From linux/tcp.h; Python's `socket` has no names for them."""


def resend_soon(descriptor: int) -> bool:
    """Sets the times of a TCP socket that belongs to other code; one that listens hands them on to what it accepts.

    Returns whether the kernel has taken them: an older one does not, and no other kind of socket. By now the
    descriptor may be closed, or another file: at worst another TCP socket of this process gets these times.
    """
    try:
        copy = os.dup(descriptor)
    except OSError:
        return False
    try:
        same = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return False
    with same:
        if same.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        try:
            same.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, round(LAST_RESEND_S * 1e3))
            same.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MIN_US, round(FIRST_RESEND_S * 1e6))
        except OSError:
            return False
    return True
