"""The stage's side of expert calls: what is in flight, which node owes it, and putting answers together.

A node whose connection closes, that refuses a call or takes no message loses its rows to the next copy, inside the
same step. One that is late keeps them, and the next copy is asked too (`hedging.py`); whichever answers first fills the
pairs, the other is told to forget it. Each pair of a call is taken once. A shard without a usable copy makes its call
wait for one, until its deadline, or is left out where the operator wants that.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import structlog
import torch
from torch import Tensor

from common.errors import DeadlineError, ExecutionError, MoemeshError, ProtocolError
from common.messages import CancelCall, Dispatch, ExpertRows, Failed, Header, Message, PublishPlacement
from common.wire.array import Int64Array, array_to_frame
from common.wire.tensor import frame_to_tensor, tensor_to_frame
from common.wire.transport import Full, LinkEvent
from services.stage.experts.dispatch import ExactSum, NodeRows, PartialSum, pair_weights, shard_keys, split_pairs
from services.stage.experts.hedging import HedgeBudget, OutlierDetector, ReplyTimes
from services.stage.experts.nodes import ExpertNode, ExpertNodes
from services.stage.experts.pending_call import FIRST_PAUSE_S, AskedPart, PendingCall
from services.stage.model.decoder import ExpertCall


@dataclass(slots=True)
class CallCounters:
    """What has become of a stage's expert calls since its start; in the words of its heartbeat."""

    calls: int = 0
    call_seconds: float = 0.0
    resent: int = 0
    hedged: int = 0
    hedge_wins: int = 0
    late_answers: int = 0
    suspicions: int = 0
    degraded_rows: int = 0
    other_class_rows: int = 0


