"""The calls of a stage that are not whole: which node each was asked of, and which owes what. It sends the parts of a
call, takes them back, and chooses the nodes; `client.py` says when."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import structlog
import torch

from common.messages import CancelCall, Dispatch, Header
from common.wire.array import Int64Array, array_to_frame
from common.wire.call_ring import Outcome
from common.wire.tensor import tensor_to_frame
from common.wire.transport import Full
from services.stage.experts.dispatch import NodeRows, pair_weights, shard_keys, split_pairs
from services.stage.experts.hedging import HedgeBudget, OutlierDetector, ReplyTimes
from services.stage.experts.nodes import ExpertNode, ExpertNodes
from services.stage.experts.pending_call import AskedPart, PendingCall
from services.stage.experts.rings import RingCall, Rings


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

    def __init__(
        self, nodes: ExpertNodes, rings: Rings | None, counters: CallCounters, log: structlog.stdlib.BoundLogger
    ) -> None:
        self.nodes = nodes
        self._rings = rings
        self.numbers = itertools.count(1)
        """Numbers of messages and of parts."""
        self.times = ReplyTimes()
        self.budget = HedgeBudget()
        self.outliers = OutlierDetector()
        self._counters = counters
        self._log = log
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

    def follow(self, pending: PendingCall, asked: RingCall) -> None:
        """Follows a call that has been asked through rings, from now on; what has come of it is used."""
        self._open[pending.number] = pending
        for part in asked.parts():
            pairs, number = part.rows.pairs, next(self.numbers)
            if part.outcome is Outcome.GIVEN:
                pending.accept(part.rows, asked.rows[torch.from_numpy(pairs)])
            elif part.outcome is None:
                owed = AskedPart(number, pending, part.rows, asked.asked_s, False, asked, part.index)
                pending.parts[number] = self._asked[number] = owed
                pending.asked_s[pairs] = asked.asked_s
                if part.rows.node in self.nodes:
                    self.nodes[part.rows.node].outstanding_rows += pairs.size
        pending.look_again_s = 0.0

    def close(self, pending: PendingCall) -> None:
        """Forgets a call of which nothing is wanted any more."""
        self._open.pop(pending.number, None)

    def find(self, number: int, node: ExpertNode) -> AskedPart | None:
        """Returns what waits for this answer of this node."""
        part = self._asked.get(number)
        return part if part is not None and part.rows.node == node.number else None

    @property
    def in_rings(self) -> list[AskedPart]:
        """Returns the parts that were asked through a ring."""
        return [part for part in self._asked.values() if part.ring is not None]

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
            num_left = pairs.size
            for part in parts:
                if self._send(pending, part, now_s, is_hedge=False):
                    self.budget.earn()
                    num_left -= part.pairs.size
                else:
                    pending.pause(part.node, now_s)
            if not num_left:
                break
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
        if part.ring is not None and self._rings is not None:
            self._rings.take_back(part.ring, part.ring_index)
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
            if part.ring is None:
                node.probe, node.probe_after_s = part.number, part.pending.deadline_s
            elif part.pending.num_slices == self.nodes.num_slices:
                self._probe(node, part.pending, part.rows.pairs, now_s)
            return
        if node.connected and part.ring is None:
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
            self._probe(node, pending, held, now_s)

    def _probe(self, node: ExpertNode, pending: PendingCall, pairs: Int64Array, now_s: float) -> None:
        """Asks a node for the first of these pairs, which it holds, on top of whoever is asked for it."""
        holders = self.nodes.holders(pending.call.layer, frozenset())
        alone = [[node.number] if node.number in copies else [] for copies in holders]
        for part in split_pairs(pending.call, pairs[:1], pending.num_slices, alone, {}):
            number = next(self.numbers)
            if self._dispatch(pending, part, number, now_s):
                node.probe, node.probe_after_s = number, pending.deadline_s

    def _send(self, pending: PendingCall, part: NodeRows, now_s: float, is_hedge: bool) -> bool:
        number = next(self.numbers)
        if not self._dispatch(pending, part, number, now_s):
            return False
        call, node = pending.call, self.nodes[part.node]
        pending.parts[number] = self._asked[number] = AskedPart(number, pending, part, now_s, is_hedge)
        pending.asked_s[part.pairs] = now_s
        pending.look_again_s = min(pending.look_again_s, now_s + self.times.delay_s(call.layer))
        if self.nodes.first_class(call.layer) not in (None, node.numeric_class):
            self._counters.other_class_rows += part.pairs.size
            pending.num_retried += 1
            pending.is_mixed = True
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
