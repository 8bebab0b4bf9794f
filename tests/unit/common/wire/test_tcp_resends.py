"""The resend times of TCP, as they are asked of the kernel (of connections: tests/integration/test_transport.py)."""

from __future__ import annotations

import os
import socket

from common.wire.tcp_resends import FIRST_RESEND_S, LAST_RESEND_S, resend_soon
from common.wire.transport import SocketLimits
from tests.support.processes.tcp_resends import needs_the_options, resend_times


def test_the_first_resend_comes_before_a_pulse_is_missed_and_the_last_before_a_connection_is_broken() -> None:
    assert FIRST_RESEND_S <= 0.05
    assert LAST_RESEND_S * 3 <= SocketLimits().heartbeat_timeout_ms / 1e3


@needs_the_options
def test_what_a_listening_socket_accepts_has_its_times() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        assert resend_soon(listener.fileno())
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            times = resend_times(accepted)
            assert times.are_soon, times


def test_what_is_no_tcp_socket_is_left_alone_and_no_descriptor_is_kept() -> None:
    with socket.socket(socket.AF_UNIX) as unix, open(os.devnull) as file:
        before = os.listdir("/proc/self/fd")
        assert not resend_soon(unix.fileno())
        assert not resend_soon(file.fileno())
        assert not resend_soon(1 << 20)
        assert os.listdir("/proc/self/fd") == before
