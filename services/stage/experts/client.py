"""The stage's side of expert calls: what is in flight, which node owes it, and putting answers together.

A node whose connection closes, that refuses a call or takes no message loses its rows to the next copy, inside the
same step. One that is late keeps them, and the next copy is asked too (`hedging.py`); whichever answers first fills the
pairs, the other is told to forget it. Each pair of a call is taken once. A shard without a usable copy makes its call
wait for one, until its deadline, or is left out where the operator wants that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import structlog
import torch
import zmq
from torch import Tensor

from common.compute.native_library import NativeKernels
from common.errors import DeadlineError, ExecutionError, MoemeshError, ProtocolError
from common.messages import ExpertRows, Failed, Header, Message, PublishPlacement
from common.wire.call_ring import Outcome
from common.wire.tensor import frame_to_tensor
from common.wire.transport import LinkEvent
from services.stage.experts.dispatch import ExactSum, PartialSum
from services.stage.experts.in_flight import CallCounters, InFlightCalls
from services.stage.experts.nodes import ExpertNode, ExpertNodes
from services.stage.experts.pending_call import FIRST_PAUSE_S, AskedPart, PendingCall
from services.stage.experts.rings import RingCall, Rings, RunEnd
from services.stage.model.decoder import ExpertCall

RETRY_INTERVAL_S = 0.1
"""How often pairs without a usable node are tried again, besides when a link or the placement changes."""
CONNECT_INTERVAL_S = 1.0
"""How often nodes are tried again for which there was no socket."""
LOOK_AGAIN_S = 0.01
"""The wait after nothing could be done about a late part: no budget, or no copy."""
SOON_S = 0.002
"""How long a stage that has nothing else to do waits for the answers of rings before it looks at its sockets."""
LOST_S = 2.0
"""How long a ring may owe an answer: then it is asked for in a message, of the same node if there is no other."""
RINGS_INTERVAL_S = 0.02
"""How often rings are looked after, besides when a link changes."""
AWAY_S = 0.1
"""A stage that has not looked for this long was stopped or computed: answers may lie in its own sockets."""


REFUSALS = MappingProxyType(
    {
        Outcome.MALFORMED: "the call made no sense to it",
        Outcome.NOT_HELD: "an expert of it is not held here",
        Outcome.OUT_OF_TIME: "its time was up",
        Outcome.DAMAGED: "the call, or the answer, was damaged in the shared memory",
    }
)


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
    is_mixed: bool = False
    """A node of another numeric class than the layer's first one was asked."""


@dataclass(frozen=True, slots=True)
class CallFailed:
    """A call that cannot be answered."""

    number: int
    error: MoemeshError


