"""The open expert calls of a stage: whom each was asked of, who owes what; sending parts and taking them back."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import structlog
import torch

from common.messages import CancelCall, Dispatch, Header
from common.wire.array import Int64Array, array_to_frame
from common.wire.tensor import tensor_to_frame
from common.wire.transport import Full
from services.stage.experts.dispatch import NodeRows, pair_weights, split_pairs
from services.stage.experts.hedging import HedgeBudget, ReplyTimes
from services.stage.experts.nodes import ExpertNode, ExpertNodes
from services.stage.experts.outliers import Suspicions
from services.stage.experts.pending_call import AskedPart, PendingCall


class CallLedger:
    """Which messages are in flight, and for which call."""

    def __init__(self, nodes: ExpertNodes, log: structlog.stdlib.BoundLogger) -> None:
        self.nodes = nodes
        self.times = ReplyTimes()
        self.budget = HedgeBudget()
        self.suspicions = Suspicions()
        self.num_hedges = 0
        self.other_class_rows = 0
        self._log = log
        self._numbers = itertools.count(1)
        self._open: dict[int, PendingCall] = {}
        """Calls that are not whole, by identity."""
        self._in_flight: dict[int, PendingCall] = {}
        """By number of each message."""

    @property
    def open_calls(self) -> list[PendingCall]:
        """All, oldest first; safe against changes while one goes through it."""
        return list(self._open.values())

    def add(self, pending: PendingCall) -> None:
        """A call that is to be followed."""
        self._open[id(pending)] = pending

    def close(self, pending: PendingCall) -> None:
        """Nothing is wanted of a call any more."""
        self._open.pop(id(pending), None)

    def find(self, number: int, node: ExpertNode) -> PendingCall | None:
        """The call that waits for this answer of this node."""
        pending = self._in_flight.get(number)
        return pending if pending is not None and pending.parts[number].rows.node == node.number else None

    def owed_by(self, node: int) -> list[tuple[PendingCall, int]]:
        """Calls and numbers of the messages that a node has not answered."""
        return [
            (pending, number) for number, pending in self._in_flight.items() if pending.parts[number].rows.node == node
        ]

    def ask_uncovered(self, pending: PendingCall, now_s: float) -> None:
        """Ask for the pairs that nobody owes; what nobody can take now waits as homeless."""
        while (pairs := pending.uncovered()).size:
            parts = self._deal(pending, pairs, self._holders(pending, pending.pausing(now_s), now_s))
            if not parts:
                if pending.homeless_since_s is None:
                    pending.homeless_since_s = now_s
                return
            for part in parts:
                if self._send(pending, part, now_s, is_hedge=False):
                    self.budget.earn()
                else:
                    pending.pause(part.node, now_s)
        pending.homeless_since_s = None

    def hedge(self, pending: PendingCall, part: AskedPart, pairs: Int64Array, now_s: float, is_free: bool) -> None:
        """Ask other copies for pairs of a part too. Nothing is sent where there is none, or no budget: try again.

        A copy in doubt is asked only instead of a suspect, where there is no other: the suspect will not answer. Of
        another numeric class too: being late is no reason to change the bits.
        """
        avoided = pending.pausing(now_s) | pending.owed_by(pairs) | {part.rows.node}
        if self.suspicions.is_suspect(part.rows.node, now_s):
            holders = self._holders(pending, avoided | self.suspicions.suspects(now_s), now_s)
        else:
            holders = self._of_class_of(part, pending.call.layer, avoided | self.suspicions.doubted(now_s))
        parts = self._deal(pending, pairs, holders)
        if not parts or not (is_free or self.budget.take()):
            return
        num_sent = sum([self._send(pending, copy, now_s, is_hedge=True) for copy in parts])
        self.num_hedges += num_sent
        if num_sent:
            pending.on_retried()
        elif not is_free:
            self.budget.give_back()

    def take_part(self, pending: PendingCall, number: int) -> AskedPart:
        """Nobody owes this part any more."""
        del self._in_flight[number]
        part = pending.parts.pop(number)
        if part.rows.node in self.nodes:
            self.nodes[part.rows.node].outstanding_rows -= part.rows.pairs.size
        return part

    def forget(self, pending: PendingCall, now_s: float) -> None:
        """A call ends without an answer; what is in flight for it is taken back."""
        for number in list(pending.parts):
            self.cancel(pending, self.take_part(pending, number).rows.node, number, now_s)
        self.close(pending)

    def cancel(self, pending: PendingCall, number_of_node: int, number: int, now_s: float) -> None:
        """Take a message back; but one stays with a node in doubt: its answer tells that the node is back. One whose
        time is up may have been dropped there without a word: then another one stays."""
        if number_of_node not in self.nodes:
            return
        node = self.nodes[number_of_node]
        has_none = not node.probe or now_s >= node.probe_after_s
        if has_none and self.suspicions.is_doubted(number_of_node, now_s):
            node.probe, node.probe_after_s = number, pending.deadline_s
            return
        if node.connected:
            try:
                node.socket.send(CancelCall((number,)), Header())
            except Full:
                self._log.debug("cancel_not_sent", node=node.node_id)  # it will be answered, and dropped as late

    def _holders(self, pending: PendingCall, avoided: set[int], now_s: float) -> Sequence[Sequence[int]]:
        """Copies that may be asked, by shard key: of each the best there are, see `_ranks`."""
        holders = self.nodes.holders(pending.call.layer, avoided)
        ranks = self._ranks(pending.call.layer, now_s)
        return [_best(copies, ranks) for copies in holders] if ranks else holders

    def _ranks(self, layer: int, now_s: float) -> dict[int, int]:
        """Nodes that are asked only where there is no better one: those in doubt and newcomers, those of another
        numeric class than the layer's first one, suspects. Nodes of rank 0 are left out."""
        suspects = self.suspicions.suspects(now_s)
        doubted = self.suspicions.doubted(now_s) | {node.number for node in self.nodes if not node.is_proven}
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

    def _of_class_of(self, part: AskedPart, layer: int, avoided: set[int]) -> Sequence[Sequence[int]]:
        """Copies of the layer's first numeric class, and of the class of the node that was asked."""
        holders, first = self.nodes.holders(layer, avoided), self.nodes.first_class(layer)
        if first is None:
            return holders
        classes = {first, self.nodes[part.rows.node].numeric_class}
        return [[number for number in copies if self.nodes[number].numeric_class in classes] for copies in holders]

    def _deal(self, pending: PendingCall, pairs: Int64Array, holders: Sequence[Sequence[int]]) -> list[NodeRows]:
        """Pairs by node, without those that nobody holds."""
        keys = pending.keys(pairs)
        has_holder = np.array([bool(copies) for copies in holders])
        pairs = pairs[has_holder[keys]]
        if not pairs.size:
            return []
        return split_pairs(pending.call, pairs, pending.num_slices, holders, self.nodes.outstanding_rows)

    def probe_newcomers(self, pending: PendingCall, now_s: float) -> None:
        """Ask each node that has not answered anything yet for one row of this call, on top of those who are asked for
        it: a node that is there and answers nothing is found without a token that waits for it. A node drops what
        nobody waits for any more without a word: once this call's time is up, another one is its probe."""
        new = [n for n in self.nodes if n.connected and not n.is_proven and n.probe_after_s <= now_s]
        if not new:
            return
        holders, pairs = self.nodes.holders(pending.call.layer, frozenset()), np.arange(pending.missing.size)
        keys = pending.keys(pairs).tolist()
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
        pending.parts[number] = AskedPart(part, now_s, is_hedge)
        pending.asked_s[part.pairs] = now_s
        pending.look_again_s = min(pending.look_again_s, now_s + self.times.delay_s(call.layer))
        self._in_flight[number] = pending
        if self.nodes.first_class(call.layer) not in (None, node.numeric_class):
            self.other_class_rows += part.pairs.size
            pending.on_retried()
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