class InFlightCalls:
    """The calls of a stage that are not whole: which node each was asked of, and which owes what.

    It sends the parts of a call, takes them back, and chooses the nodes.
    """

    def __init__(self, nodes: ExpertNodes, counters: CallCounters, log: structlog.stdlib.BoundLogger) -> None:
        self.nodes = nodes
        self.times = ReplyTimes()
        self.budget = HedgeBudget()
        self.outliers = OutlierDetector()
        self._counters = counters
        self._log = log
        self._numbers = itertools.count(1)
        self._open: dict[int, PendingCall] = {}
        """Calls that are not whole, by number."""
        self._asked: dict[int, AskedPart] = {}
        """All their parts that are not answered, by number of the message."""

    @property
    def open_calls(self) -> list[PendingCall]:
        """Returns all of them, oldest first, as a list that stays as it is while calls end."""
        return list(self._open.values())

    def begin(self, pending: PendingCall, now_s: float) -> None:
        """Asks for a new call, and follows it from now on. Raises ExecutionError for a layer that has no placement."""
        self.ask_uncovered(pending, now_s)
        self._open[pending.number] = pending
        self._probe_newcomers(pending, now_s)

    def close(self, pending: PendingCall) -> None:
        """Forgets a call of which nothing is wanted any more."""
        self._open.pop(pending.number, None)

    def find(self, number: int, node: ExpertNode) -> AskedPart | None:
        """Returns what waits for this answer of this node."""
        part = self._asked.get(number)
        return part if part is not None and part.rows.node == node.number else None

    def owed_by(self, node: int) -> list[AskedPart]:
        """Returns what a node has not answered."""
        return [part for part in self._asked.values() if part.rows.node == node]

    def ask_uncovered(self, pending: PendingCall, now_s: float) -> None:
        """Asks for the pairs that no node owes; what none can take now waits, unassigned."""
        while (pairs := pending.uncovered()).size:
            holders = self._holders(pending, pending.pausing(now_s), now_s)
            parts = split_pairs(pending.call, pairs, pending.num_slices, holders, self.nodes.outstanding_rows)
            if not parts:
                if pending.unassigned_since_s is None:
                    pending.unassigned_since_s = now_s
                return
            for part in parts:
                if self._send(pending, part, now_s, is_hedge=False):
                    self.budget.earn()
                else:
                    pending.pause(part.node, now_s)
        pending.unassigned_since_s = None

    def hedge(self, part: AskedPart, pairs: Int64Array, now_s: float, is_free: bool) -> None:
        """Asks other copies for pairs of a part too. Nothing is sent where there is none, or no budget: try again.

        The best copies that there are get them, see `_ranks`. One in doubt is asked only instead of a suspect, where
        there is no other: the suspect will not answer. Of another numeric class too: being late is not a reason to
        change the bits.
        """
        pending = part.pending
        avoided = pending.pausing(now_s) | pending.owed_by(pairs) | {part.rows.node}
        if self.outliers.is_suspect(part.rows.node, now_s):
            holders = self._holders(pending, avoided | self.outliers.suspects(now_s), now_s)
        else:
            classes = {self.nodes.first_class(pending.call.layer), self.nodes[part.rows.node].numeric_class}
            holders = self._holders(pending, avoided | self.outliers.doubted(now_s), now_s, classes)
        parts = split_pairs(pending.call, pairs, pending.num_slices, holders, self.nodes.outstanding_rows)
        if not parts or not (is_free or self.budget.spend()):
            return
        num_sent = sum([self._send(pending, copy, now_s, is_hedge=True) for copy in parts])
        self._counters.hedged += num_sent
        if num_sent:
            pending.num_retried += 1
        elif not is_free:
            self.budget.refund()

    def pop(self, part: AskedPart) -> None:
        """Forgets a part that no node owes any more."""
        del self._asked[part.number], part.pending.parts[part.number]
        if part.rows.node in self.nodes:
            self.nodes[part.rows.node].outstanding_rows -= part.rows.pairs.size

    def forget(self, pending: PendingCall, now_s: float) -> None:
        """Ends a call without an answer; what is in flight for it is taken back."""
        for part in list(pending.parts.values()):
            self.withdraw(part, now_s)
        self.close(pending)

    def withdraw(self, part: AskedPart, now_s: float) -> None:
        """Takes a part back; but a message stays with a node in doubt: its answer tells that the node is back.

        One whose time is up may have been dropped there without a word: then another one stays.
        """
        self.pop(part)
        if part.rows.node not in self.nodes:
            return
        node = self.nodes[part.rows.node]
        has_none = not node.probe or now_s >= node.probe_after_s
        if has_none and self.outliers.is_doubted(node.number, now_s):
            node.probe, node.probe_after_s = part.number, part.pending.deadline_s
            return
        if node.connected:
            try:
                node.socket.send(CancelCall((part.number,)), Header())
            except Full:
                self._log.debug("cancel_not_sent", node=node.node_id)  # it will be answered, and dropped as late

    def _holders(
        self, pending: PendingCall, avoided: set[int], now_s: float, classes: Collection[str | None] = (None,)
    ) -> Sequence[Sequence[int]]:
        """Returns the copies that may be asked, by shard key: of those of these numeric classes (None: of all) the best
        there are, see `_ranks`."""
        holders = self.nodes.holders(pending.call.layer, avoided)
        if None not in classes:
            holders = [
                [number for number in copies if self.nodes[number].numeric_class in classes] for copies in holders
            ]
        ranks = self._ranks(pending.call.layer, now_s)
        return [_best(copies, ranks) for copies in holders] if ranks else holders

    def _ranks(self, layer: int, now_s: float) -> dict[int, int]:
        """Returns the nodes that are asked only where there is no better one: those in doubt and newcomers, those of
        another numeric class than the layer's first one, suspects. Nodes of rank 0 are left out."""
        suspects = self.outliers.suspects(now_s)
        doubted = self.outliers.doubted(now_s) | {node.number for node in self.nodes if not node.is_proven}
        first = self.nodes.first_class(layer)
        if not doubted and first is None:
            return {}
        ranks: dict[int, int] = {}
        for node in self.nodes:
            is_other = first is not None and node.numeric_class != first
            if node.number in suspects or (is_other and node.number in doubted):
                ranks[node.number] = 3
            elif is_other:
                ranks[node.number] = 2
            elif node.number in doubted:
                ranks[node.number] = 1
        return ranks

    def _probe_newcomers(self, pending: PendingCall, now_s: float) -> None:
        """Asks each node that has not answered anything yet for one row of this call, on top of those that are asked
        for it: a node that is there and answers nothing is found without a token that waits for it. A node drops what
        is not wanted any more without a word: once this call's time is up, another one is its probe."""
        new = [n for n in self.nodes if n.connected and not n.is_proven and n.probe_after_s <= now_s]
        if not new:
            return
        holders, pairs = self.nodes.holders(pending.call.layer, frozenset()), np.arange(pending.missing.size)
        keys = shard_keys(pending.call, pairs, pending.num_slices).tolist()
        for node in new:
            held = pairs[np.array([node.number in holders[key] for key in keys], dtype=np.bool_)]
            if held.size:
                alone = [[node.number] if node.number in copies else [] for copies in holders]
                (part,) = split_pairs(pending.call, held[:1], pending.num_slices, alone, {})
                number = next(self._numbers)
                if self._dispatch(pending, part, number, now_s):
                    node.probe, node.probe_after_s = number, pending.deadline_s

    def _send(self, pending: PendingCall, part: NodeRows, now_s: float, is_hedge: bool) -> bool:
        number = next(self._numbers)
        if not self._dispatch(pending, part, number, now_s):
            return False
        call, node = pending.call, self.nodes[part.node]
        pending.parts[number] = self._asked[number] = AskedPart(number, pending, part, now_s, is_hedge)
        pending.asked_s[part.pairs] = now_s
        pending.look_again_s = min(pending.look_again_s, now_s + self.times.delay_s(call.layer))
        if self.nodes.first_class(call.layer) not in (None, node.numeric_class):
            self._counters.other_class_rows += part.pairs.size
            pending.num_retried += 1
        node.outstanding_rows += part.pairs.size
        return True

    def _dispatch(self, pending: PendingCall, part: NodeRows, number: int, now_s: float) -> bool:
        call, node = pending.call, self.nodes[part.node]
        is_all = part.tokens.size == call.hidden.shape[0]
        rows = call.hidden if is_all else call.hidden[torch.from_numpy(part.tokens)]
        is_exact = pending.sum.takes_some_pairs
        weights = np.zeros(0, np.float32) if is_exact else pair_weights(call, part, pending.num_slices)
        message = Dispatch(number, tensor_to_frame(rows), array_to_frame(part.routing), array_to_frame(weights))
        try:
            node.socket.send(message, pending.header_now(now_s))
        except Full:
            return False
        return True


