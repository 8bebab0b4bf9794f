"""The expert nodes that a stage knows: one socket each, whether it is connected, and who holds which shard."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog
import zmq

from common.array import frame_to_array
from common.endpoints import choose_endpoint, split_endpoints
from common.errors import ConfigurationError, ExecutionError, ProtocolError
from common.messages import PublishPlacement
from common.transport import MessageSocket, Transport


@dataclass(slots=True, eq=False)
class ExpertNode:
    """One expert node as this stage sees it."""

    number: int
    node_id: str
    incarnation: int
    socket: MessageSocket
    connected: bool = False
    outstanding_rows: int = 0
    heard_s: float = 0.0
    """When it last said anything."""
    probe: int = 0
    """A call that is not wanted any more and was not taken back: its answer tells that the node is back. 0: none."""


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
        self._copies: dict[int, list[list[int]]] = {}
        """Layer -> shard key -> node numbers, first choice first."""
        self._stamp = (0, 0)
        self._bytes_to_lost_nodes = 0
        self.num_slices = 1

    def __iter__(self) -> Iterator[ExpertNode]:
        return iter(list(self._nodes.values()))

    def __contains__(self, number: int) -> bool:
        return number in self._nodes

    def __getitem__(self, number: int) -> ExpertNode:
        return self._nodes[number]

    @property
    def bytes_sent(self) -> int:
        """To all nodes since start."""
        return self._bytes_to_lost_nodes + sum(node.socket.bytes_sent for node in self._nodes.values())

    @property
    def outstanding_rows(self) -> dict[int, int]:
        """What each node still owes."""
        return {node.number: node.outstanding_rows for node in self._nodes.values()}

    def poll_sockets(self) -> list[zmq.Socket[bytes]]:
        """Data and monitor sockets of all nodes."""
        sockets = [node.socket.raw for node in self._nodes.values()]
        return sockets + [n.socket.monitor for n in self._nodes.values() if n.socket.monitor is not None]

    def expect(self, num_slices: int) -> None:
        """So many an expert, as long as no placement has told: calls that begin before wait for their copies."""
        if self._stamp == (0, 0):
            self.num_slices = num_slices

    def take_placement(self, placement: PublishPlacement, router_term: int, num_slices: int) -> list[ExpertNode] | None:
        """Connect to nodes that are new; those that are gone are closed and returned. None: an older placement.

        Versions begin anew with every router, so they are compared after its term. A node that cannot be reached from
        here is left out: the others still can. Raises ProtocolError for a placement that makes no sense.
        """
        stamp = (router_term, placement.version)
        if stamp < self._stamp:
            return None
        copies = frame_to_array(placement.copies, "uint8", (len(placement.node_ids), None, None, None), "copies")
        if copies.shape[3] != num_slices:
            raise ProtocolError(f"placement has {copies.shape[3]} slices an expert, this mesh has {num_slices}")
        columns = placement.incarnations, placement.endpoints, placement.ipc_tokens
        if any(len(column) != len(placement.node_ids) for column in columns):
            raise ProtocolError(f"placement does not tell everything of each of its {len(placement.node_ids)} nodes")
        self._stamp, self.num_slices = stamp, num_slices
        gone = {(node.node_id, node.incarnation): node for node in self._nodes.values()}
        current: list[ExpertNode | None] = []
        for index, node_id in enumerate(placement.node_ids):
            node = gone.pop((node_id, placement.incarnations[index]), None)
            current.append(node or self._connect(placement, index))
        for node in gone.values():
            self._bytes_to_lost_nodes += node.socket.bytes_sent
            node.connected = False
            node.socket.close()
            del self._nodes[node.number]
        self._copies = _copies_by_layer(copies, [node.number if node is not None else None for node in current])
        return list(gone.values())

    def holders(self, layer: int, avoided: Set[int]) -> list[list[int]]:
        """Connected nodes with a copy, by shard key of a layer, without those to avoid; none before a placement is
        known. Raises ExecutionError for a layer that the placement lacks."""
        if self._stamp == (0, 0):
            return [[]] * (self._num_experts * self.num_slices)
        copies = self._copies.get(layer)
        if copies is None:
            raise ExecutionError(f"the placement has no layer {layer}")
        usable = {node.number for node in self._nodes.values() if node.connected} - avoided
        if len(usable) == len(self._nodes):
            return copies
        return [[number for number in holders if number in usable] for holders in copies]

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
        node = ExpertNode(next(self._numbers), node_id, placement.incarnations[index], socket)
        self._nodes[node.number] = node
        return node


def _copies_by_layer(copies: Any, numbers: list[int | None]) -> dict[int, list[list[int]]]:
    """uint8 [nodes, L, E, S] with 1 + place in the list of copies -> layer -> shard key -> node numbers in order."""
    num_nodes, num_layers, num_experts, num_slices = copies.shape
    flat = copies.reshape(num_nodes, num_layers, num_experts * num_slices)
    table: dict[int, list[list[int]]] = {}
    for layer in range(num_layers):
        keys: list[list[tuple[int, int]]] = [[] for _ in range(flat.shape[2])]
        for index, key in np.argwhere(flat[:, layer] > 0).tolist():
            number = numbers[index]
            if number is not None:
                keys[key].append((int(flat[index, layer, key]), number))
        table[layer] = [[number for _, number in sorted(entries)] for entries in keys]
    return table
