"""A process that starts gives way to those that serve: its seconds of a core would come out of their steps.

Priorities would be simpler and do not help: containers are control groups of equal weight, whatever the nice value of
what runs in them. So the process rests after each few milliseconds of its own work, for as long as nobody else would
find an idle processor. Where nothing is served, since it is this very process that is missing, nothing else runs.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

RUN_S = 0.005
REST_S = 0.003
"""A start takes half as long again, and another process's steps a twentieth longer instead of three times as long
(docs/performance.md, log)."""
MOST_REST_S = 10.0
"""A machine that is always full must not keep a process from starting."""


def num_runnable(load_average: Path = Path("/proc/loadavg")) -> int:
    """Threads of the whole machine that run or want to, also seen from a container; 0 where nobody says so."""
    try:
        return int(load_average.read_text().split()[3].split("/")[0])
    except (OSError, ValueError, IndexError):
        return 0


@contextmanager
def giving_way(
    count: Callable[[], int] = num_runnable,
    num_processors: int | None = None,
    rest: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """Around what starts, in the main thread. `count`: of threads that want to run, this one included."""
    processors = num_processors or len(os.sched_getaffinity(0))
    rests_left = round(MOST_REST_S / REST_S)

    def give_way(number: int, frame: FrameType | None) -> None:
        nonlocal rests_left
        if rests_left and count() >= processors:
            rests_left -= 1
            rest(REST_S)

    before = signal.signal(signal.SIGPROF, give_way)
    signal.siginterrupt(signal.SIGPROF, False)
    signal.setitimer(signal.ITIMER_PROF, RUN_S, RUN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
