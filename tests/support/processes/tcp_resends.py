"""What the kernel says of the resend times of a TCP socket, where it has such options."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

import pytest

from common.wire.tcp_resends import FIRST_RESEND_S, LAST_RESEND_S

TCP_RTO_MAX_MS, TCP_RTO_MIN_US = 44, 45
TICK_US = 10_000


def _is_new_enough() -> bool:
    """Asks the kernel for its number: what sets the options is what is tested."""
    system, release = os.uname().sysname, re.match(r"(\d+)\.(\d+)", os.uname().release)
    return system == "Linux" and release is not None and tuple(map(int, release.groups())) >= (6, 15)


needs_the_options = pytest.mark.skipif(not _is_new_enough(), reason="this kernel is older than Linux 6.15")


@dataclass(frozen=True, slots=True)
class ResendTimes:
    """Of one connection, as the kernel has them."""

    first_us: int
    last_ms: int

    @property
    def are_soon(self) -> bool:
        """Returns whether they are those that the mesh asks for. The kernel counts in ticks, of 1 to 10 ms, and rounds
        up."""
        is_soon_first = 0 <= self.first_us - round(FIRST_RESEND_S * 1e6) < TICK_US
        return is_soon_first and self.last_ms == round(LAST_RESEND_S * 1e3)


def resend_times(connection: socket.socket) -> ResendTimes:
    first_us, last_ms = (connection.getsockopt(socket.IPPROTO_TCP, name) for name in (TCP_RTO_MIN_US, TCP_RTO_MAX_MS))
    return ResendTimes(first_us, last_ms)
