"""When a late expert call is asked of a further copy. Pure; times are arguments.

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

import numpy as np

QUANTILE = 0.99
DELAY_FACTOR = 1.5
"""Over the quantile: of 256 replies it is the third largest, which the next slow one may exceed by a little."""
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

    def add(self, layer: int, seconds: float) -> None:
        """A call was answered, or given up after so long."""
        self._all_layers.add(seconds)
        self._layers.setdefault(layer, _Window()).add(seconds)

    def delay_s(self, layer: int) -> float:
        """How long a call of this layer may be unanswered before a copy is asked, in [FLOOR_S, CEILING_S]."""
        return min(CEILING_S, max(FLOOR_S, DELAY_FACTOR * self._quantile_s(layer)))

    def silence_s(self, layer: int) -> float:
        """How long a call of this layer may lie at one node, while others answer, before it is taken to hang."""
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
            self.quantile_s = float(np.quantile(self._samples, QUANTILE))


class HedgeBudget:
    """A token bucket that calls fill: so many hedges a call in the long run, a small burst at once."""

    def __init__(self) -> None:
        self._tokens = HEDGE_BURST

    def earn(self) -> None:
        """A call was sent that is no hedge."""
        self._tokens = min(HEDGE_BURST, self._tokens + HEDGES_PER_CALL)

    def take(self) -> bool:
        """Whether one more hedge may be sent now."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def give_back(self) -> None:
        """The hedge could not be sent."""
        self._tokens = min(HEDGE_BURST, self._tokens + 1.0)