class ExpertClient:
    """All expert calls of one stage: `start` begins one, and `poll` says which have ended, and how."""

    def __init__(
        self,
        nodes: ExpertNodes,
        log: structlog.stdlib.BoundLogger,
        rings: Rings | None = None,
        kernels: NativeKernels | None = None,
    ) -> None:
        """`rings`: None sends all calls as messages. `kernels`: None adds with torch what comes as messages."""
        self.nodes = nodes
        self._kernels = kernels
        self._log = log
        self._rings = rings
        self.counters = CallCounters()
        self._in_flight = InFlightCalls(nodes, rings, self.counters, log)
        self._in_rings: dict[int, RingCall] = {}
        """Calls of which all parts were asked through rings, and none is late."""
        self._next_rings_s = 0.0
        self._call_numbers = itertools.count(1)
        self._ended: list[CallDone | CallFailed] = []
        """What `poll` will say."""
        self._next_retry_s = 0.0
        self._next_connect_s = 0.0
        self._looked_s = 0.0
        self._patient_until_s = 0.0
        self.busy_seconds = 0.0
        """How long forward passes have computed here, from layer to layer."""
        self.combine = "exact"
        self.degrade_after_s: float | None = None
        """None: a call waits for a copy until its deadline."""

    def apply_placement(self, placement: PublishPlacement, router_term: int, num_slices: int, now_s: float) -> bool:
        """Learns which node holds what now. False: an older placement, or this one again. Raises as
        `ExpertNodes.apply_placement`."""
        gone = self.nodes.apply_placement(placement, router_term, num_slices)
        if gone is None:
            return False
        for asked in list(self._in_rings.values()):
            self._follow(asked, now_s)
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
        number = next(self._call_numbers)
        if self._rings is not None and self.combine == "exact" and not self._in_flight.outliers.is_anyone_struck(now_s):
            asked = self._rings.ask(number, call, header, now_s, deadline_s)
            if asked is not None:
                self._in_rings[number] = asked
                return number
        self._ask_in_messages(number, call, header, now_s, deadline_s)
        return number

    def _ask_in_messages(self, number: int, call: ExpertCall, header: Header, now_s: float, deadline_s: float) -> None:
        num_slices = self.nodes.num_slices
        is_exact = self.combine == "exact"
        total: ExactSum | PartialSum = ExactSum(call, num_slices, self._kernels) if is_exact else PartialSum(call)
        self._in_flight.begin(PendingCall(number, call, header, deadline_s, num_slices, total, now_s), now_s)

    def await_answer(self, number: int, clock: Callable[[], float], until_s: float = 0.0) -> CallDone | None:
        """Waits for a call that goes through rings, for SOON_S at most. Its forward pass may go on meanwhile, until
        `until_s`: then what ends is the call of a later layer. None: `poll` will say how it has ended."""
        asked = self._in_rings.get(number)
        # With another call there, too, the bell may have been rung for that one: the owner's poll hears it.
        is_alone = len(self._in_rings) == 1 and not self._in_flight.in_rings
        if asked is None or self._rings is None or not is_alone:
            return None
        if self._rings.can_run(asked):
            return self._run(self._rings, asked, clock, until_s)
        return self._end_in_rings(asked, clock()) if self._rings.take_in(asked, SOON_S) else None

    def poll(self, now_s: float) -> list[CallDone | CallFailed]:
        """Takes in what nodes say, looks after what is late, and returns the calls that have ended since, each once."""
        self._receive(now_s)
        if self._rings is not None:
            self._look_at_rings(self._rings, now_s)
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
        delay_s = self._in_flight.times.delay_s
        looks_s = [pending.look_again_s for pending in self._in_flight.open_calls]
        looks_s += [asked.asked_s + delay_s(asked.call.layer) for asked in self._in_rings.values()]
        next_s = max(min(looks_s, default=float("inf")), self._patient_until_s)
        return longest_ms if next_s - now_s > longest_ms / 1000 else max(1, int((next_s - now_s) * 1000) + 1)

    def abandon(self) -> None:
        """Forgets all calls: their steps are gone, their answers will be late."""
        self._ended.clear()
        for asked in list(self._in_rings.values()):
            self._adopt(asked)
        for pending in self._in_flight.open_calls:
            self._in_flight.forget(pending, self._looked_s)

    # ---- rings

    @property
    def bell(self) -> int | None:
        """Returns what rings when an answer has come through a ring; None: none does."""
        return None if self._rings is None else self._rings.bell

    def poll_sockets(self) -> list[zmq.Socket[bytes]]:
        """Returns the sockets by which nodes answer, and those that tell of them."""
        return self.nodes.poll_sockets() + ([] if self._rings is None else self._rings.poll_sockets())

    @property
    def bytes_sent(self) -> int:
        """Returns what was sent to all nodes since start, in messages and over links."""
        return self.nodes.bytes_sent + (0 if self._rings is None else self._rings.bytes_sent)

    def close(self) -> None:
        """Gives up the rings."""
        if self._rings is not None:
            self._rings.close()

    def _look_at_rings(self, rings: Rings, now_s: float) -> None:
        self.counters.late_answers += rings.hear()
        if now_s >= self._next_rings_s:
            self._next_rings_s = now_s + RINGS_INTERVAL_S
            for number in rings.look(now_s):
                self._lose_ring(number, now_s)
        for asked in list(self._in_rings.values()):
            if rings.take_in(asked):
                done = self._end_in_rings(asked, now_s)
                self._ended += [] if done is None else [done]
            elif now_s >= asked.asked_s + self._in_flight.times.delay_s(asked.call.layer):
                self._follow(asked, now_s)
        for part in self._in_flight.in_rings:
            assert part.ring is not None, "it is in one"
            if part.ring.outcome(part.ring_index) is None:
                rings.take_in(part.ring)
            outcome = part.ring.outcome(part.ring_index)
            if part.number not in part.pending.parts:
                continue  # it was taken back by what has been done for one before
            if outcome is None and now_s - part.asked_s >= LOST_S:
                self._lose_part(part, now_s)  # perhaps its slot was changed: a message would not be
            elif outcome is not None:
                self._heard(part.rows.node, now_s)
                rows = part.ring.rows[torch.from_numpy(part.rows.pairs)]
                error = None if outcome is Outcome.GIVEN else ExecutionError(self._refusal(part.rows.node, outcome))
                self._take(part, rows if error is None else error, now_s, pauses=outcome is not Outcome.DAMAGED)

    def _lose_ring(self, node: int, now_s: float) -> None:
        """What was asked through a ring that was given up is asked again; the node itself may be well."""
        for asked in [asked for asked in self._in_rings.values() if any(n.number == node for n in asked.nodes)]:
            self._follow(asked, now_s)
        for part in self._in_flight.owed_by(node):
            if part.ring is not None and part.number in part.pending.parts:
                self._lose_part(part, now_s)

    def _lose_part(self, part: AskedPart, now_s: float) -> None:
        self._in_flight.pop(part)
        part.pending.unask(part)
        self._resend(part.pending, now_s)

    def _run(self, rings: Rings, asked: RingCall, clock: Callable[[], float], until_s: float) -> CallDone | None:
        ran = rings.run(asked, SOON_S, until_s)
        now_s = clock()
        self.busy_seconds += ran.busy_seconds
        for node in ran.nodes:
            node.heard_s = now_s
        for passed in ran.passed:
            self._in_flight.times.add(passed.layer, passed.seconds, passed.num_parts)
            self._note_whole(passed.seconds, passed.num_parts)
        if ran.end is RunEnd.ANSWERED_LAST and asked.answer is not None:
            del self._in_rings[asked.number]
            return CallDone(asked.number, asked.answer, frozenset(), 0)
        if ran.end is RunEnd.NOT_ASKED:
            del self._in_rings[asked.number]
            self._ask_in_messages(asked.number, asked.call, asked.header, now_s, asked.deadline_s)
        elif not asked.num_waiting:
            self._follow(asked, now_s)
        return None

    def _note_whole(self, seconds: float, num_parts: int) -> None:
        self._in_flight.budget.earn(num_parts)
        self.counters.calls += 1
        self.counters.call_seconds += seconds

    def _end_in_rings(self, asked: RingCall, now_s: float) -> CallDone | None:
        """Ends a call of which nothing is to come. None: it was refused in part, and goes on as others do."""
        if not asked.is_given or self._rings is None:
            self._follow(asked, now_s)
            return None
        del self._in_rings[asked.number]
        nodes = asked.nodes
        for node in nodes:
            node.heard_s = now_s
        self._in_flight.times.add(asked.call.layer, now_s - asked.asked_s, len(nodes))
        self._note_whole(now_s - asked.started_s, len(nodes))
        return CallDone(asked.number, self._rings.total(asked), frozenset(), 0)

    def _adopt(self, asked: RingCall) -> PendingCall:
        """Makes of a call in rings one as those in messages are; nothing more of it is asked through rings."""
        del self._in_rings[asked.number]
        asked.ask_no_more()
        pending = PendingCall(
            asked.number,
            asked.call,
            asked.header,
            asked.deadline_s,
            asked.num_slices,
            ExactSum(asked.call, asked.num_slices, self._kernels),
            asked.started_s,
        )
        self._in_flight.follow(pending, asked)
        return pending

    def _follow(self, asked: RingCall, now_s: float) -> None:
        """Treats a call as one that was sent in messages, from now on: it is late, refused, or has lost a node."""
        pending = self._adopt(asked)
        for part in asked.parts():
            if part.outcome is None:
                continue
            self._heard(part.rows.node, now_s)
            if part.outcome is Outcome.GIVEN:
                self._in_flight.times.add(asked.call.layer, now_s - asked.asked_s)
                self._in_flight.budget.earn()
            else:
                reason = self._refusal(part.rows.node, part.outcome)
                # What was damaged in a ring is asked again at once: a message will not be.
                self._note_refusal(pending, part.rows.node, reason, now_s, part.outcome is not Outcome.DAMAGED)
        if asked.num_slices == self.nodes.num_slices:  # else it fails: there are no such shards any more
            self._resend(pending, now_s)
        self._finish_if_whole(pending, now_s)

    def _refusal(self, node: int, outcome: Outcome) -> str:
        return f"{self._name(node)}: {REFUSALS[outcome]}"

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

    def _heard(self, node: int, now_s: float) -> None:
        if node in self.nodes:
            self.nodes[node].heard_s = now_s
        self._in_flight.outliers.heard(node, now_s)

    def _answered(self, node: ExpertNode, message: Message, now_s: float) -> None:
        self._heard(node.number, now_s)
        number = message.call if isinstance(message, ExpertRows | Failed) else 0
        is_probe = number != 0 and number == node.probe
        if is_probe:
            node.probe, node.probe_after_s = 0, now_s + FIRST_PAUSE_S
        is_asked_for_nothing_else = is_probe and not node.is_proven
        if not node.is_proven and isinstance(message, ExpertRows):
            node.is_proven = True
            self.nodes.num_changes += 1
        part = self._in_flight.find(number, node)
        if part is None:
            self.counters.late_answers += not is_asked_for_nothing_else
            return
        answer: Tensor | MoemeshError
        try:
            if not isinstance(message, ExpertRows):
                reason = message.message if isinstance(message, Failed) else f"answered {type(message).__name__}"
                raise ExecutionError(f"{node.node_id}: {reason}")
            answer = self._rows(message, part)
        except (ProtocolError, ExecutionError) as error:
            answer = error
        self._take(part, answer, now_s)

    def _take(self, part: AskedPart, answer: Tensor | MoemeshError, now_s: float, *, pauses: bool = True) -> None:
        """Uses what a node says to a part: its rows, or why there are none. `pauses`: whether that node is then left
        alone for a while."""
        self._in_flight.pop(part)
        pending = part.pending
        if isinstance(answer, MoemeshError):
            self._note_refusal(pending, part.rows.node, str(answer), now_s, pauses)
            pending.unask(part)
            self._resend(pending, now_s)
            return
        pending.accept(part.rows, answer)
        self._in_flight.times.add(pending.call.layer, now_s - part.asked_s)
        self._in_flight.outliers.answered_in_time(part.rows.node)
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
            self._ended.append(
                CallDone(pending.number, pending.sum.total(), rows, pending.num_retried, pending.is_mixed)
            )

    def _note_refusal(self, pending: PendingCall, node: int, reason: str, now_s: float, pauses: bool) -> None:
        self._log.warning("expert_call_refused", layer=pending.call.layer, reason=reason)
        pending.last_refusal = reason
        if pauses:
            pending.pause(node, now_s)

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
        self.nodes.num_changes += 1
        self._next_rings_s = 0.0
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
        for asked in [asked for asked in self._in_rings.values() if node in asked.nodes]:
            self._follow(asked, now_s)
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
