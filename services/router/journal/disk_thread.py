"""One thread for everything that a running router does in its state folder.

A disk may hang: a network file system without its server, a device that has stopped to answer. Whoever waits for it
then waits without end, so neither the event loop nor the mesh thread touches the folder; they hand jobs in here, and
look at how long the current one has taken.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

Job = Callable[[], None]


class Disk(Protocol):
    """What the journal and the housekeeping ask of it."""

    @property
    def busy_s(self) -> float:
        """Says how long the job that runs now has taken; 0.0 while none does."""
        ...

    def submit(self, job: Job) -> None:
        """Run it after those that were handed in before. What it raises ends the router: see `DiskThread.check`."""
        ...

    def close(self, within_s: float) -> bool:
        """Waits until everything that was handed in is done. Returns False if it is not in that time, and goes on
        alone."""
        ...


class DiskThread:
    """See the module. It is a daemon thread: a process that ends does not wait for a disk that hangs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._begun_s: float | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="disk", daemon=True)

    def start(self) -> None:
        """Call it once."""
        self._thread.start()

    @property
    def busy_s(self) -> float:
        """See Disk."""
        begun_s = self._begun_s
        return 0.0 if begun_s is None else max(0.0, self._clock() - begun_s)

    def submit(self, job: Job) -> None:
        """See Disk."""
        self._jobs.put(job)

    def check(self) -> None:
        """Raises what the first job that failed has raised."""
        if self._failure is not None:
            raise self._failure

    def close(self, within_s: float) -> bool:
        """See Disk."""
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


def finish_within(work: Job, within_s: float) -> bool:
    """Does it in a thread that nobody waits for any longer than that. Returns False if it is not done by then."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(within_s)
    return not thread.is_alive()
