"""The stage's side of expert calls: sockets to expert nodes, calls in flight, answers put together.

A node whose connection closes, that refuses a call or takes no message loses its rows to the next copy, inside the
same step. Each pair of a call is taken once. A shard without a usable copy makes its call wait for a new placement,
until the call's deadline.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog
import torch
import zmq
from torch import Tensor

from common.array import Int64Array, array_to_frame, frame_to_array
from common.endpoints import choose_endpoint
from common.errors import ConfigurationError, DeadlineError, ExecutionError, MoemeshError, NodeLostError, ProtocolError
from common.messages import Dispatch, ExpertRows, Failed, Header, Message, PublishPlacement
from common.tensor import frame_to_tensor, tensor_to_frame
from common.transport import Full, LinkEvent, MessageSocket, Transport
from services.stage.dispatch import ExactSum, NodeRows, PartialSum, pair_weights, split_pairs
from services.stage.model.decoder import ExpertCall

MAX_REFUSALS = 3
"""A call whose nodes refused it so often fails: the fault is in the call, not in a node."""


@dataclass(slots=True, eq=False)
class ExpertNode:
    """One expert node as this stage sees it."""

    number: int
    node_id: str
    incarnation: int
    socket: MessageSocket
    connected: bool = False
    outstanding_rows: int = 0


@dataclass(slots=True, eq=False)
class PendingCall:
    """An expert call until its sum is whole."""

    call: ExpertCall
    header: Header
    deadline_s: float
    sum: ExactSum | PartialSum
    started_s: float
    on_done: Callable[[Tensor], None]
    on_failed: Callable[[MoemeshError], None]
    parts: dict[int, NodeRows] = field(default_factory=dict)
    """By number of the message."""
    homeless: list[Int64Array] = field(default_factory=list)
    """Pairs that no usable node holds now."""
    refused_by: set[int] = field(default_factory=set)
    """Nodes that could not answer this call: they are asked again only after a new placement."""
    refusals: int = 0


class ExpertClient:
    """All expert calls of one stage. `poll_sockets` lists what the owner's poller watches."""

    def __init__(self, transport: Transport, ipc_token: str, log: structlog.stdlib.BoundLogger) -> None:
        self._transport = transport
        self._ipc_token = ipc_token
        self._log = log
        self._numbers = itertools.count(1)
        self._node_numbers = itertools.count()
        self._nodes: dict[int, ExpertNode] = {}
        self._calls: dict[int, PendingCall] = {}
        """By number of each message in flight."""
        self._stranded: list[PendingCall] = []
        """Calls with homeless pairs."""
        self._copies: dict[int, list[list[int]]] = {}
        """Layer -> shard key -> node numbers, first choice first."""
        self.placement_version = 0
        self.num_slices = 1
        self.combine = "exact"
        self.resent_calls = 0
        self.late_answers = 0
        self.wait_seconds = 0.0
        self.answered = 0
        self._bytes_to_lost_nodes = 0

    def poll_sockets(self) -> list[zmq.Socket[bytes]]:
        """Data and monitor sockets of all nodes."""
        sockets = [node.socket.raw for node in self._nodes.values()]
        return sockets + [n.socket.monitor for n in self._nodes.values() if n.socket.monitor is not None]

    @property
    def bytes_sent(self) -> int:
        """To all nodes since start."""
        return self._bytes_to_lost_nodes + sum(node.socket.bytes_sent for node in self._nodes.values())

    @property
    def num_connected(self) -> int:
        """Nodes that could be asked now."""
        return sum(node.connected for node in self._nodes.values())

    def take_placement(self, placement: PublishPlacement, num_slices: int) -> bool:
        """Connect to new nodes, drop those that are gone, ask homeless pairs again. True if the sockets changed."""
        if placement.version < self.placement_version:
            return False
        copies = frame_to_array(placement.copies, "uint8", (len(placement.node_ids), None, None, None), "copies")
        if copies.shape[3] != num_slices:
            raise ProtocolError(f"placement has {copies.shape[3]} slices an expert, this mesh has {num_slices}")
        self.placement_version, self.num_slices = placement.version, num_slices
        known = {(node.node_id, node.incarnation): node for node in self._nodes.values()}
        current: list[ExpertNode] = []
        for index, node_id in enumerate(placement.node_ids):
            node = known.pop((node_id, placement.incarnations[index]), None)
            current.append(node or self._connect(placement, index))
        for node in known.values():
            self._drop(node)
        self._copies = _copies_by_layer(copies, [node.number for node in current])
        return True

    def start(
        self,
        call: ExpertCall,
        header: Header,
        now_s: float,
        deadline_s: float,
        on_done: Callable[[Tensor], None],
        on_failed: Callable[[MoemeshError], None],
    ) -> None:
        """Send a call's rows; one of the callbacks comes later from `receive` or `check_deadlines`, never from here."""
        total: ExactSum | PartialSum = ExactSum(call, self.num_slices) if self.combine == "exact" else PartialSum(call)
        pending = PendingCall(call, header, deadline_s, total, now_s, on_done, on_failed)
        self._send_pairs(pending, None, now_s)

    def receive(self, now_s: float) -> bool:
        """Take in answers and link events of all nodes. True if anything came."""
        came = False
        for node in list(self._nodes.values()):
            for event in node.socket.link_events():
                came = True
                self._link_changed(node, event is LinkEvent.CONNECTED, now_s)
            while (received := node.socket.receive()) is not None:
                came = True
                self._answered(node, received[0], now_s)
        return came

    def check_deadlines(self, now_s: float) -> None:
        """Fail calls whose time is up."""
        for pending in {id(p): p for p in (*self._calls.values(), *self._stranded)}.values():
            if now_s >= pending.deadline_s:
                waited_for = sorted({self._name(part.node) for part in pending.parts.values()})
                missing = ", ".join(waited_for) or "a node that holds the layer's experts"
                self._fail(pending, DeadlineError(f"layer {pending.call.layer}: no answer in time from {missing}"))

    def abandon(self, pendings: Iterable[PendingCall] | None = None) -> None:
        """Forget calls (None: all) whose step is gone; their answers will be late."""
        for pending in list(pendings or {id(p): p for p in (*self._calls.values(), *self._stranded)}.values()):
            self._forget(pending)

    def _send_pairs(self, pending: PendingCall, pairs: Int64Array | None, now_s: float) -> None:
        holders = self._usable(pending.call.layer, pending.refused_by)
        load = {node.number: node.outstanding_rows for node in self._nodes.values()}
        try:
            parts = split_pairs(pending.call, pairs, self.num_slices, holders, load)
        except NodeLostError:
            all_pairs = np.arange(pending.call.experts.numel() * self.num_slices) if pairs is None else pairs
            pending.homeless.append(all_pairs)
            if pending not in self._stranded:
                self._stranded.append(pending)
            return
        hidden = pending.call.hidden
        for part in parts:
            node = self._nodes[part.node]
            number = next(self._numbers)
            whole = part.tokens.size == hidden.shape[0]
            rows = hidden if whole else hidden[torch.from_numpy(part.tokens)]
            weights = (
                np.zeros(0, np.float32)
                if self.combine == "exact"
                else pair_weights(pending.call, part, self.num_slices)
            )
            message = Dispatch(number, tensor_to_frame(rows), array_to_frame(part.routing), array_to_frame(weights))
            pending.parts[number] = part
            self._calls[number] = pending
            node.outstanding_rows += part.pairs.size
            time_left_ms = max(1, int((pending.deadline_s - now_s) * 1000))
            try:
                node.socket.send(message, _stamp(pending.header, pending.call.layer, time_left_ms))
            except Full:
                self._link_changed(node, False, now_s)

    def _usable(self, layer: int, refused_by: set[int]) -> list[list[int]]:
        copies = self._copies.get(layer)
        if copies is None:
            raise ExecutionError(f"no placement for layer {layer} is known here yet")
        usable = {node.number for node in self._nodes.values() if node.connected} - refused_by
        if len(usable) == len(self._nodes):
            return copies
        return [[number for number in holders if number in usable] for holders in copies]

    def _answered(self, node: ExpertNode, message: Message, now_s: float) -> None:
        number = message.call if isinstance(message, ExpertRows | Failed) else 0
        pending = self._calls.pop(number, None)
        if pending is None:
            self.late_answers += 1
            return
        part = pending.parts.pop(number)
        node.outstanding_rows -= part.pairs.size
        try:
            if isinstance(message, Failed):
                raise ExecutionError(f"{node.node_id}: {message.message}")
            assert isinstance(message, ExpertRows)
            pending.sum.add(part, self._rows(message, part, pending))
        except (ProtocolError, ExecutionError) as error:
            self._log.warning("expert_call_refused", node=node.node_id, layer=pending.call.layer, reason=str(error))
            pending.refusals += 1
            pending.refused_by.add(node.number)
            if pending.refusals >= MAX_REFUSALS:
                self._fail(pending, ExecutionError(str(error)))
            else:
                self.resent_calls += 1
                self._send_pairs(pending, part.pairs, now_s)
            return
        if not pending.parts and not pending.homeless:
            self.answered += 1
            self.wait_seconds += now_s - pending.started_s
            pending.on_done(pending.sum.total())

    def _rows(self, message: ExpertRows, part: NodeRows, pending: PendingCall) -> Tensor:
        width = pending.call.hidden.shape[1]
        if self.combine == "exact":
            return frame_to_tensor(message.rows, pending.call.hidden.dtype, (part.pairs.size, width), "rows")
        return frame_to_tensor(message.rows, torch.float32, (part.tokens.size, width), "rows")

    def _connect(self, placement: PublishPlacement, index: int) -> ExpertNode:
        node_id = placement.node_ids[index]
        try:
            endpoint = choose_endpoint(placement.endpoints[index].split(), placement.ipc_tokens[index], self._ipc_token)
        except ConfigurationError as error:
            raise ConfigurationError(f"expert node {node_id}: {error}") from None
        number = next(self._node_numbers)
        node = ExpertNode(
            number, node_id, placement.incarnations[index], self._transport.dealer(f"to {node_id}", endpoint)
        )
        self._nodes[number] = node
        return node

    def _link_changed(self, node: ExpertNode, connected: bool, now_s: float) -> None:
        if node.connected == connected:
            return
        node.connected = connected
        self._log.info("expert_link", node=node.node_id, connected=connected)
        if connected:
            stranded, self._stranded = self._stranded, []
            for pending in stranded:
                homeless, pending.homeless = pending.homeless, []
                for pairs in homeless:
                    self._send_pairs(pending, pairs, now_s)
        else:
            self._resend_from(node, now_s)

    def _resend_from(self, node: ExpertNode, now_s: float) -> None:
        """What a lost node owed goes to other copies; if it answers after all, the answer is late."""
        for number, pending in list(self._calls.items()):
            part = pending.parts.get(number)
            if part is not None and part.node == node.number:
                del self._calls[number], pending.parts[number]
                node.outstanding_rows -= part.pairs.size
                self.resent_calls += 1
                self._send_pairs(pending, part.pairs, now_s)

    def _drop(self, node: ExpertNode) -> None:
        """The router says that this node is gone. Its pairs wait for `take_placement` to finish and a link event."""
        node.connected = False
        for number, pending in list(self._calls.items()):
            part = pending.parts.get(number)
            if part is not None and part.node == node.number:
                del self._calls[number], pending.parts[number]
                self.resent_calls += 1
                pending.homeless.append(part.pairs)
                if pending not in self._stranded:
                    self._stranded.append(pending)
        self._bytes_to_lost_nodes += node.socket.bytes_sent
        node.socket.close()
        del self._nodes[node.number]

    def retry_stranded(self, now_s: float) -> None:
        """Ask homeless pairs again; called after a new placement was taken in."""
        stranded, self._stranded = self._stranded, []
        for pending in stranded:
            pending.refused_by.clear()
            homeless, pending.homeless = pending.homeless, []
            for pairs in homeless:
                self._send_pairs(pending, pairs, now_s)

    def _fail(self, pending: PendingCall, error: MoemeshError) -> None:
        self._forget(pending)
        pending.on_failed(error)

    def _forget(self, pending: PendingCall) -> None:
        for number, part in pending.parts.items():
            self._calls.pop(number, None)
            if part.node in self._nodes:
                self._nodes[part.node].outstanding_rows -= part.pairs.size
        pending.parts.clear()
        pending.homeless.clear()
        if pending in self._stranded:
            self._stranded.remove(pending)

    def _name(self, number: int) -> str:
        return self._nodes[number].node_id if number in self._nodes else "a lost node"


def _stamp(header: Header, layer: int, time_left_ms: int) -> Header:
    return Header(
        generation=header.generation,
        attempt=header.attempt,
        step=header.step,
        layer=layer,
        time_left_ms=time_left_ms,
        trace=header.trace,
    )


def _copies_by_layer(copies: Any, numbers: list[int]) -> dict[int, list[list[int]]]:
    """uint8 [nodes, L, E, S] with 1 + place in the list of copies -> layer -> shard key -> node numbers in order."""
    num_nodes, num_layers, num_experts, num_slices = copies.shape
    flat = copies.reshape(num_nodes, num_layers, num_experts * num_slices)
    table: dict[int, list[list[int]]] = {}
    for layer in range(num_layers):
        keys: list[list[tuple[int, int]]] = [[] for _ in range(flat.shape[2])]
        for index, key in np.argwhere(flat[:, layer] > 0).tolist():
            keys[key].append((int(flat[index, layer, key]), numbers[index]))
        table[layer] = [[number for _, number in sorted(entries)] for entries in keys]
    return table
