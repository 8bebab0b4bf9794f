"""The expert nodes that native code calls, and how it reaches each: by a *ring*, in memory that the node has mapped
too, or by a *link*, a ZeroMQ connection to where its native code takes calls (native/call_link.h).

A node whose socket lies in the folder of the rings gets a ring, any other one a link, if it has said where. Which of
them it is changes nothing about a call. Life and death are told elsewhere, by the ZeroMQ connection for messages.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import zmq

from common.errors import ProtocolError, SocketError
from common.wire.call_ring import (
    RingMemory,
    RingOffer,
    RingShape,
    make_ring,
    new_bell,
    receive_verdict,
    ring_path,
    send_offer,
)
from common.wire.transport import LinkEvent, MessageSocket
from common.wire.zmq_functions import ZmqFunctions
from services.stage.experts.nodes import ExpertNode, ExpertNodes

OPEN_INTERVAL_S = 1.0
"""How often a node is tried again that has refused a ring, or has closed it, or whose link has broken."""
MAX_DOUBLINGS = 5
"""The interval doubles as often as a node refuses in a row."""


class LinkState(ctypes.Structure):
    """Mirrors `StageLink` in native/call_client.h."""

    _fields_ = [
        ("zmq", ctypes.c_void_p),
        ("socket", ctypes.c_void_p),
        ("seal", ctypes.c_uint64),
        ("sent_bytes", ctypes.c_int64),
        ("dropped", ctypes.c_int64),
    ]


class PeerEntry(ctypes.Structure):
    """Mirrors `RingPeer` in native/call_client.h."""

    _fields_ = [
        ("memory", ctypes.c_void_p),
        ("link", ctypes.c_void_p),
        ("bell", ctypes.c_int64),
        ("owed_rows", ctypes.c_int64),
    ]


@dataclass(slots=True, eq=False)
class Ring:
    """The ring of one node."""

    connection: socket.socket
    memory: RingMemory
    bell: int = -1
    """The node's; -1: it has not said yes yet."""

    @property
    def is_open(self) -> bool:
        """Returns whether calls may be written."""
        return self.bell >= 0

    def look(self) -> bool:
        """Takes in what the node says; returns whether it has just said yes. Raises OSError and ProtocolError where it
        has refused the ring, or has closed it."""
        with suppress(BlockingIOError):
            if not self.is_open:
                self.bell = receive_verdict(self.connection)
                return True
            if self.connection.recv(1, socket.MSG_PEEK) == b"":
                raise ConnectionResetError("the node has closed the ring")
        return False

    def entry(self) -> PeerEntry:
        """Returns it as native code has it."""
        return PeerEntry(self.memory.address, None, self.bell, 0)

    def close(self) -> None:
        """Gives it up; calls that are in it keep its memory."""
        self.connection.close()
        if self.bell >= 0:
            os.close(self.bell)
        self.bell = -1


@dataclass(slots=True, eq=False)
class Link:
    """The link to one node."""

    socket: MessageSocket
    memory: RingMemory
    """Of this process alone."""
    state: LinkState
    is_open: bool = False

    def look(self) -> bool:
        """Returns whether it has just come to stand. Raises ConnectionResetError where it has broken: what was asked
        over it may be lost."""
        was_open = self.is_open
        for event in self.socket.link_events():
            if event is not LinkEvent.CONNECTED and self.is_open:
                raise ConnectionResetError("the link is broken")
            self.is_open = event is LinkEvent.CONNECTED
        return self.is_open and not was_open

    def entry(self) -> PeerEntry:
        """Returns it as native code has it."""
        return PeerEntry(self.memory.address, ctypes.addressof(self.state), -1, 0)

    def close(self) -> None:
        """Gives it up; calls that are under way keep its memory."""
        self.state.socket = None
        self.socket.close()
        self.is_open = False


Peer = Ring | Link


@dataclass(frozen=True, slots=True)
class LinkMaker:
    """What links are made with."""

    functions: ZmqFunctions
    seal: Callable[[int, int, int], int]
    """Of an incarnation, a number of shards and the address of a shape; of the native library."""


