"""Says when to ask a further copy, and when and how to doubt a node; `client.py` asks. Pure; times are arguments.

The delay follows the replies: a call that takes longer than nearly all others before it is probably not merely
queueing. Two bounds hold it where the numbers mislead. The floor: on two cores that are busy with five processes, a
node waits for a core two or three times 3-4 ms while it computes one call, and a call that comes while another layer
runs waits for that too; below 15 ms a hedge would mostly repeat work that is being done. The ceiling: a token passes
a handful of stages, each of which may have to find out for itself that a node hangs; at 100 ms two of them still stay
under the 0.4 s that a stream may stand still. A large prefill chunk or a slow machine may take longer than the
ceiling with nothing wrong. Then the budget is what keeps a general slowdown from doubling the load that caused it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

QUANTILE = 0.99
DELAY_FACTOR = 1.5
"""Multiplies the quantile: of 256 replies it is the third largest, which the next slow one may exceed by a little."""
FLOOR_S = 0.015
CEILING_S = 0.100
SILENCE_FACTOR = 2.0
SHORTEST_SILENCE_S = 0.2
"""Two stages that find out one after the other then still stay under, or near, 0.4 s without any hedge."""
LONGEST_SILENCE_S = 1.0
WINDOW = 256
MIN_SAMPLES = 32
"""A layer with fewer replies is judged by those of all layers; with none at all the delay is the ceiling."""
RECOMPUTE_EVERY = 16
"""Divides MIN_SAMPLES, so that there is a quantile when it is first asked for."""

HEDGES_PER_CALL = 0.05
HEDGE_BURST = 8.0
"""Enough for one call of each micro-batch in flight to a node that stops, before it is known to have stopped."""


class ReplyTimes:
    """How long nodes took for the last calls, by layer, and what follows for the calls that are open."""

    def __init__(self) -> None:
        self._all_layers = _Window()
        self._layers: dict[int, _Window] = {}

    def add(self, layer: int, seconds: float, count: int = 1) -> None:
        """Notes that a call was answered, or given up after that long, by so many nodes."""
        window = self._layers.get(layer)
        if window is None:
            window = self._layers[layer] = _Window()
        for _ in range(count):
            self._all_layers.add(seconds)
            window.add(seconds)

    def delay_s(self, layer: int) -> float:
        """Returns how long a call of this layer may be unanswered before a copy is asked, in [FLOOR_S, CEILING_S]."""
        return min(CEILING_S, max(FLOOR_S, DELAY_FACTOR * self._quantile_s(layer)))

    def silence_s(self, layer: int) -> float:
        """Returns how long a call of this layer may lie at one node, while others answer, before it is taken to
        hang."""
        return min(LONGEST_SILENCE_S, max(SHORTEST_SILENCE_S, SILENCE_FACTOR * self._quantile_s(layer)))

    def _quantile_s(self, layer: int) -> float:
        window = self._layers.get(layer)
        if window is None or len(window) < MIN_SAMPLES:
            window = self._all_layers
        return window.quantile_s if len(window) >= MIN_SAMPLES else LONGEST_SILENCE_S


class _Window:
    """The last WINDOW samples; the quantile is computed anew now and then, since it is asked for far more often."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=WINDOW)
        self._num_added = 0
        self.quantile_s = 0.0

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, seconds: float) -> None:
        self._samples.append(seconds)
        self._num_added += 1
        if self._num_added % RECOMPUTE_EVERY == 0:
            self.quantile_s = _quantile(sorted(self._samples), QUANTILE)


def _quantile(ascending: Sequence[float], share: float) -> float:
    """Returns what lies there between two samples, in proportion; np.quantile takes ten times as long."""
    place = share * (len(ascending) - 1)
    below = int(place)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (ascending[above] - ascending[below]) * (place - below)


