"""Pings that a process echoes on threads of their own, over real sockets."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from common.errors import ProtocolError
from common.ids import NodeId
from common.node.control_link import NodeAddresses
from common.wire.transport import SocketLimits, Transport
from services.router.mesh.sockets import MeshClient

WITHIN_S = 5.0


class StrictTransport(Transport):
    def tell_damaged(self, name: str, error: ProtocolError) -> None:
        raise AssertionError(f"{name}: {error}")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a socket's path has an end."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


@pytest.fixture
def router(folder: Path) -> Iterator[MeshClient]:
    transport = StrictTransport(SocketLimits())
    addresses = NodeAddresses(f"ipc://{folder}/control", "", f"ipc://{folder}/router-{{socket}}", folder=folder)
    client = MeshClient(transport, addresses, 1, structlog.get_logger())
    try:
        yield client
    finally:
        client.close()
        transport.close()


@pytest.fixture
def node(router: MeshClient) -> Iterator[Transport]:
    transport = StrictTransport(SocketLimits())
    transport.echo(router.pulses.endpoints[0], b"stage-1")
    try:
        yield transport
    finally:
        transport.close()


def echoed(router: MeshClient, node: str, within_s: float = WITHIN_S) -> int | None:
    """The newest ping that came back; asks again and again, since a connection takes a while to stand."""
    deadline_s, number = time.monotonic() + within_s, 0
    while time.monotonic() < deadline_s:
        number += 1
        router.ping([NodeId(node)], number)
        time.sleep(0.01)
        found = [ping for who, ping in router.echoes() if who == node]
        if found:
            return found[-1]
    return None


def test_a_ping_comes_back_with_its_number(router: MeshClient, node: Transport) -> None:
    assert echoed(router, "stage-1") is not None


def test_a_main_thread_that_holds_the_interpreter_answers_all_the_same(router: MeshClient, node: Transport) -> None:
    """The router and the node share it here: the pings are sent first, and nothing runs until they are back."""
    assert echoed(router, "stage-1") is not None
    router.ping([NodeId("stage-1")], 10**6)
    deadline_s = time.perf_counter() + 0.3
    number = 3**200_000
    while time.perf_counter() < deadline_s:
        number % (3**199_999)  # one instruction of the interpreter, some milliseconds long
    assert ("stage-1", 10**6) in router.echoes()


def test_who_is_not_there_is_pinged_without_harm(router: MeshClient) -> None:
    assert echoed(router, "stage-2", within_s=0.2) is None


def test_a_transport_that_is_closed_echoes_no_more_and_its_end_is_waited_for(router: MeshClient) -> None:
    transport = StrictTransport(SocketLimits())
    transport.echo(router.pulses.endpoints[0], b"stage-3")
    assert echoed(router, "stage-3") is not None
    began_s = time.monotonic()
    transport.close()
    assert time.monotonic() - began_s < 1.0
    router.echoes()
    assert echoed(router, "stage-3", within_s=0.2) is None


def test_what_a_router_before_this_one_asked_is_no_answer(router: MeshClient, node: Transport) -> None:
    assert echoed(router, "stage-1") is not None
    router.pulses.raw.send_multipart([b"stage-1", b"12345678" + bytes(8)])
    router.pulses.raw.send_multipart([b"stage-1", b""])
    time.sleep(0.2)
    assert [node_id for node_id, ping in router.echoes() if not ping] == []


def test_an_echo_that_is_asked_for_again_stays_and_another_address_replaces_it(router: MeshClient) -> None:
    transport = StrictTransport(SocketLimits())
    try:
        for endpoint in (f"{router.pulses.endpoints[0]}-of-another", *router.pulses.endpoints * 2):
            transport.echo(endpoint, b"stage-4")
        assert echoed(router, "stage-4") is not None
    finally:
        transport.close()
