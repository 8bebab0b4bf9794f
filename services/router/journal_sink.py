"""Journal first, then send: between the mesh thread and the front."""

from __future__ import annotations

import time
from collections.abc import Callable

from common.errors import MoemeshError
from common.ids import RequestId
from services.router.engine import GeneratedToken
from services.router.journal import Journal
from services.router.step_flow import Sink

TERM_CHECK_INTERVAL_S = 1.0


class JournalFirst:
    """A sink that hands on what the journal has taken. Raises FencedError, and hands on nothing then."""

    def __init__(self, journal: Journal, sink: Sink) -> None:
        self._journal = journal
        self._sink = sink

    def __call__(self, outcomes: list[tuple[RequestId, GeneratedToken | MoemeshError]]) -> None:
        """In the mesh thread."""
        self._journal.append(outcomes)
        self._sink(outcomes)


class Housekeeping:
    """What the mesh thread does between steps. Cheap enough for every turn; raises FencedError."""

    def __init__(
        self,
        check_term: Callable[[], None],
        journal: Journal | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._check_term = check_term
        self._journal = journal
        self._clock = clock
        self._next_check_s = 0.0

    def __call__(self) -> None:
        """In the mesh thread."""
        now_s = self._clock()
        if now_s >= self._next_check_s:
            self._next_check_s = now_s + TERM_CHECK_INTERVAL_S
            self._check_term()
        if self._journal is not None:
            self._journal.tick()
