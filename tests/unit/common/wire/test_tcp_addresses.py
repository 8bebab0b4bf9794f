"""Which addresses are meant, and over which kind of IP; names are looked up by a list."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

import pytest

from common.errors import ConfigurationError
from common.messages import Header, Leave
from common.wire.tcp_addresses import advertised_host, control_host, own_address, speaks_ipv6
from common.wire.transport import Full, SocketLimits, Transport
from tests.support.processes.waiting import wait_until

NAMES = {"both": ["10.0.0.1", "fd00::1"], "old": ["10.0.0.1"], "new": ["fd00::1"]}


def look_up(name: str) -> Sequence[str]:
    if name not in NAMES:
        raise OSError("no such name")
    return NAMES[name]


@pytest.mark.parametrize(
    ("host", "answer"),
    [
        ("::1", True),
        ("::", True),
        ("fe80::1%eth0", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("*", False),
        ("both", False),
        ("old", False),
        ("new", True),
        ("nobody", False),
    ],
)
def test_a_mesh_speaks_ipv6_where_its_router_has_no_other_address(host: str, answer: bool) -> None:
    assert speaks_ipv6(host, look_up) is answer


def test_the_host_of_a_control_address_comes_without_brackets() -> None:
    assert [control_host(f"tcp://{host}:5577") for host in ("[::1]", "router", "10.0.0.1", "*")] == [
        "::1",
        "router",
        "10.0.0.1",
        "*",
    ]
    with pytest.raises(ConfigurationError, match=r"stands in brackets: tcp://\[::1\]:PORT"):
        control_host("tcp://::1:5577")
    with pytest.raises(ConfigurationError, match="must be ipc://PATH or tcp://HOST:PORT"):
        control_host("tcp://router:65536")


@pytest.mark.parametrize("name", ["tcp://host", "host:5577", "[host]", "a b"])
def test_a_name_for_peers_is_a_name_or_an_address(name: str) -> None:
    with pytest.raises(ConfigurationError, match="ADVERTISE_HOST="):
        advertised_host(name)


@pytest.mark.parametrize(
    ("addresses", "with_ipv6", "own"),
    [
        (["10.0.0.1", "fd00::1"], False, "10.0.0.1"),
        (["10.0.0.1", "fd00::1"], True, "fd00::1"),
        (["fe80::1", "fd00::1"], True, "fd00::1"),
        (["10.0.0.1"], True, "10.0.0.1"),
    ],
)
def test_the_own_address_is_one_that_the_mesh_reaches(addresses: list[str], with_ipv6: bool, own: str) -> None:
    assert own_address(with_ipv6, lambda name: addresses) == own


@pytest.mark.parametrize(("addresses", "with_ipv6"), [(["fe80::1"], True), (["fd00::1"], False), ([], False)])
def test_a_host_without_an_address_for_peers_says_what_to_set(addresses: list[str], with_ipv6: bool) -> None:
    with pytest.raises(ConfigurationError, match="ADVERTISE_HOST is not set"):
        own_address(with_ipv6, lambda name: addresses)


@pytest.fixture
def transport() -> Iterator[Transport]:
    made = Transport(SocketLimits())
    yield made
    made.close()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize(("bound", "asked"), [("[::1]", "[::1]"), ("[::]", "127.0.0.1"), ("[::]", "[::1]")])
def test_messages_go_over_ipv6_and_a_socket_on_all_addresses_takes_both(
    bound: str, asked: str, transport: Transport
) -> None:
    listener = transport.pull("steps", [f"tcp://{bound}:*"])
    (endpoint,) = listener.endpoints
    peer = transport.push("peer", f"tcp://{asked}:{endpoint.rpartition(':')[2]}")

    def sends() -> bool:
        try:
            peer.send(Leave("hello"), Header())
        except Full:
            return False
        return True

    try:
        wait_until(sends, 10, "a connection")
        wait_until(lambda: listener.receive() is not None, 10, "a message")
    finally:
        peer.close()
        listener.close()
