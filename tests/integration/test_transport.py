"""Sockets as they are: messages arrive, a full queue is said so, a peer's end is seen, damage is survived."""

from __future__ import annotations

import contextlib
import os
import re
import socket as system_socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest
import zmq

from common.errors import ConfigurationError, ProtocolError, SocketError
from common.messages import Dispatch, ExpertRows, Header, Leave, LeaveAcknowledged, TensorFrame
from common.wire.array import array_to_frame
from common.wire.codec import encode
from common.wire.transport import Full, LinkEvent, MessageSocket, RoutingSocket, SocketLimits, Transport
from tests.support.processes.tcp_resends import ResendTimes, needs_the_options, resend_times

LIMIT_MS = 10_000
Kept = TypeVar("Kept", MessageSocket, RoutingSocket)


class KeptTransport(Transport):
    """Holds on to its sockets, as the owner of a process's sockets does, and closes them with itself."""

    def __init__(self, limits: SocketLimits | None = None) -> None:
        super().__init__(limits or SocketLimits())
        self.kept: list[MessageSocket | RoutingSocket] = []
        self.damaged: list[tuple[str, str]] = []
        """Socket and reason of each damaged message."""

    def tell_damaged(self, name: str, error: ProtocolError) -> None:
        self.damaged.append((name, str(error)))

    def pull(self, name: str, endpoints: Sequence[str]) -> MessageSocket:
        return self._keep(super().pull(name, endpoints))

    def push(self, name: str, endpoint: str, *, is_watched: bool = False) -> MessageSocket:
        return self._keep(super().push(name, endpoint, is_watched=is_watched))

    def dealer(
        self, name: str, endpoint: str, identity: bytes = b"", limits: SocketLimits | None = None
    ) -> MessageSocket:
        return self._keep(super().dealer(name, endpoint, identity, limits))

    def router(self, name: str, endpoints: Sequence[str], limits: SocketLimits | None = None) -> RoutingSocket:
        return self._keep(super().router(name, endpoints, limits))

    def _keep(self, socket: Kept) -> Kept:
        self.kept.append(socket)
        return socket

    def close(self) -> None:
        for socket in self.kept:
            socket.close()
        super().close()


@pytest.fixture
def tcp() -> Iterator[KeptTransport]:
    transport = KeptTransport()
    yield transport
    transport.close()


@pytest.fixture
def transport() -> Iterator[KeptTransport]:
    made = KeptTransport()
    yield made
    made.close()


