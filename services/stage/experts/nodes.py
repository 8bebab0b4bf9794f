"""The expert nodes that a stage knows: one socket each, whether it is connected, and which holds which shard."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Set
from dataclasses import dataclass

import numpy as np
import structlog
import zmq

from common.errors import ConfigurationError, ExecutionError, ProtocolError, SocketError
from common.messages import PublishPlacement
from common.topology import LayerRange
from common.wire.array import Int32Array, Int64Array, frame_to_array
from common.wire.endpoints import choose_endpoint, split_endpoints
from common.wire.transport import MessageSocket, Transport
from common.wire.zmq_functions import link_limits


@dataclass(slots=True, eq=False)
class ExpertNode:
    """One expert node as this stage sees it."""

    number: int
    node_id: str
    incarnation: int
    numeric_class: str
    """Nodes of one class give the same bits."""
    socket: MessageSocket
    links: tuple[str, ...] = ()
    """Where its native code takes calls."""
    connected: bool = False
    outstanding_rows: int = 0
    heard_s: float = 0.0
    """When it last said anything."""
    probe: int = 0
    """A call whose answer is not needed, but that it answers: it tells that the node is back, or there. 0: none."""
    probe_after_s: float = 0.0
    """It has been asked for its probe, or has refused it: not before."""
    is_proven: bool = True
    """False for one that has joined others and has answered nothing here yet: it is asked where it alone can be."""


class ExpertNodes:
    """Nodes by number (numbers are this stage's own and never used twice), and the placement that named them."""

    def __init__(
        self, transport: Transport, ipc_token: str, num_experts: int, log: structlog.stdlib.BoundLogger
    ) -> None:
        """`num_experts` of a layer."""
        self._num_experts = num_experts
        self._transport = transport
        self._ipc_token = ipc_token
        self._log = log
        self._numbers = itertools.count()
        self._nodes: dict[int, ExpertNode] = {}
        self._owners: Int64Array = np.zeros((0, 0, 0), dtype=np.int64)
        """[C, L, shard keys]: node numbers by place in the list of copies; -1: none."""
        self._copies: dict[int, list[list[int]]] = {}
        """Layer -> shard key -> node numbers, first choice first; of the layers that were asked for."""
        self._first_classes: tuple[str, ...] = ()
        """The first class by layer, where the nodes of the last placement have several."""
        self._classes_before: tuple[str, ...] = ()
        """The same where they have one, too: what the bits of a layer were made with."""
        self._current: list[ExpertNode | None] = []
        """Nodes in the order of the placement; None: out of reach."""
        self._placement: PublishPlacement | None = None
        self._come_together = True
        """Whether there was no node before those of the last placement: then they are not newcomers."""
        self._unopened: set[int] = set()
        """Places of nodes for which there was no socket; asked for again."""
        self._stamp = (0, 0)
        self._bytes_to_lost_nodes = 0
        self.num_slices = 1
        self.num_changes = 0
        """Goes up whenever a node comes or goes, its link or its standing changes, or a placement is applied."""

    def __iter__(self) -> Iterator[ExpertNode]:
        return iter(list(self._nodes.values()))

    def __contains__(self, number: int) -> bool:
        return number in self._nodes

    def __getitem__(self, number: int) -> ExpertNode:
        return self._nodes[number]

    @property
    def bytes_sent(self) -> int:
        """Returns what was sent to all nodes since start."""
        return self._bytes_to_lost_nodes + sum(node.socket.bytes_sent for node in self._nodes.values())

    @property
    def outstanding_rows(self) -> dict[int, int]:
        """Returns what each node still owes."""
        return {node.number: node.outstanding_rows for node in self._nodes.values()}

    def poll_sockets(self) -> list[zmq.Socket[bytes]]:
        """Returns the data and monitor sockets of all nodes."""
        sockets = [node.socket.raw for node in self._nodes.values()]
        return sockets + [n.socket.monitor for n in self._nodes.values() if n.socket.monitor is not None]

    def version_of(self, router_term: int) -> int:
        """Returns the version of the placement that this router has published; 0: none of its has come."""
        return self._stamp[1] if self._stamp[0] == router_term else 0

    def expect(self, num_slices: int) -> None:
        """Expects this many slices per expert, as long as no placement has told: calls that begin before wait for their
        copies."""
        if self._stamp == (0, 0):
            self.num_slices = num_slices

    def apply_placement(
        self, placement: PublishPlacement, router_term: int, num_slices: int
    ) -> list[ExpertNode] | None:
        """Connects to nodes that are new; those that are gone are closed and returned. None: an older placement, or
        this one again.

        Versions begin anew with every router, so they are compared after its term. A node that cannot be reached from
        here is left out: the others still can. Raises ProtocolError for a placement that makes no sense.
        """
        stamp = (router_term, placement.version)
        if stamp <= self._stamp:
            return None
        owners = _read_owners(placement)
        if owners.shape[3] != num_slices:
            raise ProtocolError(
                f"PublishPlacement.owners has {owners.shape[3]} slices per expert, this mesh has {num_slices}"
            )
        columns = placement.incarnations, placement.endpoints, placement.ipc_tokens, placement.numeric_classes
        links = placement.links or placement.node_ids  # where no node has any
        if any(len(column) != len(placement.node_ids) for column in (*columns, links)):
            raise ProtocolError(
                f"a column of PublishPlacement has no entry for each of its {len(placement.node_ids)} node_ids"
            )
        if placement.first_classes and len(placement.first_classes) != owners.shape[1]:
            raise ProtocolError(
                f"PublishPlacement.first_classes names {len(placement.first_classes)} layers of {owners.shape[1]}"
            )
        self._stamp, self.num_slices = stamp, num_slices
        self._come_together = not self._nodes
        gone = {(node.node_id, node.incarnation): node for node in self._nodes.values()}
        kept = [gone.pop(name, None) for name in zip(placement.node_ids, placement.incarnations, strict=True)]
        for node in gone.values():  # first: others may need their sockets
            self._bytes_to_lost_nodes += node.socket.bytes_sent
            node.connected = False
            node.socket.close()
            del self._nodes[node.number]
        self._placement, self._unopened = placement, set()
        self._current = [node or self._connect(placement, index) for index, node in enumerate(kept)]
        self._note_classes(placement, owners.shape[1])
        self._number_owners(owners)
        return list(gone.values())

    def connect_unopened(self) -> None:
        """Tries nodes again for which there was no socket."""
        if self._placement is None or not self._unopened:
            return
        unopened, self._unopened = self._unopened, set()
        for index in sorted(unopened):
            self._current[index] = self._connect(self._placement, index)
        if self._unopened != unopened:
            self._number_owners(_read_owners(self._placement))

    @property
    def shards_per_layer(self) -> int:
        """Returns how many shard keys a layer has."""
        return self._num_experts * self.num_slices

    def open_link(self, node: ExpertNode) -> MessageSocket | None:
        """Returns a new socket to where a node's native code takes calls; None: it has said of no such place that can
        be reached. Raises SocketError."""
        limits = link_limits(self._transport.limits)
        try:
            return self._transport.dealer(f"link to {node.node_id}", choose_endpoint(node.links, "", ""), limits=limits)
        except ConfigurationError:
            return None

    def _number_owners(self, owners: Int32Array) -> None:
        numbers = np.array([-1, *(-1 if node is None else node.number for node in self._current)], dtype=np.int64)
        self.num_changes += 1
        self._owners = numbers[owners.reshape(*owners.shape[:2], owners.shape[2] * owners.shape[3])]
        self._copies = {}

    def _note_classes(self, placement: PublishPlacement, num_layers: int) -> None:
        self._first_classes, sole = placement.first_classes, set(placement.numeric_classes)
        now = placement.first_classes or (tuple(sole) * num_layers if len(sole) == 1 else ())
        for layer in sorted(self._copies):  # those that were asked for
            before = self._classes_before[layer] if layer < len(self._classes_before) else ""
            if now and before and before != now[layer]:
                self._log.warning("numeric_class_changed", layer=layer, before=before, now=now[layer])
        self._classes_before = now or self._classes_before

    def holders(self, layer: int, avoided: Set[int]) -> list[list[int]]:
        """Returns the connected nodes with a copy, by shard key of a layer, without those to avoid; none before a
        placement is known. Raises ExecutionError for a layer that the placement lacks."""
        if self._stamp == (0, 0):
            return [[]] * (self._num_experts * self.num_slices)
        copies = self._copies_by_key(layer)
        usable = {node.number for node in self._nodes.values() if node.connected} - avoided
        if len(usable) == len(self._nodes):
            return copies
        return [[number for number in holders if number in usable] for holders in copies]

    def has_layer(self, layer: int) -> bool:
        """Returns whether the placement says where a layer's experts are."""
        return layer < int(self._owners.shape[1])

    def classes_of(self, layers: LayerRange) -> tuple[str, ...]:
        """Returns the numeric class that answers the calls of each of these layers; "" where none does."""
        now = self._classes_before
        return tuple(now[layer] if layer < len(now) else "" for layer in range(layers.start, layers.stop))

    def first_class(self, layer: int) -> str | None:
        """Returns the numeric class that answers the calls of a layer, so that their bits do not change with which node
        has time.

        The router chooses it, the same for all stages. None: all nodes have one class, or none has held anything of the
        layer.
        """
        return (self._first_classes[layer] or None) if layer < len(self._first_classes) else None

    def _copies_by_key(self, layer: int) -> list[list[int]]:
        if layer >= self._owners.shape[1]:
            raise ExecutionError(f"the placement has no layer {layer}")
        if layer not in self._copies:
            owners = self._owners[:, layer].T.tolist()
            self._copies[layer] = [[number for number in numbers if number >= 0] for numbers in owners]
        return self._copies[layer]

    def _connect(self, placement: PublishPlacement, index: int) -> ExpertNode | None:
        node_id = placement.node_ids[index]
        try:
            endpoint = choose_endpoint(
                split_endpoints(placement.endpoints[index]), placement.ipc_tokens[index], self._ipc_token
            )
            socket = self._transport.dealer(f"to {node_id}", endpoint)
        except ConfigurationError as error:
            self._log.error("expert_unreachable", node=node_id, reason=str(error))
            return None
        except SocketError as error:
            self._log.error("expert_without_socket", node=node_id, reason=str(error))
            self._unopened.add(index)
            return None
        node = ExpertNode(
            next(self._numbers),
            node_id,
            placement.incarnations[index],
            placement.numeric_classes[index],
            socket,
            tuple(split_endpoints(placement.links[index])) if placement.links else (),
        )
        node.is_proven = self._come_together
        self._nodes[node.number] = node
        return node


def _read_owners(placement: PublishPlacement) -> Int32Array:
    """Returns [C, L, E, S]: 1 + node by place in the list of copies, 0 for none.

    Raises ProtocolError for another number of axes, and for nodes that are not named.
    """
    num_nodes, shape = len(placement.node_ids), (None, None, None, None)
    owners: Int32Array = frame_to_array(placement.owners, "int32", shape, "PublishPlacement.owners")
    if owners.size and not 0 <= int(owners.min()) <= int(owners.max()) <= num_nodes:
        raise ProtocolError(f"PublishPlacement.owners names a node outside [0, {num_nodes}]")
    return owners
