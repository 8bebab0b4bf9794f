"""One thread for everything that a running router does in its state folder.

A disk may hang: a network file system without its server, a device that has stopped to answer. A thread that waits for
it then waits without end, so neither the event loop nor the mesh thread touches the folder; they hand jobs in here, and
look at how long the current one has taken.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

Job = Callable[[], None]
LOOK_INTERVAL_S = 0.5


class DiskThread:
    """See the module. It is a daemon thread: a process that ends does not wait for a disk that hangs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._begun_s: float | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="disk", daemon=True)

    def start(self) -> None:
        """Starts the thread; to be called once."""
        self._thread.start()

    @property
    def busy_s(self) -> float:
        """Says how long the job that runs now has taken; 0.0 while none does."""
        begun_s = self._begun_s
        return 0.0 if begun_s is None else max(0.0, self._clock() - begun_s)

    def submit(self, job: Job) -> None:
        """Runs it after those that were handed in before. What it raises ends the router: see `check`."""
        self._jobs.put(job)

    def check(self) -> None:
        """Raises what the first job that failed has raised."""
        if self._failure is not None:
            raise self._failure

    def close(self, within_s: float) -> bool:
        """Waits until everything that was handed in is done. Returns False if it is not in that time, and goes on
        alone."""
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(within_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._begun_s = self._clock()
            try:
                job()
            except BaseException as error:  # raised again where the router looks for it
                self._failure = self._failure or error
            self._begun_s = None


class Housekeeping:
    """Does what the mesh thread sees to between steps. It is cheap enough for every turn, and waits for no disk."""

    def __init__(
        self,
        disk: DiskThread,
        look_after_folder: Callable[[], None],
        look_after_own: Callable[[], None] = lambda: None,
        tick_journal: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`look_after_folder` is done in `disk`, now and then; `look_after_own` after that in the mesh thread, for the
        files of what belongs to it; `tick_journal` is done in every turn."""
        self._disk = disk
        self._look_after_folder = look_after_folder
        self._look_after_own = look_after_own
        self._tick_journal = tick_journal
        self._clock = clock
        self._next_look_s = 0.0
        self._is_looking = False
        self._has_looked = False

    def __call__(self) -> None:
        """Runs in the mesh thread. Raises FencedError."""
        self._disk.check()
        now_s = self._clock()
        if now_s >= self._next_look_s and not self._is_looking:
            self._next_look_s = now_s + LOOK_INTERVAL_S
            self._is_looking = True
            self._disk.submit(self._look)
        if self._has_looked:
            self._has_looked = False
            self._look_after_own()
        self._tick_journal()

    def _look(self) -> None:
        self._look_after_folder()
        self._has_looked = True
        self._is_looking = False


def finish_within(work: Job, within_s: float) -> bool:
    """Does the work in a thread, and waits for it no longer than that. Returns False if it is not done by then."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(within_s)
    return not thread.is_alive()