@pytest.fixture(params=["tcp", "ipc"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "tcp":
        yield "tcp://127.0.0.1:*"
        return
    with tempfile.TemporaryDirectory() as folder:  # pytest's own paths are too long for a socket
        yield f"ipc://{folder}/socket"


def wait(socket: Any, receive: Callable[[], Any]) -> Any:
    """What comes first; polls in place of sleeping."""
    raw = socket.raw if isinstance(socket, MessageSocket | RoutingSocket) else socket
    for _ in range(100):
        received = receive()
        if received:
            return received
        raw.poll(LIMIT_MS // 100)
    raise AssertionError("nothing came")


def wait_for_link(socket: MessageSocket, wanted: LinkEvent) -> None:
    seen: list[LinkEvent] = []
    while wanted not in seen:
        seen += wait(socket.monitor, socket.link_events)


def try_to_send(push: MessageSocket, message: ExpertRows) -> bool:
    try:
        push.send(message, Header())
    except Full:
        return False
    return True


def rows(number: int, size: int = 4) -> ExpertRows:
    return ExpertRows(number, array_to_frame(np.full((size, 1), number, dtype=np.int32)))


def test_a_pipeline_carries_messages_in_order_and_counts_them(transport: Transport, address: str) -> None:
    pull = transport.pull("steps", [address])
    push = transport.push("next", pull.endpoints[0])
    wait_for_link(push, LinkEvent.CONNECTED)
    for number in range(3):
        push.send(rows(number), Header(step=number))
    for number in range(3):
        message, header = wait(pull, pull.receive)
        assert (header.step, header.sequence_number) == (number, number + 1)
        assert message == rows(number)
    assert pull.receive() is None
    assert push.bytes_sent > 3 * 16


def test_a_question_and_its_answer(transport: Transport, address: str) -> None:
    router = transport.router("control", [address])
    dealer = transport.dealer("to router", router.endpoints[0], identity=b"stage-1")
    wait_for_link(dealer, LinkEvent.CONNECTED)
    dealer.send(Leave("stopped"), Header())
    identity, message, _ = wait(router, router.receive)
    assert (identity, message) == (b"stage-1", Leave("stopped"))
    router.send(identity, LeaveAcknowledged(), Header(router_term=3))
    assert wait(dealer, dealer.receive) == (LeaveAcknowledged(), Header(router_term=3))


def test_large_tensors_arrive_whole(transport: Transport, address: str) -> None:
    router = transport.router("calls", [address])
    dealer = transport.dealer("to expert", router.endpoints[0])
    wait_for_link(dealer, LinkEvent.CONNECTED)
    hidden = np.random.default_rng(1).integers(0, 255, (512, 4096)).astype(np.uint8)
    empty = TensorFrame("float32", (0,), b"")
    dealer.send(Dispatch(1, array_to_frame(hidden), TensorFrame("int32", (3, 0), b""), empty), Header())
    _, message, _ = wait(router, router.receive)
    assert isinstance(message, Dispatch)
    assert bytes(message.hidden.data) == hidden.tobytes()


def test_a_socket_without_a_peer_says_full_and_keeps_nothing(transport: Transport) -> None:
    """IMMEDIATE: what is queued for nobody would go to whoever comes."""
    push = transport.push("next", "tcp://127.0.0.1:9")
    with pytest.raises(Full, match="next"):
        push.send(rows(1), Header())
    assert push.bytes_sent == 0


def test_a_peer_that_does_not_read_makes_the_queue_full_and_the_sender_does_not_block() -> None:
    limits = SocketLimits(high_water_mark=4, receive_high_water_mark=4)
    with contextlib.closing(KeptTransport(limits)) as small:
        pull = small.pull("steps", ["tcp://127.0.0.1:*"])
        push = small.push("next", pull.endpoints[0])
        wait_for_link(push, LinkEvent.CONNECTED)
        sent = 0
        while try_to_send(push, rows(sent, 1 << 16)):
            sent += 1
        assert 4 <= sent < 10_000
        for number in range(sent):
            message, header = wait(pull, pull.receive)
            assert message.call == number
            assert header.sequence_number == number + 1, "what was refused has no number: there is no gap"


SLOW_READER = """
import sys, time, zmq
from common.wire.transport import SocketLimits, Transport
transport = Transport(SocketLimits(heartbeat_interval_ms=20, heartbeat_timeout_ms=1000))
router = transport.router("calls", ["tcp://127.0.0.1:*"])
print(router.endpoints[0], flush=True)
until_s = time.monotonic() + float(sys.argv[1])
while time.monotonic() < until_s:
    if router.raw.poll(10):
        for _ in range(200):
            try:
                router.raw.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
        time.sleep(0.01)
"""


@pytest.mark.slow
def test_peers_that_send_faster_than_they_are_read_and_vanish_do_not_end_the_process() -> None:
    reader = subprocess.Popen([sys.executable, "-c", SLOW_READER, "12"], stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    with reader.stdout, zmq.Context() as context:
        endpoint = reader.stdout.readline().strip()
        for pause_s in (0, 0.02, 0.1, 0.3) * 4:
            with context.socket(zmq.DEALER) as peer:
                peer.setsockopt(zmq.LINGER, 0)
                peer.setsockopt(zmq.SNDHWM, 0)
                peer.connect(endpoint)
                for _ in range(6000):
                    peer.send(b"x" * 200)
                time.sleep(pause_s)
            time.sleep(0.1)
        assert reader.wait(20) == 0


def test_a_peer_that_is_gone_or_was_never_there_is_full_too(transport: Transport, address: str) -> None:
    router = transport.router("control", [address])
    with pytest.raises(Full):
        router.send(b"nobody", LeaveAcknowledged(), Header())
    dealer = transport.dealer("to router", router.endpoints[0], identity=b"stage-1")
    wait_for_link(dealer, LinkEvent.CONNECTED)
    dealer.send(Leave("x"), Header())
    wait(router, router.receive)
    dealer.close()
    for _ in range(1000):
        try:
            router.send(b"stage-1", LeaveAcknowledged(), Header())
        except Full:
            return
        router.raw.poll(5)
    raise AssertionError("the router never noticed")


def test_the_end_of_a_peer_is_seen_and_so_is_its_return(transport: Transport, address: str) -> None:
    bound = KeptTransport()
    lifeline = bound.router("lifeline", [address])
    endpoint = lifeline.endpoints[0]
    watcher = transport.dealer("watch", endpoint)
    wait_for_link(watcher, LinkEvent.CONNECTED)
    lifeline.close()
    bound.close()
    wait_for_link(watcher, LinkEvent.CLOSED)
    with pytest.raises(Full):
        watcher.send(Leave("x"), Header())
    back = transport.router("lifeline", [endpoint])
    wait_for_link(watcher, LinkEvent.CONNECTED)
    watcher.send(Leave("again"), Header())
    assert wait(back, back.receive)[1] == Leave("again")


def test_a_new_connection_of_the_same_node_takes_over_its_name(transport: Transport, address: str) -> None:
    router = transport.router("control", [address])
    first = transport.dealer("first", router.endpoints[0], identity=b"stage-1")
    wait_for_link(first, LinkEvent.CONNECTED)
    second = transport.dealer("second", router.endpoints[0], identity=b"stage-1")
    wait_for_link(second, LinkEvent.CONNECTED)
    second.send(Leave("mine"), Header())
    identity, _, _ = wait(router, router.receive)
    router.send(identity, LeaveAcknowledged(), Header())
    assert wait(second, second.receive)[0] == LeaveAcknowledged()
    assert first.receive() is None


def test_damaged_messages_are_reported_and_what_follows_arrives(transport: KeptTransport, address: str) -> None:
    pull, router = transport.pull("steps", [address]), transport.router("calls", ["inproc://calls"])
    push = transport.push("next", pull.endpoints[0])
    wait_for_link(push, LinkEvent.CONNECTED)
    dealer = transport.context.socket(zmq.DEALER)
    dealer.connect("inproc://calls")
    good = [bytes(frame) for frame in encode(rows(1), Header())]
    flipped = [good[0], bytes([good[1][0] ^ 1]) + good[1][1:]]
    for frames in ([b""], [b"nonsense"], flipped, good[:1], [*good, b"more"], good):
        push.raw.send_multipart(frames)
        dealer.send_multipart(frames)
    message, _ = wait(pull, pull.receive)
    assert message == rows(1)
    _, routed, _ = wait(router, router.receive)
    assert routed == rows(1)
    assert [name for name, _ in transport.damaged] == ["steps"] * 5 + ["calls"] * 5
    assert all(reason for _, reason in transport.damaged)
    dealer.close(linger=0)


def test_an_oversized_message_ends_its_connection_and_nobody_elses() -> None:
    limits = SocketLimits(max_message_bytes=1 << 16)
    with contextlib.closing(KeptTransport(limits)) as small:
        pull = small.pull("steps", ["tcp://127.0.0.1:*"])
        push, other = small.push("rude", pull.endpoints[0]), small.push("kind", pull.endpoints[0])
        for socket in (push, other):
            wait_for_link(socket, LinkEvent.CONNECTED)
        push.send(rows(1, 1 << 16), Header())
        wait_for_link(push, LinkEvent.CLOSED)
        other.send(rows(2), Header())
        message, _ = wait(pull, pull.receive)
        assert message == rows(2)


def test_sockets_of_one_process_may_meet_in_memory(transport: Transport) -> None:
    router = transport.router("control", ["inproc://control"])
    dealer = transport.dealer("to router", "inproc://control", identity=b"n")
    dealer.send(Leave("x"), Header())
    assert wait(router, router.receive)[0] == b"n"


def test_closing_the_transport_frees_all_of_it_at_once() -> None:
    made = KeptTransport()
    pull = made.pull("steps", ["tcp://127.0.0.1:*"])
    push = made.push("next", pull.endpoints[0])
    wait_for_link(push, LinkEvent.CONNECTED)
    push.send(rows(1, 1 << 20), Header())
    push.close()
    made.close()
    assert made.context.closed


@pytest.mark.parametrize("endpoint", ["", "tcp://", "tcp://host", "tcp://127.0.0.1", "udp://127.0.0.1:5", "nonsense"])
def test_an_address_that_is_none_is_named(transport: Transport, endpoint: str) -> None:
    """A peer may say anything in its hello: it must not end whoever believes it."""
    for connect in (transport.dealer, transport.push):
        with pytest.raises(ConfigurationError, match="is not an address"):
            connect("to a peer", endpoint)
    with pytest.raises(ConfigurationError, match="cannot be listened on"):
        transport.pull("steps", [endpoint])


def test_an_address_that_is_taken_is_named(transport: Transport) -> None:
    pull = transport.pull("steps", ["tcp://127.0.0.1:*"])
    with pytest.raises(ConfigurationError, match=f"{pull.endpoints[0]}.* cannot be listened on"):
        transport.router("control", [pull.endpoints[0]])


@pytest.mark.parametrize("kind", ["push", "pull", "dealer", "router"])
def test_a_socket_too_many_is_an_error_that_leaves_nothing_behind(kind: str) -> None:
    with contextlib.closing(KeptTransport()) as transport:
        transport.context.set(zmq.MAX_SOCKETS, 7)

        def make(kind: str) -> MessageSocket | RoutingSocket:
            endpoint = "tcp://127.0.0.1:*"
            if kind in ("pull", "router"):
                return getattr(transport, kind)("one more", [endpoint])  # type: ignore[no-any-return]
            return getattr(transport, kind)("one more", endpoint.replace("*", "9"))  # type: ignore[no-any-return]

        def fill(kind: str) -> int:
            made: list[MessageSocket | RoutingSocket] = []
            try:
                while True:
                    made.append(make_in_time(kind))
            except SocketError as error:
                refusal = str(error)
            assert re.search(r"one more: no socket .*ulimit", refusal)
            for socket in made:
                socket.close()
            return len(made)

        def make_in_time(kind: str) -> MessageSocket | RoutingSocket:
            """ZeroMQ gives places back in a thread of its own, which may be late; a place that has leaked never comes
            back."""
            until_s = time.monotonic() + 1.0
            while True:
                try:
                    return make(kind)
                except SocketError:
                    if time.monotonic() > until_s:
                        raise
                time.sleep(0.02)

        # Each connection has two more for its monitor; what listens has them only while it is made, where it can.
        num_places = 7 if kind in ("pull", "router") else 2
        # What listens needs one place, and so finds also one that a refusal has kept.
        assert [fill(kind), fill("pull"), fill(kind), fill("pull")] == [num_places, 7, num_places, 7]


def test_more_sockets_are_allowed_than_libzmq_allows_by_itself() -> None:
    with contextlib.closing(KeptTransport()) as transport:
        assert transport.context.get(zmq.MAX_SOCKETS) > 60_000


def _same_socket(descriptor: int) -> system_socket.socket:
    """Raises OSError for what is no socket, or is closed by now."""
    copy = os.dup(descriptor)
    try:
        return system_socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _tcp_resends() -> dict[int, ResendTimes]:
    """Returns what the kernel says of this process's established TCP connections, by descriptor."""
    found = {}
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), _same_socket(descriptor) as same:
            if same.family == system_socket.AF_INET and same.type == system_socket.SOCK_STREAM:
                same.getpeername()
                found[descriptor] = resend_times(same)
    return found


def _is_sent(link: MessageSocket) -> bool:
    try:
        link.send(LeaveAcknowledged(), Header())
    except Full:
        return False
    return True


@needs_the_options
def test_both_ends_of_every_connection_send_again_soon_what_is_lost(tcp: KeptTransport) -> None:
    before = set(_tcp_resends())
    sender = tcp.push("out", tcp.pull("in", ["tcp://127.0.0.1:*"]).endpoints[0])
    control = tcp.router("control", ["tcp://127.0.0.1:*"]).endpoints[0]
    asking = tcp.dealer("to control", control)
    tcp.echo(control, b"echo")
    ours: dict[int, ResendTimes] = {}
    end_s = time.monotonic() + LIMIT_MS / 1e3
    while not all(times.are_soon for times in ours.values()) or len(ours) != 6:
        assert time.monotonic() < end_s, ours
        _is_sent(sender)
        asking.link_events()
        tcp.look_after_files(0.0)
        ours = {descriptor: times for descriptor, times in _tcp_resends().items() if descriptor not in before}
        time.sleep(0.01)


def test_what_the_owner_watches_is_left_to_the_owner(tcp: KeptTransport) -> None:
    endpoint = tcp.pull("in", ["tcp://127.0.0.1:*"]).endpoints[0]
    unwatched, watched = tcp.push("out", endpoint), tcp.push("mirror", endpoint, is_watched=True)
    for link in (unwatched, watched):
        end_s = time.monotonic() + LIMIT_MS / 1e3
        while not _is_sent(link):
            assert time.monotonic() < end_s
            time.sleep(0.01)
    time.sleep(0.1)
    _is_sent(unwatched)
    assert not unwatched.link_events()
    assert LinkEvent.CONNECTED in watched.link_events()
