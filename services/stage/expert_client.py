"""The stage's side of expert calls: what is in flight, who owes it, and putting answers together.

A node whose connection closes, that refuses a call or takes no message loses its rows to the next copy, inside the
same step. One that is late keeps them, and the next copy is asked too (`hedging.py`); whichever answers first fills the
pairs, the other is told to forget it. Each pair of a call is taken once. A shard without a usable copy makes its call
wait for one, until its deadline, or is left out where the operator wants that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import structlog
import torch
from torch import Tensor

from common.array import Int64Array, array_to_frame
from common.errors import DeadlineError, ExecutionError, MoemeshError, ProtocolError
from common.messages import CancelCall, Dispatch, ExpertRows, Failed, Header, Message, PublishPlacement
from common.tensor import frame_to_tensor, tensor_to_frame
from common.transport import Full, LinkEvent
from services.stage.dispatch import ExactSum, NodeRows, PartialSum, pair_weights, split_pairs
from services.stage.expert_nodes import ExpertNode, ExpertNodes
from services.stage.hedging import HedgeBudget, ReplyTimes
from services.stage.model.decoder import ExpertCall
from services.stage.pending_call import AskedPart, PendingCall
from services.stage.suspicion import Suspicions

MAX_REFUSALS = 8
"""A call that was refused so often fails: the fault is in the call, not in a node."""
RETRY_INTERVAL_S = 0.1
"""How often pairs without a usable node are tried again, besides when a link or the placement changes."""
LOOK_AGAIN_S = 0.01
"""After nothing could be done about a late part: no budget, or no copy."""
AWAY_S = 0.1
"""A stage that has not looked for so long was stopped or computed: answers may lie in its own sockets."""


class ExpertClient:
    """All expert calls of one stage."""

    def __init__(self, nodes: ExpertNodes, log: structlog.stdlib.BoundLogger) -> None:
        self.nodes = nodes
        self._log = log
        self._numbers = itertools.count(1)
        self._open: dict[int, PendingCall] = {}
        """Calls that are not whole, by identity."""
        self._calls: dict[int, PendingCall] = {}
        """By number of each message in flight."""
        self._times = ReplyTimes()
        self._budget = HedgeBudget()
        self._suspicions = Suspicions()
        self._next_retry_s = 0.0
        self._looked_s = 0.0
        self._patient_until_s = 0.0
        self.combine = "exact"
        self.degrade_after_s: float | None = None
        """None: a call waits for a copy until its deadline."""
        self.resent_calls = 0
        self.late_answers = 0
        self.hedged_calls = 0
        self.hedge_wins = 0
        self.degraded_rows = 0
        self.wait_seconds = 0.0
        self.answered = 0

    @property
    def num_suspicions(self) -> int:
        """Times that a node was taken to hang."""
        return self._suspicions.num_suspicions

    def take_placement(self, placement: PublishPlacement, router_term: int, num_slices: int, now_s: float) -> bool:
        """Who holds what now. True if the sockets may have changed. Raises as `ExpertNodes.take_placement`."""
        gone = self.nodes.take_placement(placement, router_term, num_slices)
        if gone is None:
            return False
        for node in gone:
            self._reclaim(node, now_s)
        self._retry_homeless(now_s)
        return True

    def start(
        self,
        call: ExpertCall,
        header: Header,
        now_s: float,
        deadline_s: float,
        on_done: Callable[[Tensor], None],
        on_failed: Callable[[MoemeshError], None],
        on_degraded: Callable[[Int64Array], None] = lambda tokens: None,
    ) -> None:
        """Send a call's rows; one of the callbacks comes later from `receive` or `check_deadlines`, never from here.

        Raises ExecutionError before any placement is known.
        """
        num_slices = self.nodes.num_slices
        total: ExactSum | PartialSum = ExactSum(call, num_slices) if self.combine == "exact" else PartialSum(call)
        pending = PendingCall(call, header, deadline_s, num_slices, total, now_s, on_done, on_failed, on_degraded)
        self._ask_uncovered(pending, now_s)
        self._open[id(pending)] = pending

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
        """Fail calls whose time is up, hedge what is late, try those again that nobody could take."""
        if now_s >= self._next_retry_s:
            self._next_retry_s = now_s + RETRY_INTERVAL_S
            self._retry_homeless(now_s)
        if now_s - self._looked_s > AWAY_S:
            self._patient_until_s = now_s + LOOK_AGAIN_S
        self._looked_s = now_s
        for pending in list(self._open.values()):
            if now_s >= pending.deadline_s:
                waited_for = sorted({self._name(part.rows.node) for part in pending.parts.values()})
                missing = ", ".join(waited_for) or "a node that holds the layer's experts"
                self._fail(pending, DeadlineError(f"layer {pending.call.layer}: no answer in time from {missing}"))
            elif self._is_given_up(pending, now_s):
                self._degrade(pending, now_s)
            elif now_s >= max(pending.look_again_s, self._patient_until_s):
                self._hedge_late(pending, now_s)

    def wait_ms(self, now_s: float, longest_ms: int) -> int:
        """How long there is nothing to do here unless a socket says something."""
        next_s = min((pending.look_again_s for pending in self._open.values()), default=float("inf"))
        next_s = max(next_s, self._patient_until_s)
        return longest_ms if next_s - now_s > longest_ms / 1000 else max(1, int((next_s - now_s) * 1000) + 1)

    def abandon(self) -> None:
        """Forget all calls: their steps are gone, their answers will be late."""
        for pending in list(self._open.values()):
            self._forget(pending)

    # ---- asking

    def _ask_uncovered(self, pending: PendingCall, now_s: float) -> None:
        """Ask for the pairs that nobody owes; what nobody can take now waits as homeless."""
        while (pairs := pending.uncovered()).size:
            holders = self._holders(pending, pending.refused_by, now_s)
            parts = self._deal(pending, pairs, holders)
            if not parts:
                pending.refused_by.clear()  # at the next try, those who refused are better than nobody
                if pending.homeless_since_s is None:
                    pending.homeless_since_s = now_s
                return
            for part in parts:
                if self._send(pending, part, now_s, is_hedge=False):
                    self._budget.earn()
                else:
                    pending.refused_by.add(part.node)
        pending.homeless_since_s = None

    def _holders(self, pending: PendingCall, avoided: set[int], now_s: float) -> Sequence[Sequence[int]]:
        """Copies that may be asked, by shard key; those in doubt only where there is no other."""
        holders = self.nodes.holders(pending.call.layer, avoided)
        doubted = self._suspicions.doubted(now_s)
        if not doubted:
            return holders
        return [[node for node in copies if node not in doubted] or copies for copies in holders]

    def _deal(self, pending: PendingCall, pairs: Int64Array, holders: Sequence[Sequence[int]]) -> list[NodeRows]:
        """Pairs by node, without those that nobody holds."""
        keys = pending.keys(pairs)
        has_holder = np.array([bool(copies) for copies in holders])
        pairs = pairs[has_holder[keys]]
        if not pairs.size:
            return []
        return split_pairs(pending.call, pairs, pending.num_slices, holders, self.nodes.outstanding_rows)

    def _send(self, pending: PendingCall, part: NodeRows, now_s: float, is_hedge: bool) -> bool:
        call, node, number = pending.call, self.nodes[part.node], next(self._numbers)
        is_all = part.tokens.size == call.hidden.shape[0]
        rows = call.hidden if is_all else call.hidden[torch.from_numpy(part.tokens)]
        is_exact = pending.sum.takes_some_pairs
        weights = np.zeros(0, np.float32) if is_exact else pair_weights(call, part, pending.num_slices)
        message = Dispatch(number, tensor_to_frame(rows), array_to_frame(part.routing), array_to_frame(weights))
        try:
            node.socket.send(message, pending.header_now(now_s))
        except Full:
            return False
        pending.parts[number] = AskedPart(part, now_s, is_hedge)
        pending.asked_s[part.pairs] = now_s
        pending.look_again_s = min(pending.look_again_s, now_s + self._times.delay_s(call.layer))
        self._calls[number] = pending
        node.outstanding_rows += part.pairs.size
        return True

    def _retry_homeless(self, now_s: float) -> None:
        for pending in list(self._open.values()):
            if pending.homeless_since_s is not None:
                self._ask_uncovered(pending, now_s)

    # ---- being late

    def _hedge_late(self, pending: PendingCall, now_s: float) -> None:
        """Ask further copies for what is late, within the budget, and see who is silent while others answer."""
        delay_s, silence_s = self._times.delay_s(pending.call.layer), self._times.silence_s(pending.call.layer)
        for part in list(pending.parts.values()):
            node = part.rows.node
            if now_s - part.asked_s >= silence_s and self._others_answered(node, part.asked_s):
                if self._suspicions.silent(node, now_s):
                    self._suspect(node, now_s)
            elif (overdue := pending.overdue(part, now_s - delay_s)).size:
                self._hedge(pending, part, overdue, now_s, self._suspicions.is_struck(node))
        asked_s = float(pending.asked_s[pending.missing].min())
        pending.look_again_s = max(asked_s + delay_s, now_s + LOOK_AGAIN_S)

    def _hedge(self, pending: PendingCall, part: AskedPart, pairs: Int64Array, now_s: float, is_free: bool) -> None:
        """Ask other copies for pairs of a part too. Without a copy that is not in doubt, or budget, nothing is sent."""
        avoided = pending.refused_by | pending.owed_by(pairs) | self._suspicions.doubted(now_s) | {part.rows.node}
        parts = self._deal(pending, pairs, self.nodes.holders(pending.call.layer, avoided))
        if not parts or not (is_free or self._budget.take()):
            return
        for copy in parts:
            self.hedged_calls += self._send(pending, copy, now_s, is_hedge=True)

    def _suspect(self, node: int, now_s: float) -> None:
        """A node hangs: whatever it owes is asked of others now."""
        self._log.warning("expert_suspect", node=self._name(node))
        for pending in list(self._open.values()):
            for part in list(pending.parts.values()):
                if part.rows.node == node:
                    self._hedge(pending, part, pending.overdue(part, part.asked_s), now_s, is_free=True)

    def _others_answered(self, node: int, since_s: float) -> bool:
        return any(other.heard_s > since_s for other in self.nodes if other.number != node)

    def _is_given_up(self, pending: PendingCall, now_s: float) -> bool:
        if self.degrade_after_s is None or pending.homeless_since_s is None:
            return False
        return now_s - pending.homeless_since_s >= self.degrade_after_s and pending.sum.takes_some_pairs

    def _degrade(self, pending: PendingCall, now_s: float) -> None:
        """Go on without what nobody holds."""
        tokens = pending.leave_out(pending.uncovered())
        pending.homeless_since_s = None
        self.degraded_rows += tokens.size
        self._log.warning("expert_left_out", layer=pending.call.layer, rows=tokens.size)
        pending.on_degraded(tokens)
        self._take_back_pointless(pending, None, now_s)
        self._finish_if_whole(pending, now_s)

    # ---- answers

    def _answered(self, node: ExpertNode, message: Message, now_s: float) -> None:
        node.heard_s = now_s
        self._suspicions.heard(node.number, now_s)
        number = message.call if isinstance(message, ExpertRows | Failed) else 0
        if number == node.probe:
            node.probe = 0
        pending = self._calls.get(number)
        if pending is None or pending.parts[number].rows.node != node.number:
            self.late_answers += 1
            return
        part = self._take_part(pending, number)
        try:
            if not isinstance(message, ExpertRows):
                reason = message.message if isinstance(message, Failed) else f"answered {type(message).__name__}"
                raise ExecutionError(f"{node.node_id}: {reason}")
            pending.take(part, self._rows(message, part.rows, pending))
        except (ProtocolError, ExecutionError) as error:
            self._refused(pending, part.rows, error, now_s)
            return
        self._times.add(pending.call.layer, now_s - part.asked_s)
        self._suspicions.answered_in_time(node.number)
        self.hedge_wins += part.is_hedge
        self._take_back_pointless(pending, part, now_s)
        self._finish_if_whole(pending, now_s)

    def _take_back_pointless(self, pending: PendingCall, winner: AskedPart | None, now_s: float) -> None:
        """Others need not answer any more what has been answered; those that were asked first have lost a hedge."""
        suspects = set()
        for number in pending.pointless():
            loser = self._take_part(pending, number)
            node = loser.rows.node
            if winner is not None and loser.asked_s < winner.asked_s:
                self._times.add(pending.call.layer, now_s - loser.asked_s)
                if self._suspicions.lost(node, now_s):
                    suspects.add(node)
            self._cancel(node, number, now_s)
        for node in suspects:
            self._suspect(node, now_s)
        if winner is not None and not pending.sum.takes_some_pairs:
            self._ask_uncovered(pending, now_s)  # a sum of which some is known already had to be dropped as a whole

    def _cancel(self, number_of_node: int, number: int, now_s: float) -> None:
        """Take a call back; but one call stays with a node in doubt: its answer tells that the node is back."""
        if number_of_node not in self.nodes:
            return
        node = self.nodes[number_of_node]
        if not node.probe and self._suspicions.is_doubted(number_of_node, now_s):
            node.probe = number
            return
        if node.connected:
            try:
                node.socket.send(CancelCall((number,)), Header())
            except Full:
                self._log.debug("cancel_not_sent", node=node.node_id)  # it will be answered, and dropped as late

    def _finish_if_whole(self, pending: PendingCall, now_s: float) -> None:
        if pending.is_whole:
            self._open.pop(id(pending), None)
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
        self._resend(pending, now_s)

    def _rows(self, message: ExpertRows, part: NodeRows, pending: PendingCall) -> Tensor:
        width = pending.call.hidden.shape[1]
        if pending.sum.takes_some_pairs:
            return frame_to_tensor(message.rows, pending.call.hidden.dtype, (part.pairs.size, width), "rows")
        return frame_to_tensor(message.rows, torch.float32, (part.tokens.size, width), "rows")

    # ---- losing nodes and calls

    def _link_changed(self, node: ExpertNode, connected: bool, now_s: float) -> None:
        if node.connected == connected:
            return
        node.connected = connected
        self._log.info("expert_link", node=node.node_id, connected=connected)
        if connected:
            self._suspicions.forget(node.number)
            self._retry_homeless(now_s)
        else:
            self._reclaim(node, now_s)

    def _reclaim(self, node: ExpertNode, now_s: float) -> None:
        """What a lost node owed goes to other copies; if it answers after all, the answer is late."""
        node.probe = 0
        self._suspicions.forget(node.number)
        for number, pending in list(self._calls.items()):
            if number in pending.parts and pending.parts[number].rows.node == node.number:
                self._take_part(pending, number)
                self._resend(pending, now_s)

    def _resend(self, pending: PendingCall, now_s: float) -> None:
        if pending.uncovered().size:
            self.resent_calls += 1
            self._ask_uncovered(pending, now_s)

    def _take_part(self, pending: PendingCall, number: int) -> AskedPart:
        """Nobody owes this part any more."""
        del self._calls[number]
        part = pending.parts.pop(number)
        if part.rows.node in self.nodes:
            self.nodes[part.rows.node].outstanding_rows -= part.rows.pairs.size
        return part

    def _fail(self, pending: PendingCall, error: MoemeshError) -> None:
        self._forget(pending)
        pending.on_failed(error)

    def _forget(self, pending: PendingCall) -> None:
        for number in list(pending.parts):
            node = self._take_part(pending, number).rows.node
            self._cancel(node, number, self._looked_s)
        self._open.pop(id(pending), None)

    def _name(self, number: int) -> str:
        return self.nodes[number].node_id if number in self.nodes else "a lost node"