@dataclass(slots=True)
class CallPeers:
    """Opens rings and links, one at a time, and gives them up."""

    nodes: ExpertNodes
    folder: Path | None
    """Where nodes of this host listen for rings; None: there are none."""
    links: LinkMaker | None
    """None: there are none."""
    log: structlog.stdlib.BoundLogger
    shape: RingShape = field(default_factory=RingShape)
    """Of all of them; without slots: no call has said yet how large they must be."""
    num_changes: int = 0
    """Goes up whenever one is opened or given up."""
    bell: int = field(default_factory=new_bell)
    """Rings when there is something in a ring; to be waited for."""
    _peers: dict[int, Peer] = field(default_factory=dict)
    """By number of the node."""
    _open_after_s: dict[int, float] = field(default_factory=dict)
    _refusals: dict[int, int] = field(default_factory=dict)
    """How often in a row each node has refused one."""
    _gone: set[int] = field(default_factory=set)
    """Nodes whose ring or link was given up since the last look."""

    @property
    def num_open(self) -> int:
        """Returns how many nodes can be called."""
        return sum(peer.is_open for peer in self._peers.values())

    @property
    def all_links(self) -> list[Link]:
        """Returns those that stand or are to stand."""
        return [peer for peer in self._peers.values() if isinstance(peer, Link)]

    def find(self, number: int) -> Peer | None:
        """Returns how a node can be called now; None: it cannot."""
        peer = self._peers.get(number)
        return peer if peer is not None and peer.is_open else None

    def poll_sockets(self) -> list[zmq.Socket[bytes]]:
        """Returns the sockets of links."""
        return [link.socket.raw for link in self.all_links]

    def silence(self) -> None:
        """The bell has been heard: what it was rung for is looked at next."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.bell)

    def expect(self, shape: RingShape) -> None:
        """Makes them of this shape, and those of another one anew."""
        if shape != self.shape:
            self.shape = shape
            for number in list(self._peers):
                self.give_up(number, -OPEN_INTERVAL_S)
            self._open_after_s.clear()

    def look(self, now_s: float) -> set[int]:
        """Reaches out to new nodes, one at a time, takes in what becomes of it, and gives up those that are gone.
        Returns the nodes of which one was given up since the last look: nothing will come through it."""
        for number, peer in list(self._peers.items()):
            is_meant = number in self.nodes and self.nodes[number].connected
            if not is_meant or not self._is_kept(number, peer, now_s):
                self.give_up(number, now_s)
        for node in self.nodes:
            is_due = now_s >= self._open_after_s.get(node.number, 0.0)
            if node.connected and node.number not in self._peers and is_due and self._reach(node, now_s):
                break  # making one takes milliseconds
        gone, self._gone = self._gone, set()
        return gone

    def give_up(self, number: int, now_s: float) -> None:
        """Closes that of one node, and says so at the next look."""
        self._peers.pop(number).close()
        self._gone.add(number)
        self.num_changes += 1
        self._open_after_s[number] = max(now_s + OPEN_INTERVAL_S, self._open_after_s.get(number, 0.0))

    def give_up_full(self, now_s: float, reason: str) -> None:
        """Gives up those without a free slot: new ones are free."""
        for number, peer in list(self._peers.items()):
            if number in self.nodes and not has_free_slot(peer, self.shape):
                self.log.warning("ring_given_up", node=self.nodes[number].node_id, reason=reason)
                self.give_up(number, now_s - OPEN_INTERVAL_S)

    def close(self) -> None:
        """Gives all of them up."""
        for number in list(self._peers):
            self.give_up(number, 0.0)
        os.close(self.bell)

    def _reach(self, node: ExpertNode, now_s: float) -> bool:
        """Returns whether memory was made."""
        if not self.shape.slots:
            return False
        try:
            peer = self._offer_ring(node) or self._open_link(node)
        except (OSError, SocketError) as error:
            self._note_refusal(node, str(error), now_s)
            return False
        if peer is None:
            self._open_after_s[node.number] = now_s + OPEN_INTERVAL_S
            return False
        self._peers[node.number] = peer
        return True

    def _offer_ring(self, node: ExpertNode) -> Ring | None:
        """Returns None for a node that is on another host, or does without. Raises OSError."""
        if self.folder is None:
            return None
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.setblocking(False)
            connection.connect(str(ring_path(self.folder, node.node_id)))
            memory, descriptor = make_ring(self.shape)
            try:
                send_offer(connection, RingOffer(node.incarnation, self.shape, descriptor, self.bell))
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            connection.close()
            return None
        except OSError:
            connection.close()
            raise
        return Ring(connection, memory)

    def _open_link(self, node: ExpertNode) -> Link | None:
        """Returns None for a node that has none. Raises OSError and SocketError."""
        if self.links is None or not node.links:
            return None
        memory = RingMemory(-1, self.shape)
        raw = self.nodes.open_link(node)
        if raw is None:
            return None
        seal = self.links.seal(node.incarnation, self.nodes.shards_per_layer, ctypes.addressof(self.shape))
        functions = ctypes.addressof(self.links.functions)
        return Link(raw, memory, LinkState(functions, raw.raw.underlying, seal, 0, 0))

    def _is_kept(self, number: int, peer: Peer, now_s: float) -> bool:
        """Returns False for one that was refused, or is closed."""
        node = self.nodes[number]
        try:
            if peer.look():
                self.num_changes += 1
                self._refusals.pop(number, None)
                self.log.info("ring_open" if isinstance(peer, Ring) else "link_open", node=node.node_id)
        except (OSError, ProtocolError) as error:
            self._note_refusal(node, str(error), now_s)
            return False
        return True

    def _note_refusal(self, node: ExpertNode, reason: str, now_s: float) -> None:
        times = self._refusals[node.number] = self._refusals.get(node.number, 0) + 1
        self.log.info("no_ring", node=node.node_id, reason=reason)
        self._open_after_s[node.number] = now_s + OPEN_INTERVAL_S * 2 ** min(MAX_DOUBLINGS, times - 1)


def has_free_slot(peer: Peer, shape: RingShape) -> bool:
    """Returns whether a call could be written now."""
    starts = range(0, shape.num_bytes, shape.num_bytes // shape.slots)
    return any(not ctypes.c_uint32.from_address(peer.memory.address + start).value for start in starts)
