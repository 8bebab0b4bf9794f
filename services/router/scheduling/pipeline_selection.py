"""Which pipeline takes a request: named policies over what is observed of each, and rest for one that flaps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from common.errors import ConfigurationError
from common.ids import PipelineId
from services.router.scheduling.pipeline_schedule import PipelineSchedule

MAX_OPENINGS = 3
OPENINGS_WINDOW_S = 60.0
COOLING_S = 30.0
"""How long new requests go elsewhere once a pipeline was opened more than MAX_OPENINGS times within the window."""


def _least_in_flight(schedules: Sequence[PipelineSchedule], extra_tokens: Sequence[int]) -> list[float]:
    """Counts requests. What has to be computed there alone counts by the chunk, each of which delays a step of all; but
    once it is computed those behind find it there too, so a long prefix must not draw all to one pipeline."""
    return [
        len(schedule.running) + min(extra / TOKENS_LIKE_A_REQUEST, MAX_REQUESTS_FOR_EXTRA)
        for schedule, extra in zip(schedules, extra_tokens, strict=True)
    ]


def _weighted(schedules: Sequence[PipelineSchedule], extra_tokens: Sequence[int]) -> list[float]:
    """Adds queue (0.4), utilisation (0.3) and p99 (0.3). Queue and p99 are relative to the worst: units cancel."""
    queued = [each.num_queued_tokens + extra for each, extra in zip(schedules, extra_tokens, strict=True)]
    longest_queue = max(1, *queued)
    slowest_s = max(1e-9, *(each.pace.p99_s for each in schedules))
    return [
        0.4 * tokens / longest_queue
        + 0.3 * (each.allocator.num_blocks - each.allocator.num_free) / each.allocator.num_blocks
        + 0.3 * each.pace.p99_s / slowest_s
        for each, tokens in zip(schedules, queued, strict=True)
    ]


TOKENS_LIKE_A_REQUEST = 256
"""A prefill of so many tokens, one chunk, keeps a pipeline as busy as one more request does while it runs."""
MAX_REQUESTS_FOR_EXTRA = 2
"""However much has to be computed there, it counts like so many requests at most."""
Policy = Callable[[Sequence[PipelineSchedule], Sequence[int]], list[float]]
POLICIES: Mapping[str, Policy] = MappingProxyType({"least_in_flight": _least_in_flight, "weighted": _weighted})
"""Name -> a score for each; the lowest takes the request, equal ones take turns. They are given the pipelines, and how
many tokens each would have to compute that the one with the longest prefix has in its cache."""


class PipelineSelection:
    """A policy, whose turn it is among equals, and which pipelines are left alone for a while, since they were opened
    again and again."""

    def __init__(self, policy: str) -> None:
        if policy not in POLICIES:
            raise ConfigurationError(f"pipeline policy {policy!r} is unknown; known are {', '.join(sorted(POLICIES))}")
        self._scores_of = POLICIES[policy]
        self._openings_s: dict[PipelineId, deque[float]] = {}
        self._cool_until_s: dict[PipelineId, float] = {}
        self._last_pick = -1

    def note_opening(self, pipeline: PipelineId, now_s: float) -> None:
        """Notes that it has opened, for the first time or again; one time too many within the window starts the
        cooling."""
        openings_s = self._openings_s.setdefault(pipeline, deque(maxlen=MAX_OPENINGS + 1))
        openings_s.append(now_s)
        if len(openings_s) > MAX_OPENINGS and now_s - openings_s[0] <= OPENINGS_WINDOW_S:
            self._cool_until_s[pipeline] = now_s + COOLING_S

    def usable(self, pipelines: Sequence[PipelineId], now_s: float) -> list[PipelineId]:
        """Returns those that are not cooling off; if all are, all of them: a lone pipeline must be tried again."""
        steady = [pipeline for pipeline in pipelines if now_s >= self._cool_until_s.get(pipeline, now_s)]
        return steady or list(pipelines)

    def choose(self, schedules: Sequence[PipelineSchedule], num_found: Sequence[int] = ()) -> PipelineId | None:
        """Returns the pipeline that takes the next request; None if every one is at its cap. `num_found`: by pipeline,
        how many of the request's tokens are cached there; empty: none anywhere."""
        found = {each.pipeline: tokens for each, tokens in zip(schedules, num_found, strict=False)}
        candidates = [schedule for schedule in schedules if len(schedule.running) < schedule.max_running]
        if not candidates:
            return None
        most = max((found.get(each.pipeline, 0) for each in candidates), default=0)
        scores = self._scores_of(candidates, [most - found.get(each.pipeline, 0) for each in candidates])
        best = min(scores)
        equals = sorted(each.pipeline for each, score in zip(candidates, scores, strict=True) if score == best)
        after_last = [pipeline for pipeline in equals if pipeline > self._last_pick]
        pick = (after_last or equals)[0]
        self._last_pick = pick
        return pick
