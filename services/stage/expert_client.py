"""The stage's side of expert calls: what is in flight, who owes it, and putting answers together.

A node whose connection closes, that refuses a call or takes no message loses its rows to the next copy, inside the
same step. Each pair of a call is taken once. A shard without a usable copy makes its call wait for one, until
its deadline.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import numpy as np
import structlog
import torch
from torch import Tensor

from common.array import Int64Array, array_to_frame
from common.errors import DeadlineError, ExecutionError, MoemeshError, NodeLostError, ProtocolError
from common.messages import Dispatch, ExpertRows, Failed, Header, Message, PublishPlacement
from common.tensor import frame_to_tensor, tensor_to_frame
from common.transport import Full, LinkEvent
from services.stage.dispatch import ExactSum, NodeRows, PartialSum, pair_weights, split_pairs
from services.stage.expert_nodes import ExpertNode, ExpertNodes
from services.stage.model.decoder import ExpertCall
from services.stage.pending_call import PendingCall

MAX_REFUSALS = 8
"""A call that was refused so often fails: the fault is in the call, not in a node."""
RETRY_INTERVAL_S = 0.1
"""How often pairs without a usable node are tried again, besides when a link or the placement changes."""


class ExpertClient:
    """All expert calls of one stage."""

    def __init__(self, nodes: ExpertNodes, log: structlog.stdlib.BoundLogger) -> None:
        self.nodes = nodes
        self._log = log
        self._numbers = itertools.count(1)
        self._calls: dict[int, PendingCall] = {}
        """By number of each message in flight."""
        self._stranded: list[PendingCall] = []
        """Calls with homeless pairs."""
        self._next_retry_s = 0.0
        self.combine = "exact"
        self.resent_calls = 0
        self.late_answers = 0
        self.wait_seconds = 0.0
        self.answered = 0

    def take_placement(self, placement: PublishPlacement, router_term: int, num_slices: int, now_s: float) -> bool:
        """Who holds what now. True if the sockets may have changed. Raises as `ExpertNodes.take_placement`."""
        gone = self.nodes.take_placement(placement, router_term, num_slices)
        if gone is None:
            return False
        for node in gone:
            self._reclaim(node, now_s)
        self._retry_stranded(now_s)
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
        """Send a call's rows; one of the callbacks comes later from `receive` or `check_deadlines`, never from here.

        Raises ExecutionError before any placement is known.
        """
        total: ExactSum | PartialSum = (
            ExactSum(call, self.nodes.num_slices) if self.combine == "exact" else PartialSum(call)
        )
        self._send_pairs(PendingCall(call, header, deadline_s, total, now_s, on_done, on_failed), None, now_s)

    def receive(self, now_s: float) -> bool:
        """Take in answers and link events of all nodes. True if anything came."""
        came = False
        for node in self.nodes:
            for event in node.socket.link_events():
                came = True
                self._link_changed(node, event is LinkEvent.CONNECTED, now_s)
            while (received := node.socket.receive()) is not None:
                came = True
                self._answered(node, received[0], now_s)
        return came

    def check_deadlines(self, now_s: float) -> None:
        """Fail calls whose time is up; try those again that nobody could take."""
        if self._stranded and now_s >= self._next_retry_s:
            self._next_retry_s = now_s + RETRY_INTERVAL_S
            self._retry_stranded(now_s)
        for pending in self._all_pending():
            if now_s >= pending.deadline_s:
                waited_for = sorted({self._name(part.node) for part in pending.parts.values()})
                missing = ", ".join(waited_for) or "a node that holds the layer's experts"
                self._fail(pending, DeadlineError(f"layer {pending.call.layer}: no answer in time from {missing}"))

    def abandon(self) -> None:
        """Forget all calls: their steps are gone, their answers will be late."""
        for pending in self._all_pending():
            self._forget(pending)

    def _all_pending(self) -> Iterable[PendingCall]:
        return {id(pending): pending for pending in (*self._calls.values(), *self._stranded)}.values()

    def _send_pairs(self, pending: PendingCall, pairs: Int64Array | None, now_s: float) -> None:
        """Ask the nodes that hold the pairs (None: all of the call); those that nobody can take now are stranded."""
        call, num_slices = pending.call, self.nodes.num_slices
        holders = self.nodes.holders(call.layer, pending.refused_by)
        try:
            parts = split_pairs(call, pairs, num_slices, holders, self.nodes.outstanding_rows)
        except NodeLostError:
            pending.refused_by.clear()  # at the next try, those who refused are better than nobody
            self._strand(pending, pairs)
            return
        for part in parts:
            if not self._send_part(pending, part, now_s):
                pending.refused_by.add(part.node)
                self._send_pairs(pending, part.pairs, now_s)

    def _send_part(self, pending: PendingCall, part: NodeRows, now_s: float) -> bool:
        call, node, number = pending.call, self.nodes[part.node], next(self._numbers)
        is_whole = part.tokens.size == call.hidden.shape[0]
        rows = call.hidden if is_whole else call.hidden[torch.from_numpy(part.tokens)]
        weights = (
            np.zeros(0, np.float32) if self.combine == "exact" else pair_weights(call, part, self.nodes.num_slices)
        )
        message = Dispatch(number, tensor_to_frame(rows), array_to_frame(part.routing), array_to_frame(weights))
        try:
            node.socket.send(message, pending.header_now(now_s))
        except Full:
            return False
        pending.parts[number] = part
        self._calls[number] = pending
        node.outstanding_rows += part.pairs.size
        return True

    def _strand(self, pending: PendingCall, pairs: Int64Array | None) -> None:
        if pairs is None:
            pairs = np.arange(pending.call.experts.numel() * self.nodes.num_slices)
        pending.homeless.append(pairs)
        if pending not in self._stranded:
            self._stranded.append(pending)

    def _retry_stranded(self, now_s: float) -> None:
        stranded, self._stranded = self._stranded, []
        for pending in stranded:
            homeless, pending.homeless = pending.homeless, []
            for pairs in homeless:
                self._send_pairs(pending, pairs, now_s)

    def _answered(self, node: ExpertNode, message: Message, now_s: float) -> None:
        number = message.call if isinstance(message, ExpertRows | Failed) else 0
        pending = self._calls.get(number)
        if pending is None or pending.parts[number].node != node.number:
            self.late_answers += 1
            return
        del self._calls[number]
        part = pending.parts.pop(number)
        node.outstanding_rows -= part.pairs.size
        try:
            if not isinstance(message, ExpertRows):
                reason = message.message if isinstance(message, Failed) else f"answered {type(message).__name__}"
                raise ExecutionError(f"{node.node_id}: {reason}")
            pending.sum.add(part, self._rows(message, part, pending))
        except (ProtocolError, ExecutionError) as error:
            self._refused(pending, part, error, now_s)
            return
        if pending.is_whole:
            self.answered += 1
            self.wait_seconds += now_s - pending.started_s
            pending.on_done(pending.sum.total())

    def _refused(self, pending: PendingCall, part: NodeRows, error: MoemeshError, now_s: float) -> None:
        self._log.warning("expert_call_refused", layer=pending.call.layer, reason=str(error))
        pending.refusals += 1
        pending.refused_by.add(part.node)
        if pending.refusals >= MAX_REFUSALS:
            self._fail(pending, ExecutionError(str(error)))
            return
        self.resent_calls += 1
        self._send_pairs(pending, part.pairs, now_s)

    def _rows(self, message: ExpertRows, part: NodeRows, pending: PendingCall) -> Tensor:
        width = pending.call.hidden.shape[1]
        if self.combine == "exact":
            return frame_to_tensor(message.rows, pending.call.hidden.dtype, (part.pairs.size, width), "rows")
        return frame_to_tensor(message.rows, torch.float32, (part.tokens.size, width), "rows")

    def _link_changed(self, node: ExpertNode, connected: bool, now_s: float) -> None:
        if node.connected == connected:
            return
        node.connected = connected
        self._log.info("expert_link", node=node.node_id, connected=connected)
        if connected:
            self._retry_stranded(now_s)
        else:
            self._reclaim(node, now_s)

    def _reclaim(self, node: ExpertNode, now_s: float) -> None:
        """What a lost node owed goes to other copies; if it answers after all, the answer is late."""
        for number, pending in list(self._calls.items()):
            part = pending.parts.get(number)
            if part is not None and part.node == node.number:
                del self._calls[number], pending.parts[number]
                node.outstanding_rows -= part.pairs.size
                self.resent_calls += 1
                self._send_pairs(pending, part.pairs, now_s)

    def _fail(self, pending: PendingCall, error: MoemeshError) -> None:
        self._forget(pending)
        pending.on_failed(error)

    def _forget(self, pending: PendingCall) -> None:
        for number, part in pending.parts.items():
            self._calls.pop(number, None)
            if part.node in self.nodes:
                self.nodes[part.node].outstanding_rows -= part.pairs.size
        pending.parts.clear()
        pending.homeless.clear()
        if pending in self._stranded:
            self._stranded.remove(pending)

    def _name(self, number: int) -> str:
        return self.nodes[number].node_id if number in self.nodes else "a lost node"