class HedgeBudget:
    """A token bucket that calls fill: so many hedges per call in the long run, a small burst at once."""

    def __init__(self) -> None:
        self._tokens = HEDGE_BURST

    def earn(self, count: int = 1) -> None:
        """Notes that so many calls were sent that are not hedges."""
        self._tokens = min(HEDGE_BURST, self._tokens + count * HEDGES_PER_CALL)

    def spend(self) -> bool:
        """Returns whether one more hedge may be sent now; it is counted."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def refund(self) -> None:
        """Undoes `spend`: the hedge could not be sent."""
        self._tokens = min(HEDGE_BURST, self._tokens + 1.0)


SUSPECT_AFTER_LOSSES = 3
DOUBT_LAPSES_S = 5.0
"""Should the answer that would tell that a node is back be lost with something else, it is tried again after this."""
FREE_STRIKES = 2
"""A pause or a burst of load makes a strike or two; only more of them make a slow node."""
FIRST_PENALTY_S = 0.25
LONGEST_PENALTY_S = 4.0
STRUCK_S = 30.0
"""So long after a doubt began a node counts as struck lately, unless it is forgiven before."""
FORGIVEN_AFTER_ANSWERS = 20
"""Answers in time, one after the other."""


@dataclass(slots=True)
class _Standing:
    """How one node stands. Untouched as long as it answers in time."""

    doubted_s: float | None = None
    """When the doubt began; None: no doubt."""
    heard: bool = True
    """Whether it has said anything since."""
    not_before_s: float = 0.0
    losses_in_a_row: int = 0
    is_suspect: bool = False
    struck_s: float = -STRUCK_S
    """When the last doubt began."""
    strikes: int = 0
    """Times that a doubt began, until it is forgiven."""
    answers_in_a_row: int = 0


class OutlierDetector:
    """Which expert nodes a stage keeps away from, by how they answer it. Nodes go by this stage's number of them.

    Three steps. A node that lost a hedge (a copy that was asked later answered first) is *in doubt* until it says
    anything: new rows go to other copies, and its late calls are hedged without asking the budget. One that lost
    several in a row, or lets one call lie while others answer, is *suspect*: what it owes is asked of others at once.
    One that comes back and is late again, time after time, is slow rather than stopped: its doubts last longer and
    longer, until it has answered in time for a while. No node is ever locked out: where no other copy is usable, one in
    doubt is asked.
    """

    def __init__(self) -> None:
        self._standings: dict[int, _Standing] = {}

    def is_anyone_struck(self, now_s: float) -> bool:
        """Returns whether some node was in doubt lately."""
        standings = self._standings.values()
        return any(s.doubted_s is not None or now_s - s.struck_s < STRUCK_S for s in standings)

    def heard(self, node: int, now_s: float) -> None:
        """Notes that it said something, however late: it lives, and doubts may end."""
        standing = self._standings.get(node)
        if standing is None:
            return
        standing.heard, standing.losses_in_a_row, standing.is_suspect = True, 0, False
        self._end_doubt(standing, now_s)

    def answered_in_time(self, node: int) -> None:
        """Notes that an answer of it was used."""
        standing = self._standings.get(node)
        if standing is None:
            return
        standing.answers_in_a_row += 1
        if standing.answers_in_a_row >= FORGIVEN_AFTER_ANSWERS and standing.doubted_s is None:
            del self._standings[node]

    def lost(self, node: int, now_s: float) -> bool:
        """Notes that a copy that was asked later answered first. True if the node has become suspect by it."""
        standing = self._standings.setdefault(node, _Standing())
        self._begin_doubt(standing, now_s)
        standing.losses_in_a_row += 1
        return standing.losses_in_a_row >= SUSPECT_AFTER_LOSSES and self._suspect(standing)

    def silent(self, node: int, now_s: float) -> bool:
        """Notes that a call has lain there too long while others answered. True if it has become suspect by it."""
        standing = self._standings.setdefault(node, _Standing())
        self._begin_doubt(standing, now_s)
        return self._suspect(standing)

    def forget(self, node: int) -> None:
        """Forgets a node whose connection is new, or gone for good: nothing of before counts."""
        self._standings.pop(node, None)

    def is_doubted(self, node: int, now_s: float) -> bool:
        """Returns whether others are to be asked instead."""
        standing = self._standings.get(node)
        if standing is None or standing.doubted_s is None:
            return False
        self._end_doubt(standing, now_s)
        return standing.doubted_s is not None

    def doubted(self, now_s: float) -> set[int]:
        """Returns all such nodes."""
        return {node for node in self._standings if self.is_doubted(node, now_s)}

    def is_suspect(self, node: int, now_s: float) -> bool:
        """Returns whether it is taken to hang: whatever it owes is to be asked of others, as soon as one can be
        asked."""
        return self.is_doubted(node, now_s) and self._standings[node].is_suspect

    def suspects(self, now_s: float) -> set[int]:
        """Returns all such nodes."""
        return {node for node in self._standings if self.is_suspect(node, now_s)}

    def is_struck(self, node: int) -> bool:
        """Returns whether it was in doubt lately: hedges of its calls need no budget."""
        return node in self._standings

    def _begin_doubt(self, standing: _Standing, now_s: float) -> None:
        standing.answers_in_a_row = 0
        standing.heard = False
        if standing.doubted_s is None:
            standing.strikes += 1
            standing.doubted_s = standing.struck_s = now_s
            standing.not_before_s = now_s + _penalty_s(standing.strikes)

    def _end_doubt(self, standing: _Standing, now_s: float) -> None:
        if standing.doubted_s is None:
            return
        lapsed = now_s >= standing.doubted_s + DOUBT_LAPSES_S
        if lapsed or (standing.heard and now_s >= standing.not_before_s):
            standing.doubted_s, standing.is_suspect, standing.losses_in_a_row = None, False, 0

    def _suspect(self, standing: _Standing) -> bool:
        if standing.is_suspect:
            return False
        standing.is_suspect = True
        return True


def _penalty_s(strikes: int) -> float:
    if strikes <= FREE_STRIKES:
        return 0.0
    return float(min(LONGEST_PENALTY_S, FIRST_PENALTY_S * 2.0 ** (strikes - FREE_STRIKES - 1)))
