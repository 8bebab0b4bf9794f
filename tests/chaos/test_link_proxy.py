"""The proxy between two real sockets of the mesh's own kind, with the limits that ship."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from chaos.proxy.link_proxy import Link, LinkProxy, RuleBook
from chaos.proxy.link_rules import LinkRule, around
from chaos.proxy.zmtp_frames import FrameRule
from common.errors import ProtocolError
from common.messages import Header, Leave
from common.wire.transport import Full, LinkEvent, MessageSocket, RoutingSocket, SocketLimits, Transport

WITHIN_S = 5.0


@dataclass
class Ends:
    """A stage that asks an expert through the proxy."""

    proxy: LinkProxy
    stage: MessageSocket
    expert: RoutingSocket
    damaged: list[ProtocolError] = field(default_factory=list)
    stage_id: bytes = b"stage"

    def ask(self, text: str) -> None:
        """Sends as soon as there is a connection."""
        deadline_s = time.monotonic() + WITHIN_S
        while True:
            try:
                return self.stage.send(Leave(text), Header())
            except Full:
                assert time.monotonic() < deadline_s, "the stage was never connected"
                time.sleep(0.005)

    def heard(self, count: int, within_s: float = WITHIN_S) -> list[str]:
        """What the expert hears until it is so much, or the time is over."""
        found: list[str] = []
        deadline_s = time.monotonic() + within_s
        while len(found) < count and time.monotonic() < deadline_s:
            if (received := self.expert.receive()) is not None:
                assert isinstance(received[1], Leave)
                found.append(received[1].reason)
            else:
                time.sleep(0.002)
        return found


class ListeningTransport(Transport):
    def __init__(self, limits: SocketLimits) -> None:
        super().__init__(limits)
        self.damaged: list[ProtocolError] = []

    def tell_damaged(self, name: str, error: ProtocolError) -> None:
        self.damaged.append(error)


@pytest.fixture
def ends() -> Iterator[Ends]:
    ports: set[int] = set()
    with LinkProxy(lambda host, port: "expert" if port in ports else "stage") as proxy:
        transport = ListeningTransport(SocketLimits(socks_proxy=proxy.address))
        try:
            # A port that the system gives to this socket: one that was looked for before may be taken since.
            expert = transport.router("calls", ["tcp://127.0.0.1:*"])
            (endpoint,) = expert.endpoints
            ports.add(int(endpoint.rpartition(":")[2]))
            stage = transport.dealer("calls", endpoint, identity=b"stage")
            yield Ends(proxy, stage, expert, transport.damaged)
        finally:
            transport.close()


def test_messages_go_through_and_the_link_is_known_by_its_ends(ends: Ends) -> None:
    for number in range(20):
        ends.ask(str(number))
    assert ends.heard(20) == [str(number) for number in range(20)]
    assert ends.proxy.links() == [("stage", "expert")]


def test_a_delay_delays_and_keeps_the_order_and_ends(ends: Ends) -> None:
    ends.ask("before")
    ends.heard(1)
    rules = around("expert", LinkRule(delay_ms=150.0))
    ends.proxy.add(rules)
    started_s = time.monotonic()
    for number in range(5):
        ends.ask(str(number))
    assert ends.heard(5) == ["0", "1", "2", "3", "4"]
    assert time.monotonic() - started_s >= 0.15
    ends.proxy.remove(rules)
    # The quickest of several: the machine may be busy, the rule may not hold.
    assert min(seconds_until_heard(ends) for _ in range(10)) < 0.1


def seconds_until_heard(ends: Ends) -> float:
    started_s = time.monotonic()
    ends.ask("after")
    assert ends.heard(1) == ["after"]
    return time.monotonic() - started_s


def test_what_is_sent_into_a_short_stall_arrives_when_it_ends(ends: Ends) -> None:
    ends.ask("before")
    ends.heard(1)
    rules = around("expert", LinkRule(is_stalled=True))
    ends.proxy.add(rules)
    ends.ask("held")
    assert ends.heard(1, within_s=0.3) == []
    ends.proxy.remove(rules)
    assert ends.heard(1) == ["held"]


def test_a_stall_of_one_direction_holds_the_other_not(ends: Ends) -> None:
    ends.ask("before")
    ends.heard(1)
    ends.proxy.add([LinkRule("stage", "expert", is_stalled=True)])
    ends.ask("held")
    ends.expert.send(b"stage", Leave("answer"), Header())
    deadline_s = time.monotonic() + WITHIN_S
    while (answer := ends.stage.receive()) is None and time.monotonic() < deadline_s:
        time.sleep(0.002)
    assert answer is not None
    assert ends.heard(1, within_s=0.1) == []


def test_in_a_long_stall_the_stage_gives_the_link_up_and_comes_back_after_it(ends: Ends) -> None:
    ends.ask("before")
    ends.heard(1)
    ends.stage.link_events()
    rules = around("expert", LinkRule(is_stalled=True))
    ends.proxy.add(rules)
    deadline_s = time.monotonic() + WITHIN_S
    while LinkEvent.CLOSED not in ends.stage.link_events():
        assert time.monotonic() < deadline_s, "its heartbeat sees no stall"
        time.sleep(0.01)
    ends.proxy.remove(rules)
    ends.ask("again")
    assert ends.heard(1) == ["again"]


def test_a_half_closed_link_ends_at_the_peer_and_is_made_anew(ends: Ends) -> None:
    ends.ask("before")
    ends.heard(1)
    assert ends.proxy.half_close("expert") == 1
    deadline_s = time.monotonic() + WITHIN_S
    while ends.heard(1, within_s=0.2) == []:
        assert time.monotonic() < deadline_s, "the link did not come back"
        ends.ask("after")


def test_a_damaged_message_is_refused_by_its_checksum_and_the_next_one_is_heard(ends: Ends) -> None:
    ends.ask("before")
    ends.heard(1)
    rules = [LinkRule("stage", "expert", frames=(FrameRule("corrupt", 1.0, seed=3),))]
    ends.proxy.add(rules)
    ends.ask("damaged")
    assert ends.heard(1, within_s=0.3) == []
    assert len(ends.damaged) == 1
    ends.proxy.remove(rules)
    ends.ask("whole")
    assert ends.heard(1) == ["whole"]


def test_replayed_and_reordered_messages_arrive_so(ends: Ends) -> None:
    ends.ask("before")
    ends.heard(1)
    rules = [LinkRule("stage", "expert", frames=(FrameRule("replay", 1.0, seed=1),))]
    ends.proxy.add(rules)
    ends.ask("twice")
    assert ends.heard(3, within_s=0.3) == ["twice", "twice"]
    ends.proxy.remove(rules)
    ends.proxy.add([LinkRule("stage", "expert", frames=(FrameRule("reorder", 1.0, seed=1),))])
    ends.ask("first")
    ends.ask("second")
    assert ends.heard(2) == ["second", "first"]


def test_bandwidth_bounds_how_fast_bytes_arrive(ends: Ends) -> None:
    ends.ask("before")
    ends.heard(1)
    ends.proxy.add([LinkRule("stage", "expert", bytes_per_s=100_000.0)])
    started_s = time.monotonic()
    ends.ask("x" * 30_000)
    assert len(ends.heard(1)[0]) == 30_000
    assert time.monotonic() - started_s >= 0.25


def test_the_end_of_a_peer_is_told_at_once(ends: Ends) -> None:
    ends.ask("before")
    ends.heard(1)
    ends.stage.link_events()
    ends.expert.close()
    started_s = time.monotonic()
    while LinkEvent.CLOSED not in ends.stage.link_events():
        assert time.monotonic() - started_s < WITHIN_S
        time.sleep(0.002)
    assert time.monotonic() - started_s < 0.15


def test_both_sides_are_closed_also_when_the_proxy_ends_while_a_link_ends() -> None:
    async def scenario() -> bool:
        far_ends = [socket.socketpair(), socket.socketpair()]
        near, far = [await asyncio.open_connection(sock=ours) for ours, _ in far_ends]
        carrying = asyncio.create_task(Link(RuleBook(), "stage", "expert").carry(near, far))
        await asyncio.sleep(0.01)
        carrying.cancel()
        await asyncio.sleep(0)
        carrying.cancel()
        await asyncio.gather(carrying, return_exceptions=True)
        closed = near[1].is_closing() and far[1].is_closing()
        for _, theirs in far_ends:
            theirs.close()
        return closed

    assert asyncio.run(scenario())