def _best(copies: Sequence[int], ranks: Mapping[int, int]) -> Sequence[int]:
    best = min((ranks.get(number, 0) for number in copies), default=0)
    return [number for number in copies if ranks.get(number, 0) == best]


RETRY_INTERVAL_S = 0.1
"""How often pairs without a usable node are tried again, besides when a link or the placement changes."""
CONNECT_INTERVAL_S = 1.0
"""How often nodes are tried again for which there was no socket."""
LOOK_AGAIN_S = 0.01
"""The wait after nothing could be done about a late part: no budget, or no copy."""
AWAY_S = 0.1
"""A stage that has not looked for this long was stopped or computed: answers may lie in its own sockets."""


@dataclass(frozen=True, slots=True)
class CallDone:
    """A call whose sum is whole."""

    number: int
    """The number that `start` has returned."""
    answer: Tensor
    """[T, D]."""
    degraded_rows: frozenset[int]
    """Token rows that do without one of their experts."""
    num_retried: int
    """How often another node was asked too, or instead."""


@dataclass(frozen=True, slots=True)
class CallFailed:
    """A call that cannot be answered."""

    number: int
    error: MoemeshError


class ExpertClient:
    """All expert calls of one stage: `start` begins one, and `poll` says which have ended, and how."""

    def __init__(self, nodes: ExpertNodes, log: structlog.stdlib.BoundLogger) -> None:
        self.nodes = nodes
        self._log = log
        self.counters = CallCounters()
        self._in_flight = InFlightCalls(nodes, self.counters, log)
        self._call_numbers = itertools.count(1)
        self._ended: list[CallDone | CallFailed] = []
        """What `poll` will say."""
        self._next_retry_s = 0.0
        self._next_connect_s = 0.0
        self._looked_s = 0.0
        self._patient_until_s = 0.0
        self.combine = "exact"
        self.degrade_after_s: float | None = None
        """None: a call waits for a copy until its deadline."""

    def apply_placement(self, placement: PublishPlacement, router_term: int, num_slices: int, now_s: float) -> bool:
        """Learns which node holds what now. False: an older placement, or this one again. Raises as
        `ExpertNodes.apply_placement`."""
        gone = self.nodes.apply_placement(placement, router_term, num_slices)
        if gone is None:
            return False
        for pending in self._in_flight.open_calls:
            pending.pauses.clear()  # a node that lacked a shard may have it now
            if pending.num_slices != num_slices:  # a router before this one wanted it
                reason = f"its experts are cut into {num_slices} now, not into {pending.num_slices}"
                self._fail(pending, ExecutionError(f"layer {pending.call.layer}: {reason}"))
        for node in gone:
            self._reclaim(node, now_s)
        self._retry_unassigned(now_s)
        return True

    def start(self, call: ExpertCall, header: Header, now_s: float, deadline_s: float) -> int:
        """Sends a call's rows, and returns the number by which `poll` will say how it has ended.

        Before a placement is known they wait for it. Raises ExecutionError for a layer that the placement lacks.
        """
        num_slices = self.nodes.num_slices
        total: ExactSum | PartialSum = ExactSum(call, num_slices) if self.combine == "exact" else PartialSum(call)
        pending = PendingCall(next(self._call_numbers), call, header, deadline_s, num_slices, total, now_s)
        self._in_flight.begin(pending, now_s)
        return pending.number

    def poll(self, now_s: float) -> list[CallDone | CallFailed]:
        """Takes in what nodes say, looks after what is late, and returns the calls that have ended since, each once."""
        self._receive(now_s)
        self._check_deadlines(now_s)
        if now_s >= self._next_connect_s:
            self._next_connect_s = now_s + CONNECT_INTERVAL_S
            self.nodes.connect_unopened()
        ended, self._ended = self._ended, []
        return ended

    def _receive(self, now_s: float) -> None:
        for node in self.nodes:
            for event in node.socket.link_events():
                self._link_changed(node, event is LinkEvent.CONNECTED, now_s)
            while (received := node.socket.receive()) is not None:
                self._answered(node, received[0], now_s)

    def _check_deadlines(self, now_s: float) -> None:
        """Fails calls whose time is up, hedges what is late, and tries those again that no node could take."""
        if now_s >= self._next_retry_s:
            self._next_retry_s = now_s + RETRY_INTERVAL_S
            self._retry_unassigned(now_s)
        if now_s - self._looked_s > AWAY_S:
            self._patient_until_s = now_s + LOOK_AGAIN_S
        self._looked_s = now_s
        for pending in self._in_flight.open_calls:
            if now_s >= pending.deadline_s:
                self._fail(pending, self._out_of_time(pending))
            elif self._is_given_up(pending, now_s):
                self._degrade(pending, now_s)
            elif now_s >= max(pending.look_again_s, self._patient_until_s):
                self._hedge_late(pending, now_s)

    def wait_ms(self, now_s: float, longest_ms: int) -> int:
        """Returns how long there is nothing to do here unless a socket says something."""
        next_s = min((pending.look_again_s for pending in self._in_flight.open_calls), default=float("inf"))
        next_s = max(next_s, self._patient_until_s)
        return longest_ms if next_s - now_s > longest_ms / 1000 else max(1, int((next_s - now_s) * 1000) + 1)

    def abandon(self) -> None:
        """Forgets all calls: their steps are gone, their answers will be late."""
        self._ended.clear()
        for pending in self._in_flight.open_calls:
            self._in_flight.forget(pending, self._looked_s)

    def _retry_unassigned(self, now_s: float) -> None:
        for pending in self._in_flight.open_calls:
            if pending.unassigned_since_s is not None:
                self._in_flight.ask_uncovered(pending, now_s)

    # ---- being late

    def _hedge_late(self, pending: PendingCall, now_s: float) -> None:
        """Asks further copies for what is late, within the budget, and sees which are silent while others answer.

        What could not be asked now is looked at again: a copy may be free of doubt or of its pause then.
        """
        times, outliers = self._in_flight.times, self._in_flight.outliers
        delay_s, silence_s = times.delay_s(pending.call.layer), times.silence_s(pending.call.layer)
        for part in list(pending.parts.values()):
            node = part.rows.node
            is_silent = now_s - part.asked_s >= silence_s and self._others_answered(node, part.asked_s)
            if is_silent and outliers.silent(node, now_s):
                self._suspect(node, now_s)
            is_suspect = outliers.is_suspect(node, now_s)
            overdue = pending.overdue(part, part.asked_s if is_suspect else now_s - delay_s)
            if overdue.size:
                self._in_flight.hedge(part, overdue, now_s, outliers.is_struck(node))
        asked_s = float(pending.asked_s[pending.missing].min())
        pending.look_again_s = max(asked_s + delay_s, now_s + LOOK_AGAIN_S)

    def _suspect(self, node: int, now_s: float) -> None:
        """Notes that a node hangs: whatever it owes is asked of others now."""
        self._log.warning("expert_suspect", node=self._name(node))
        self.counters.suspicions += 1
        for part in self._in_flight.owed_by(node):
            self._in_flight.hedge(part, part.pending.overdue(part, part.asked_s), now_s, is_free=True)

    def _others_answered(self, node: int, since_s: float) -> bool:
        return any(other.heard_s > since_s for other in self.nodes if other.number != node)

    def _is_given_up(self, pending: PendingCall, now_s: float) -> bool:
        if self.degrade_after_s is None or pending.unassigned_since_s is None:
            return False
        return now_s - pending.unassigned_since_s >= self.degrade_after_s and pending.sum.takes_some_pairs

    def _degrade(self, pending: PendingCall, now_s: float) -> None:
        """Goes on without what no node holds."""
        num_rows = pending.leave_out(pending.uncovered())
        pending.unassigned_since_s = None
        self.counters.degraded_rows += num_rows
        self._log.warning("expert_left_out", layer=pending.call.layer, rows=num_rows)
        self._withdraw_pointless(pending, None, now_s)
        self._finish_if_whole(pending, now_s)

    # ---- answers

    def _answered(self, node: ExpertNode, message: Message, now_s: float) -> None:
        node.heard_s = now_s
        self._in_flight.outliers.heard(node.number, now_s)
        number = message.call if isinstance(message, ExpertRows | Failed) else 0
        is_probe = number != 0 and number == node.probe
        if is_probe:
            node.probe, node.probe_after_s = 0, now_s + FIRST_PAUSE_S
        is_asked_for_nothing_else = is_probe and not node.is_proven
        node.is_proven |= isinstance(message, ExpertRows)
        part = self._in_flight.find(number, node)
        if part is None:
            self.counters.late_answers += not is_asked_for_nothing_else
            return
        self._in_flight.pop(part)
        pending = part.pending
        try:
            if not isinstance(message, ExpertRows):
                reason = message.message if isinstance(message, Failed) else f"answered {type(message).__name__}"
                raise ExecutionError(f"{node.node_id}: {reason}")
            pending.accept(part, self._rows(message, part))
        except (ProtocolError, ExecutionError) as error:
            self._refused(part, error, now_s)
            return
        self._in_flight.times.add(pending.call.layer, now_s - part.asked_s)
        self._in_flight.outliers.answered_in_time(node.number)
        self.counters.hedge_wins += part.is_hedge
        self._withdraw_pointless(pending, part, now_s)
        self._finish_if_whole(pending, now_s)

    def _withdraw_pointless(self, pending: PendingCall, winner: AskedPart | None, now_s: float) -> None:
        """Others need not answer any more what has been answered; those that were asked first have lost a hedge."""
        suspects = set()
        for loser in pending.pointless():
            node = loser.rows.node
            if winner is not None and loser.asked_s < winner.asked_s:
                self._in_flight.times.add(pending.call.layer, now_s - loser.asked_s)
                if self._in_flight.outliers.lost(node, now_s):
                    suspects.add(node)
            self._in_flight.withdraw(loser, now_s)
            pending.unask(loser)
        for node in suspects:
            self._suspect(node, now_s)
        if winner is not None and not pending.sum.takes_some_pairs:
            # A sum of which some is known already had to be dropped as a whole.
            self._in_flight.ask_uncovered(pending, now_s)

    def _finish_if_whole(self, pending: PendingCall, now_s: float) -> None:
        if pending.is_whole:
            self._in_flight.close(pending)
            self.counters.calls += 1
            self.counters.call_seconds += now_s - pending.started_s
            rows = frozenset(pending.degraded_rows)
            self._ended.append(CallDone(pending.number, pending.sum.total(), rows, pending.num_retried))

    def _refused(self, part: AskedPart, error: MoemeshError, now_s: float) -> None:
        pending = part.pending
        self._log.warning("expert_call_refused", layer=pending.call.layer, reason=str(error))
        pending.last_refusal = str(error)
        pending.pause(part.rows.node, now_s)
        pending.unask(part)
        self._resend(pending, now_s)

    def _rows(self, message: ExpertRows, part: AskedPart) -> Tensor:
        hidden = part.pending.call.hidden
        if part.pending.sum.takes_some_pairs:
            shape = (part.rows.pairs.size, hidden.shape[1])
            return frame_to_tensor(message.rows, hidden.dtype, shape, "ExpertRows.rows")
        shape = (part.rows.tokens.size, hidden.shape[1])
        return frame_to_tensor(message.rows, torch.float32, shape, "ExpertRows.rows")

    # ---- losing nodes and calls

    def _link_changed(self, node: ExpertNode, connected: bool, now_s: float) -> None:
        if node.connected == connected:
            return
        node.connected = connected
        self._log.info("expert_link", node=node.node_id, connected=connected)
        if connected:
            self._in_flight.outliers.forget(node.number)
            self._retry_unassigned(now_s)
        else:
            self._reclaim(node, now_s)

    def _reclaim(self, node: ExpertNode, now_s: float) -> None:
        """Gives what a lost node owed to other copies; if it answers after all, the answer is late."""
        node.probe, node.probe_after_s = 0, 0.0
        self._in_flight.outliers.forget(node.number)
        for part in self._in_flight.owed_by(node.number):
            self._in_flight.pop(part)
            part.pending.unask(part)
            self._resend(part.pending, now_s)

    def _resend(self, pending: PendingCall, now_s: float) -> None:
        if pending.uncovered().size:
            self.counters.resent += 1
            pending.num_retried += 1
            self._in_flight.ask_uncovered(pending, now_s)

    def _out_of_time(self, pending: PendingCall) -> DeadlineError:
        waited_for = sorted({self._name(part.rows.node) for part in pending.parts.values()})
        missing = ", ".join(waited_for) or "a node that holds the layer's experts"
        refusal = f"; the last refusal: {pending.last_refusal}" if pending.last_refusal else ""
        return DeadlineError(f"layer {pending.call.layer}: no answer in time from {missing}{refusal}")

    def _fail(self, pending: PendingCall, error: MoemeshError) -> None:
        self._in_flight.forget(pending, self._looked_s)
        self._ended.append(CallFailed(pending.number, error))

    def _name(self, number: int) -> str:
        return self.nodes[number].node_id if number in self.nodes else "a lost node"
