"""The stage's side of expert calls: what is in flight, who owes it, and putting answers together.

A node whose connection closes, that refuses a call or takes no message loses its rows to the next copy, inside the
same step. One that is late keeps them, and the next copy is asked too (`hedging.py`); whichever answers first fills the
pairs, the other is told to forget it. Each pair of a call is taken once. A shard without a usable copy makes its call
wait for one, until its deadline, or is left out where the operator wants that.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
import torch
from torch import Tensor

from common.errors import DeadlineError, ExecutionError, MoemeshError, ProtocolError
from common.messages import ExpertRows, Failed, Header, Message, PublishPlacement
from common.wire.array import Int64Array
from common.wire.tensor import frame_to_tensor
from common.wire.transport import LinkEvent
from services.stage.experts.call_ledger import CallLedger
from services.stage.experts.dispatch import ExactSum, NodeRows, PartialSum
from services.stage.experts.nodes import ExpertNode, ExpertNodes
from services.stage.experts.pending_call import FIRST_PAUSE_S, AskedPart, PendingCall
from services.stage.model.decoder import ExpertCall

RETRY_INTERVAL_S = 0.1
"""How often pairs without a usable node are tried again, besides when a link or the placement changes."""
CONNECT_INTERVAL_S = 1.0
"""How often nodes are tried again for which there was no socket."""
LOOK_AGAIN_S = 0.01
"""After nothing could be done about a late part: no budget, or no copy."""
AWAY_S = 0.1
"""A stage that has not looked for so long was stopped or computed: answers may lie in its own sockets."""


class ExpertClient:
    """All expert calls of one stage."""

    def __init__(self, nodes: ExpertNodes, log: structlog.stdlib.BoundLogger) -> None:
        self.nodes = nodes
        self._log = log
        self._ledger = CallLedger(nodes, log)
        self._next_retry_s = 0.0
        self._next_connect_s = 0.0
        self._looked_s = 0.0
        self._patient_until_s = 0.0
        self.combine = "exact"
        self.degrade_after_s: float | None = None
        """None: a call waits for a copy until its deadline."""
        self.resent_calls = 0
        self.late_answers = 0
        self.hedge_wins = 0
        self.degraded_rows = 0
        self.wait_seconds = 0.0
        self.answered = 0

    @property
    def hedged_calls(self) -> int:
        """Messages that asked a further copy."""
        return self._ledger.num_hedges

    @property
    def other_class_rows(self) -> int:
        """Rows that were asked of a node of another numeric class than the layer's first one."""
        return self._ledger.other_class_rows

    @property
    def num_suspicions(self) -> int:
        """Times that a node was taken to hang."""
        return self._ledger.suspicions.num_suspicions

    def take_placement(self, placement: PublishPlacement, router_term: int, num_slices: int, now_s: float) -> bool:
        """Who holds what now. True if the sockets may have changed. Raises as `ExpertNodes.take_placement`."""
        gone = self.nodes.take_placement(placement, router_term, num_slices)
        if gone is None:
            return False
        for pending in self._ledger.open_calls:
            pending.pauses.clear()  # who lacked a shard may have it now
        for node in gone:
            self._reclaim(node, now_s)
        self._retry_homeless(now_s)
        return True

    def connect_unopened(self, now_s: float) -> bool:
        """Try nodes again, now and then, for which there was no socket. True if the sockets have changed."""
        if now_s < self._next_connect_s:
            return False
        self._next_connect_s = now_s + CONNECT_INTERVAL_S
        return self.nodes.connect_unopened()

    def start(
        self,
        call: ExpertCall,
        header: Header,
        now_s: float,
        deadline_s: float,
        on_done: Callable[[Tensor], None],
        on_failed: Callable[[MoemeshError], None],
        on_degraded: Callable[[Int64Array], None] = lambda tokens: None,
        on_retried: Callable[[], None] = lambda: None,
    ) -> None:
        """Send a call's rows; one of the callbacks comes later from `receive` or `check_deadlines`, never from here.

        Before a placement is known they wait for it. Raises ExecutionError for a layer that the placement lacks.
        """
        num_slices = self.nodes.num_slices
        total: ExactSum | PartialSum = ExactSum(call, num_slices) if self.combine == "exact" else PartialSum(call)
        callbacks = (on_done, on_failed, on_degraded, on_retried)
        pending = PendingCall(call, header, deadline_s, num_slices, total, now_s, *callbacks)
        self._ledger.ask_uncovered(pending, now_s)
        self._ledger.add(pending)
        self._ledger.probe_newcomers(pending, now_s)

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
        for pending in self._ledger.open_calls:
            if now_s >= pending.deadline_s:
                self._fail(pending, self._out_of_time(pending))
            elif self._is_given_up(pending, now_s):
                self._degrade(pending, now_s)
            elif now_s >= max(pending.look_again_s, self._patient_until_s):
                self._hedge_late(pending, now_s)

    def wait_ms(self, now_s: float, longest_ms: int) -> int:
        """How long there is nothing to do here unless a socket says something."""
        next_s = min((pending.look_again_s for pending in self._ledger.open_calls), default=float("inf"))
        next_s = max(next_s, self._patient_until_s)
        return longest_ms if next_s - now_s > longest_ms / 1000 else max(1, int((next_s - now_s) * 1000) + 1)

    def abandon(self) -> None:
        """Forget all calls: their steps are gone, their answers will be late."""
        for pending in self._ledger.open_calls:
            self._ledger.forget(pending, self._looked_s)

    def _retry_homeless(self, now_s: float) -> None:
        for pending in self._ledger.open_calls:
            if pending.homeless_since_s is not None:
                self._ledger.ask_uncovered(pending, now_s)

    # ---- being late

    def _hedge_late(self, pending: PendingCall, now_s: float) -> None:
        """Ask further copies for what is late, within the budget, and see who is silent while others answer.

        What could not be asked of anybody now is looked at again: a copy may be free of doubt or of its pause then.
        """
        times, suspicions = self._ledger.times, self._ledger.suspicions
        delay_s, silence_s = times.delay_s(pending.call.layer), times.silence_s(pending.call.layer)
        for part in list(pending.parts.values()):
            node = part.rows.node
            is_silent = now_s - part.asked_s >= silence_s and self._others_answered(node, part.asked_s)
            if is_silent and suspicions.silent(node, now_s):
                self._suspect(node, now_s)
            is_suspect = suspicions.is_suspect(node, now_s)
            overdue = pending.overdue(part, part.asked_s if is_suspect else now_s - delay_s)
            if overdue.size:
                self._ledger.hedge(pending, part, overdue, now_s, suspicions.is_struck(node))
        asked_s = float(pending.asked_s[pending.missing].min())
        pending.look_again_s = max(asked_s + delay_s, now_s + LOOK_AGAIN_S)

    def _suspect(self, node: int, now_s: float) -> None:
        """A node hangs: whatever it owes is asked of others now."""
        self._log.warning("expert_suspect", node=self._name(node))
        for pending, number in self._ledger.owed_by(node):
            part = pending.parts[number]
            self._ledger.hedge(pending, part, pending.overdue(part, part.asked_s), now_s, is_free=True)

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
        self._ledger.suspicions.heard(node.number, now_s)
        number = message.call if isinstance(message, ExpertRows | Failed) else 0
        is_probe = number != 0 and number == node.probe
        if is_probe:
            node.probe, node.probe_after_s = 0, now_s + FIRST_PAUSE_S
        is_asked_for_nothing_else = is_probe and not node.is_proven
        node.is_proven |= isinstance(message, ExpertRows)
        pending = self._ledger.find(number, node)
        if pending is None:
            self.late_answers += not is_asked_for_nothing_else
            return
        part = self._ledger.take_part(pending, number)
        try:
            if not isinstance(message, ExpertRows):
                reason = message.message if isinstance(message, Failed) else f"answered {type(message).__name__}"
                raise ExecutionError(f"{node.node_id}: {reason}")
            pending.take(part, self._rows(message, part.rows, pending))
        except (ProtocolError, ExecutionError) as error:
            self._refused(pending, part, error, now_s)
            return
        self._ledger.times.add(pending.call.layer, now_s - part.asked_s)
        self._ledger.suspicions.answered_in_time(node.number)
        self.hedge_wins += part.is_hedge
        self._take_back_pointless(pending, part, now_s)
        self._finish_if_whole(pending, now_s)

    def _take_back_pointless(self, pending: PendingCall, winner: AskedPart | None, now_s: float) -> None:
        """Others need not answer any more what has been answered; those that were asked first have lost a hedge."""
        suspects = set()
        for number in pending.pointless():
            loser = self._ledger.take_part(pending, number)
            pending.unask(loser)
            node = loser.rows.node
            if winner is not None and loser.asked_s < winner.asked_s:
                self._ledger.times.add(pending.call.layer, now_s - loser.asked_s)
                if self._ledger.suspicions.lost(node, now_s):
                    suspects.add(node)
            self._ledger.cancel(pending, node, number, now_s)
        for node in suspects:
            self._suspect(node, now_s)
        if winner is not None and not pending.sum.takes_some_pairs:
            self._ledger.ask_uncovered(
                pending, now_s
            )  # a sum of which some is known already had to be dropped as a whole

    def _finish_if_whole(self, pending: PendingCall, now_s: float) -> None:
        if pending.is_whole:
            self._ledger.close(pending)
            self.answered += 1
            self.wait_seconds += now_s - pending.started_s
            pending.on_done(pending.sum.total())

    def _refused(self, pending: PendingCall, part: AskedPart, error: MoemeshError, now_s: float) -> None:
        self._log.warning("expert_call_refused", layer=pending.call.layer, reason=str(error))
        pending.last_refusal = str(error)
        pending.pause(part.rows.node, now_s)
        pending.unask(part)
        self._resend(pending, now_s)

    def _rows(self, message: ExpertRows, part: NodeRows, pending: PendingCall) -> Tensor:
        width = pending.call.hidden.shape[1]
        if pending.sum.takes_some_pairs:
            return frame_to_tensor(message.rows, pending.call.hidden.dtype, (part.pairs.size, width), "ExpertRows.rows")
        return frame_to_tensor(message.rows, torch.float32, (part.tokens.size, width), "ExpertRows.rows")

    # ---- losing nodes and calls

    def _link_changed(self, node: ExpertNode, connected: bool, now_s: float) -> None:
        if node.connected == connected:
            return
        node.connected = connected
        self._log.info("expert_link", node=node.node_id, connected=connected)
        if connected:
            self._ledger.suspicions.forget(node.number)
            self._retry_homeless(now_s)
        else:
            self._reclaim(node, now_s)

    def _reclaim(self, node: ExpertNode, now_s: float) -> None:
        """What a lost node owed goes to other copies; if it answers after all, the answer is late."""
        node.probe, node.probe_after_s = 0, 0.0
        self._ledger.suspicions.forget(node.number)
        for pending, number in self._ledger.owed_by(node.number):
            pending.unask(self._ledger.take_part(pending, number))
            self._resend(pending, now_s)

    def _resend(self, pending: PendingCall, now_s: float) -> None:
        if pending.uncovered().size:
            self.resent_calls += 1
            pending.on_retried()
            self._ledger.ask_uncovered(pending, now_s)

    def _out_of_time(self, pending: PendingCall) -> DeadlineError:
        waited_for = sorted({self._name(part.rows.node) for part in pending.parts.values()})
        missing = ", ".join(waited_for) or "a node that holds the layer's experts"
        refusal = f"; the last refusal: {pending.last_refusal}" if pending.last_refusal else ""
        return DeadlineError(f"layer {pending.call.layer}: no answer in time from {missing}{refusal}")

    def _fail(self, pending: PendingCall, error: MoemeshError) -> None:
        self._ledger.forget(pending, self._looked_s)
        pending.on_failed(error)

    def _name(self, number: int) -> str:
        return self.nodes[number].node_id if number in self.nodes else "a lost node"
