"""A node's side of the control link."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from common.config import Settings
from common.errors import ConfigurationError, NodeLostError, NotReadyError
from common.ids import NodeId
from common.messages import (
    AssignStage,
    Failed,
    Header,
    Hello,
    Leave,
    LeaveAcknowledged,
    StageHeartbeat,
    Unassign,
    Welcome,
)
from common.node.control_link import (
    AWAY_S,
    HELLO_INTERVAL_S,
    SILENCE_S,
    ControlLink,
    NodeAddresses,
    draw_identity,
    find_addresses,
)
from common.topology import NodeKind
from common.wire.transport import LinkEvent
from tests.support.nodes.memory_transport import MemorySocket, MemoryTransport

WELCOME = Welcome(250, "float32", "exact", 32, 1, 20_000)
BEAT = StageHeartbeat(0.5, steps=1, rows=2, calls=1, call_seconds=0.25, call_bytes=5)
ASSIGN = AssignStage(0, 0, 1, 0, 5, 1, 10, ("tcp://a:1",), "")


class Link(ControlLink):
    def __init__(self, endpoint: str = "tcp://a:1") -> None:
        hello = Hello("stage-1", 1, "stage", 5, "host", "cpu", "print", (endpoint,), ("tcp://a:2",), "")
        transport: Any = MemoryTransport()
        self.silences: list[tuple[float, bool]] = []
        super().__init__(transport, NodeAddresses("ipc:///control", "", "ipc:///{socket}"), hello)
        self.peer: MemorySocket = transport.sockets["control"]
        self.files: MemoryTransport = transport

    def _tell_silence(self, silent_s: float) -> None:
        self.silences.append((silent_s, self._connected))

    def event(self, event: LinkEvent) -> None:
        self.peer.events.append(event)

    def sent(self) -> list[Any]:
        return [message for message, _ in self.peer.take_sent()]


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def registered(link: Link) -> Link:
    link.event(LinkEvent.CONNECTED)
    link.receive(0.0)
    link.peer.say(WELCOME, Header(router_term=3))
    link.receive(0.1)
    link.peer.take_sent()
    assert link.registered
    return link


def test_its_identity_is_its_id(link: Link) -> None:
    assert link.peer.identity == b"stage-1"
    assert link.peer.endpoints == ("ipc:///control",)


def test_it_says_hello_as_soon_as_the_router_is_there_and_not_before(link: Link) -> None:
    link.receive(0.0)
    assert link.sent() == []
    link.event(LinkEvent.CONNECTED)
    link.receive(0.0)
    (hello,) = link.sent()
    assert isinstance(hello, Hello)
    assert (hello.node_id, hello.node_kind, hello.capacity_bytes, hello.endpoints) == (
        "stage-1",
        "stage",
        5,
        ("tcp://a:1",),
    )


def test_it_repeats_its_hello_until_it_is_welcome(link: Link) -> None:
    link.event(LinkEvent.CONNECTED)
    for now_s in (0.0, 0.5 * HELLO_INTERVAL_S, HELLO_INTERVAL_S, 1.5 * HELLO_INTERVAL_S):
        link.receive(now_s)
    assert [type(message) for message in link.sent()] == [Hello, Hello]
    link.peer.say(WELCOME)
    link.receive(1.6)
    link.receive(9.0)
    assert link.sent() == []
    assert link.registered


def test_it_beats_at_the_routers_pace_and_only_while_registered(link: Link) -> None:
    link.beat(0.0, lambda: BEAT)
    assert link.sent() == []
    link.event(LinkEvent.CONNECTED)
    link.receive(0.0)
    link.peer.say(WELCOME)
    link.receive(0.0)
    link.peer.take_sent()
    for now_ms in range(0, 1000, 50):
        link.beat(now_ms / 1000, lambda: BEAT)
    assert link.sent() == [BEAT] * 4
    link.event(LinkEvent.CLOSED)
    link.receive(2.0)
    link.beat(2.0, lambda: BEAT)
    assert link.sent() == []


def test_a_router_that_is_not_there_is_said_and_said_again_after_twice_the_time(link: Link) -> None:
    for now_s in range(100):
        link.receive(float(now_s))
    assert link.silences == [(SILENCE_S * times, False) for times in (1, 2, 4, 8, 16)]


def test_a_router_that_is_connected_and_does_not_take_a_node_in_is_said_as_such(registered: Link) -> None:
    registered.receive(100.0)
    assert registered.silences == []
    registered.event(LinkEvent.CLOSED)
    registered.event(LinkEvent.CONNECTED)
    registered.receive(101.0)
    registered.receive(101.0 + SILENCE_S)
    assert registered.silences == [(SILENCE_S, True)]


def test_when_the_router_comes_back_it_says_hello_again_at_once(registered: Link) -> None:
    registered.event(LinkEvent.CLOSED)
    registered.receive(0.2)
    assert not registered.registered
    assert registered.settings == WELCOME, "work goes on by what the router said last"
    registered.event(LinkEvent.CONNECTED)
    registered.receive(0.3)
    assert [type(message) for message in registered.sent()] == [Hello]


def test_what_waits_of_a_router_that_is_gone_is_not_obeyed_after_the_hello_to_the_next(registered: Link) -> None:
    registered.event(LinkEvent.CLOSED)
    registered.event(LinkEvent.CONNECTED)
    registered.peer.say(WELCOME, Header(router_term=3))
    registered.peer.say(ASSIGN, Header(router_term=3, generation=8))
    assert registered.receive(0.3) == []
    assert [type(message) for message in registered.sent()] == [Hello]
    assert not registered.registered
    registered.peer.say(WELCOME, Header(router_term=4))
    registered.peer.say(ASSIGN, Header(router_term=4, generation=9))
    assert [header.generation for _, header in registered.receive(0.4)] == [9]


def test_a_refusal_that_was_not_read_before_its_router_was_gone_counts_all_the_same(registered: Link) -> None:
    reconnected = (LinkEvent.CLOSED, LinkEvent.CONNECTED)
    for event in reconnected:
        registered.event(event)
    registered.peer.say(Failed("node_lost", "declared dead"), Header(router_term=2))
    assert registered.receive(0.3) == [], "that one was fenced before"
    for event in reconnected:
        registered.event(event)
    registered.peer.say(Failed("node_lost", "declared dead"), Header(router_term=3))
    with pytest.raises(NodeLostError, match="declared dead"):
        registered.receive(0.4)


def test_before_the_first_welcome_there_are_no_settings(link: Link) -> None:
    with pytest.raises(NotReadyError):
        _ = link.settings


def test_what_it_is_asked_comes_out_in_order_with_its_header(registered: Link) -> None:
    registered.peer.say(ASSIGN, Header(router_term=3, generation=7))
    registered.peer.say(Unassign(1), Header(router_term=3))
    assert registered.receive(0.2) == [
        (ASSIGN, Header(router_term=3, generation=7)),
        (Unassign(1), Header(router_term=3)),
    ]


def test_a_router_of_an_older_term_is_not_obeyed(registered: Link) -> None:
    for message in (ASSIGN, Failed("not_ready", "go away"), LeaveAcknowledged()):
        registered.peer.say(message, Header(router_term=2))
    assert registered.receive(0.2) == []
    assert not registered.leave_acknowledged


def test_what_it_says_carries_the_term_that_it_knows(registered: Link) -> None:
    registered.peer.say(Unassign(1), Header(router_term=5))
    registered.receive(0.2)
    registered.send(BEAT, Header(step=9))
    assert registered.peer.take_sent() == [(BEAT, Header(router_term=5, step=9))]


def test_a_refusal_is_raised_as_the_error_that_it_names(registered: Link) -> None:
    registered.peer.say(Failed("not_ready", "stage-1 was declared dead"), Header(router_term=3))
    with pytest.raises(NotReadyError, match="declared dead"):
        registered.receive(0.2)


def test_what_cannot_be_sent_is_said_so_and_harms_nothing(registered: Link) -> None:
    registered.peer.takes_messages = False
    assert registered.send(BEAT) is False
    registered.fail(NotReadyError("x"))
    registered.leave("stopped")
    registered.peer.takes_messages = True
    assert registered.send(BEAT) is True


def test_a_failure_carries_the_code_and_the_counters_of_what_failed(registered: Link) -> None:
    registered.fail(NotReadyError("no layers"), Header(step=4, generation=2))
    assert registered.peer.take_sent() == [
        (Failed("not_ready", "no layers"), Header(router_term=3, step=4, generation=2))
    ]


def test_it_leaves_when_the_router_lets_it_go(registered: Link) -> None:
    registered.leave("stopped")
    assert registered.sent() == [Leave("stopped")]
    assert not registered.leave_acknowledged
    registered.peer.say(LeaveAcknowledged(), Header(router_term=3))
    registered.receive(0.3)
    assert registered.leave_acknowledged


def test_each_start_is_another_incarnation_with_its_name() -> None:
    identities = [draw_identity(NodeKind.EXPERT) for _ in range(20)]
    assert len({incarnation for _, incarnation in identities}) == 20
    for node_id, incarnation in identities:
        assert node_id == f"expert-{incarnation:016x}"
        assert 0 < incarnation < 2**63


def settings(**values: Any) -> Settings:
    return Settings(model="m", **values)


def test_without_a_control_endpoint_a_mesh_lives_in_its_state_folder() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve() / "ipc"
        addresses = find_addresses(settings(state_dir=Path(name)), NodeId("stage-1"))
        assert addresses.control == f"ipc://{folder}/control"
        assert addresses.bind_pattern.format(socket="data") == f"ipc://{folder}/stage-1-data"
        assert addresses.folder_token
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_state_folder_may_have_any_name() -> None:
    with tempfile.TemporaryDirectory(prefix="{socket}{0}") as folder:  # pytest's own paths are too long for a socket
        addresses = find_addresses(settings(state_dir=Path(folder)), NodeId("stage-1"))
        assert addresses.bind_pattern.format(socket="data") == f"ipc://{folder}/ipc/stage-1-data"


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="STATE_DIR="):
        find_addresses(settings(state_dir=tmp_path / "file"), NodeId("stage-1"))


def test_over_tcp_a_node_listens_where_its_peers_reach_it() -> None:
    addresses = find_addresses(settings(control="tcp://127.0.0.1:5550"), NodeId("stage-1"))
    assert (addresses.bind_pattern, addresses.folder_token) == ("tcp://127.0.0.1:*", "")
    addresses = find_addresses(settings(control="tcp://router:5550", advertise_host="10.0.0.7"), NodeId("stage-1"))
    assert addresses.bind_pattern == "tcp://0.0.0.0:*"
    assert addresses.advertised(("tcp://0.0.0.0:4001",)) == ("tcp://10.0.0.7:4001",)


@pytest.mark.parametrize(
    ("control", "advertise_host", "pattern", "bound", "advertised"),
    [
        ("tcp://[::1]:5577", "", "tcp://[::1]:*", "tcp://[::1]:4001", "tcp://[::1]:4001"),
        ("tcp://[fd00::1]:5577", "fd00::7", "tcp://[::]:*", "tcp://[::]:4001", "tcp://[fd00::7]:4001"),
        ("tcp://[fd00::1]:5577", "[fd00::7]", "tcp://[::]:*", "tcp://[::]:4001", "tcp://[fd00::7]:4001"),
        ("tcp://[::]:5577", "node", "tcp://[::]:*", "tcp://[::]:4001", "tcp://node:4001"),
        ("tcp://10.0.0.1:5577", "fd00::7", "tcp://[::]:*", "tcp://[::]:4001", "tcp://[fd00::7]:4001"),
        ("tcp://127.0.0.2:5577", "", "tcp://127.0.0.1:*", "tcp://127.0.0.1:4001", "tcp://127.0.0.1:4001"),
    ],
)
def test_ipv6_addresses_stand_in_brackets_wherever_a_peer_reads_them(
    control: str, advertise_host: str, pattern: str, bound: str, advertised: str
) -> None:
    addresses = find_addresses(settings(control=control, advertise_host=advertise_host), NodeId("stage-1"))
    assert addresses.bind_pattern == pattern
    assert addresses.advertised((bound,)) == (advertised,)


@pytest.mark.parametrize(
    "control",
    ["router:5550", "http://router:5550", "tcp://", "udp://a:1", "tcp://::1:5550", "tcp://[::1:5550", "tcp://[a]:5550"],
)
def test_a_control_endpoint_of_another_kind_is_named(control: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(f"CONTROL={control}")):
        find_addresses(settings(control=control), NodeId("stage-1"))


def test_a_folder_for_sockets_that_belongs_to_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ConfigurationError, match="belongs to another user"):
        find_addresses(settings(state_dir=tmp_path), NodeId("stage-1"))


def registered_with_files() -> Link:
    link = Link("ipc:///run/mesh/stage-1-data")
    link.event(LinkEvent.CONNECTED)
    link.receive(0.0)
    link.peer.say(WELCOME, Header(router_term=3))
    link.receive(0.1)
    link.peer.take_sent()
    return link


def reconnect(link: Link, now_s: float) -> None:
    link.event(LinkEvent.CLOSED)
    link.event(LinkEvent.CONNECTED)
    link.receive(now_s)


def test_a_node_whose_socket_files_were_removed_while_it_was_away_does_not_join_the_next_router() -> None:
    """A router that took it for dead has removed them; the next one does not know."""
    link = registered_with_files()
    link.files.has_lost_files = True
    link.receive(0.1 + 2 * AWAY_S)
    with pytest.raises(NodeLostError, match="come back as another incarnation"):
        reconnect(link, 2.0)
    assert link.sent() == []


def test_a_node_whose_socket_files_somebody_removed_goes_on_as_it_is() -> None:
    link = registered_with_files()
    link.files.has_lost_files = True
    link.receive(0.1 + AWAY_S / 2)
    reconnect(link, 0.1 + AWAY_S)
    assert [type(message) for message in link.sent()] == [Hello]


def test_a_node_that_its_router_still_speaks_to_was_not_taken_for_dead() -> None:
    link = registered_with_files()
    link.files.has_lost_files = True
    link.receive(0.1 + 2 * AWAY_S)
    link.peer.say(Unassign(1), Header(router_term=3))
    link.receive(1.4)
    reconnect(link, 1.5)
    assert [type(message) for message in link.sent()] == [Hello]
