"""How fast a pipeline and each of its requests have been going, and for how long their silence is explained by that.

Pure; times are arguments. Only answers are measured. A step that failed, by its deadline or otherwise, says how long
the router waited and not how long work takes: were it counted, a few hangs would pass the next one off as the usual.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

from services.router.control.readiness import Awaited

UNANSWERED_S = 1.5
"""Silence that is never remarkable: a busy machine is late by this much."""
SLOW_FACTOR = 4.0
"""Multiplies the usual, where things are slow."""
LATEST_STEPS = 128
"""Steps of any size, for their 99th percentile."""
RECENT_STEPS = 16
"""Steps of one size; their median is not moved by a few stalls."""
RECENT_GAPS = 8


class PipelinePace:
    """When steps of one pipeline were answered, and how long those with work took."""

    def __init__(self) -> None:
        self.has_answered = False
        """Says whether a step has come back since it opened: its links stand, from the router through all stages."""
        self.last_work_s = 0.0
        """When a step that was not a canary was last answered; at first, when the pipeline opened."""
        self.last_success_s = 0.0
        """When work was last answered, if only blocks that came back, in whatever generation; steps that failed were
        not. Who lands them notes it here."""
        self._last_answer_s = 0.0
        self._latest_s: deque[float] = deque(maxlen=LATEST_STEPS)
        self._buckets: dict[int, deque[float]] = {}
        """Seconds by size: bucket b has steps of [2^(b-1), 2^b) tokens."""

    def opened(self, now_s: float) -> None:
        """Notes that a generation begins, with links of its own."""
        self.has_answered = False
        self._last_answer_s = self.last_work_s = now_s

    def answered(self, now_s: float, *, has_failed: bool, is_canary: bool) -> None:
        """Notes that a step has come back, or that it is known to have failed."""
        self.has_answered |= not has_failed
        self._last_answer_s = now_s
        if not is_canary:
            self.last_work_s = now_s

    def measured(self, num_tokens: int, planned_s: float, now_s: float) -> None:
        """Notes how long a step with work took."""
        self._latest_s.append(now_s - planned_s)
        self._buckets.setdefault(num_tokens.bit_length(), deque(maxlen=RECENT_STEPS)).append(now_s - planned_s)

    def is_quiet(self, now_s: float, interval_s: float) -> bool:
        """Returns whether nothing was answered for that long, or since it opened."""
        return not self.has_answered or now_s - self._last_answer_s >= interval_s

    @property
    def p99_s(self) -> float:
        """Returns what nearly all of the latest steps stayed below; 0.0 while there are none."""
        ascending_s = sorted(self._latest_s)
        return ascending_s[int(0.99 * (len(ascending_s) - 1))] if ascending_s else 0.0

    def usual_s(self, num_tokens: int) -> float | None:
        """Returns the median of steps of this size; None: nothing has been measured.

        Of a size that has not been seen it is at most that of a smaller one, as many times as it is larger: steps share
        the reading of the weights. A larger one bounds it without that.
        """
        size = num_tokens.bit_length()
        smaller = max((bucket for bucket in self._buckets if bucket <= size), default=None)
        if smaller is not None:
            return statistics.median_low(self._buckets[smaller]) * (1 << (size - smaller))
        larger = min(self._buckets, default=None)
        return None if larger is None else statistics.median_low(self._buckets[larger])


@dataclass(slots=True)
class RequestPace:
    """When one request last got further, and how long it usually takes to."""

    progressed_s: float
    """Its last token or part of its prompt; at first, when it began to run."""
    due_since_s: float | None = None
    """When it began to wait for an answer; None: it waits for its turn. Steps that fail and are sent again do not
    begin anew: it still waits for the same thing."""
    gaps_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_GAPS))
    is_disturbed: bool = False
    """One of its steps has failed or become void since it last got further, so this gap is not a measure."""

    def begin(self, now_s: float, *, is_retry: bool) -> None:
        """Notes that it runs. What is done again after a failure has been awaited since before that."""
        if not is_retry:
            self.progressed_s, self.due_since_s = now_s, None
        self.is_disturbed = True

    def planned(self, now_s: float) -> None:
        """Notes that it is part of a step."""
        if self.due_since_s is None:
            self.due_since_s = now_s

    def progressed(self, now_s: float, *, is_measure: bool) -> None:
        """Notes that it got further. `is_measure`: by a token after a token, which says how fast tokens come."""
        if is_measure and not self.is_disturbed:
            self.gaps_s.append(now_s - self.progressed_s)
        self.progressed_s, self.due_since_s, self.is_disturbed = now_s, None, False

    @property
    def usual_s(self) -> float:
        """Returns the median of recent gaps; 0: none."""
        return statistics.median_low(self.gaps_s) if self.gaps_s else 0.0


def awaited(since_s: float, *usual_s: float | None) -> Awaited:
    """Describes what has not come since then, where the slowest of these explains a while of it."""
    known_s = [seconds for seconds in usual_s if seconds]
    return Awaited(since_s, max(UNANSWERED_S, SLOW_FACTOR * max(known_s, default=0.0)), bool(known_s))


def most_overdue(waits: list[Awaited]) -> Awaited | None:
    """Returns whose explanation ends first; None of none."""
    return min(waits, key=lambda wait: wait.since_s + wait.explained_s, default=None)
