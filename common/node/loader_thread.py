"""In this thread a node reads its checkpoint. A disk that hangs there holds up neither the node's loop nor its end.

What hangs on a disk gets no CPU time; what reads or packs weights does, however slow the disk is. So the thread's CPU
clock tells a load that is stuck from one that takes long, without the load's doing anything for it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from common.errors import DeadlineError

STUCK_S = 30.0
"""How long a load may get no CPU time: half of a request's default wait for a pipeline, so a spare can take over."""
MAX_LOOK_S = 1.0
"""What one look at the clock may add to the time above: a process that stood still as a whole has not seen a hang."""

Result = TypeVar("Result")


class LoaderThread:
    """Does one thing after another. The owner calls `check` in each round of its loop."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        cpu_seconds: Callable[[threading.Thread], float | None] | None = None,
    ) -> None:
        """`cpu_seconds` of a thread that runs; None where the system does not tell: then nothing is ever stuck."""
        self._clock = clock
        self._cpu_seconds = cpu_seconds or thread_cpu_seconds
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._in_hand: deque[Future[Any]] = deque()
        self._thread: threading.Thread | None = None
        self._seen_cpu_s: float | None = None
        self._looked_s = clock()
        self._stuck_s = 0.0

    def submit(self, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Does this after what was submitted before."""
        future: Future[Result] = Future()
        self._in_hand.append(future)
        self._tasks.put(partial(_fulfil, future, partial(work, *arguments)))
        if self._thread is None:
            # A daemon: the interpreter does not wait for it when the process ends.
            self._thread = threading.Thread(target=self._run, name="load", daemon=True)
            self._thread.start()
        return future

    def check(self) -> None:
        """Raises DeadlineError if what is in hand is stuck: another process must do this one's work."""
        while self._in_hand and self._in_hand[0].done():
            self._in_hand.popleft()
        now_s = self._clock()
        look_s, self._looked_s = min(now_s - self._looked_s, MAX_LOOK_S), now_s
        cpu_s = self._cpu_seconds(self._thread) if self._in_hand and self._thread is not None else None
        if cpu_s is None or cpu_s != self._seen_cpu_s:
            self._seen_cpu_s, self._stuck_s = cpu_s, 0.0
            return
        self._stuck_s += look_s
        if self._stuck_s >= STUCK_S:
            raise DeadlineError(
                f"loading has been stuck for {STUCK_S:.0f} s: the disk of the checkpoint hangs; this process exits"
            )

    def give_up(self) -> None:
        """Do not begin what has not begun, and do not wait for what has."""
        for future in self._in_hand:
            future.cancel()

    def close(self) -> None:
        """Give up, and end the thread."""
        self.give_up()
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # with its result, which may be gigabytes


def _fulfil(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:  # raised where the result is asked for
        future.set_exception(error)
    else:
        future.set_result(result)


def thread_cpu_seconds(thread: threading.Thread) -> float | None:
    """Returns the CPU time of a thread that runs, since it began; None where the system does not tell it."""
    if sys.platform != "linux" or thread.ident is None:
        return None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
