"""The processes of ranks other than the first: started, watched, killed, and started again. In a thread of rank 0.

It is no rank: it never waits for one. A rank that has to go is killed, since a collective cannot be given up; then its
connections close, and whoever waits in one hears of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from common.child_process import ChildProcess
from common.errors import RankLostError
from common.fork_server import ImportsUnderWayError
from services.stage.ranks.vigil import ProcessSample, Vigil, parse_stat

LOOK_S = 0.05
STEADY_S = 10.0
"""A process that ran so long starts again at once."""
MAX_DELAY_S = 10.0


@dataclass(slots=True)
class Seat:
    """One process, and its next after it."""

    process: ChildProcess | None = None
    started_s: float = 0.0
    start_at_s: float = 0.0
    failures_in_a_row: int = 0
    vigil: Vigil = field(default_factory=Vigil)
    waited_s: float = 0.0
    """How long rank 0 has waited for it."""
    trouble: str = ""


class RankStaff:
    """Seats 1..n. `check` is what rank 0 calls while it waits; everything else it may call from the same thread."""

    def __init__(
        self,
        num_seats: int,
        spawn: Callable[[int], ChildProcess],
        log: structlog.stdlib.BoundLogger,
        clock: Callable[[], float] = time.monotonic,
        look: Callable[[int], ProcessSample | None] | None = None,
    ) -> None:
        """`spawn` starts the process of a seat; `look` at one by its process id, None where it is gone."""
        self._spawn = spawn
        self._log = log
        self._clock = clock
        self._look = look or read_sample
        self._lock = threading.Lock()
        self._seats = {seat: Seat() for seat in range(1, num_seats + 1)}
        self._ending = threading.Event()
        # Children die with the thread that has started them: all are started by this one.
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)

    def start(self) -> None:
        """Start them all, and watch."""
        self._thread.start()

    def process_of(self, seat: int) -> int:
        """Process id; 0 while there is none."""
        with self._lock:
            process = self._seats[seat].process
            return process.pid if process is not None and process.poll() is None else 0

    def check(self, seat: int, waited_s: float) -> None:
        """Raises RankLostError if the process of a seat is gone. `waited_s`: that rank 0 has waited for it."""
        with self._lock:
            one = self._seats[seat]
            one.waited_s = waited_s
            if one.process is None or one.process.poll() is not None:
                raise RankLostError(f"the rank of seat {seat} is gone: {one.trouble or 'its process ended'}")

    def kill(self, seat: int, why: str) -> None:
        """SIGKILL, and another process after a moment."""
        with self._lock:
            self._kill(seat, why)

    def end(self) -> None:
        """Kill them all, and start no more."""
        self._ending.set()
        with self._lock:
            for seat in self._seats:
                self._kill(seat, "the stage ends")

    def _kill(self, seat: int, why: str) -> None:
        one = self._seats[seat]
        if one.process is not None and one.process.poll() is None:
            one.trouble = why
            one.process.kill()
            one.process.wait()

    def _run(self) -> None:
        while not self._ending.wait(LOOK_S):
            with self._lock:
                for seat, one in self._seats.items():
                    if not self._ending.is_set():
                        self._attend(seat, one)

    def _attend(self, seat: int, one: Seat) -> None:
        now_s = self._clock()
        process = one.process
        if process is None:
            if now_s >= one.start_at_s:
                self._start(seat, one, now_s)
            return
        status = process.poll()
        if status is not None:
            self._bury(seat, one, status, now_s)
            return
        sample = self._look(process.pid)
        trouble = one.vigil.trouble(sample, one.waited_s, now_s) if sample is not None else ""
        one.waited_s = 0.0  # until rank 0 says again that it waits
        if trouble:
            self._log.warning("rank_killed", seat=seat, reason=trouble)
            self._kill(seat, trouble)

    def _start(self, seat: int, one: Seat, now_s: float) -> None:
        try:
            one.process = self._spawn(seat)
        except ImportsUnderWayError:
            return
        except (OSError, subprocess.SubprocessError) as error:
            one.start_at_s = now_s + 1.0
            self._log.error("rank_not_started", seat=seat, reason=str(error))
            return
        one.started_s, one.vigil, one.trouble = now_s, Vigil(), ""

    def _bury(self, seat: int, one: Seat, status: int, now_s: float) -> None:
        lived_s = now_s - one.started_s
        one.failures_in_a_row = 0 if lived_s >= STEADY_S else one.failures_in_a_row + 1
        delay_s = min(MAX_DELAY_S, 0.5 * 2 ** (one.failures_in_a_row - 1)) if one.failures_in_a_row > 1 else 0.0
        one.process, one.start_at_s = None, now_s + delay_s
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        self._log.warning("rank_ended", seat=seat, how=name, reason=one.trouble)


def read_sample(process: int) -> ProcessSample | None:
    """A look at a process of this machine; None where it is gone, or where the system does not tell."""
    with contextlib.suppress(OSError):
        return parse_stat((Path("/proc") / str(process) / "stat").read_text(), os.sysconf("SC_CLK_TCK"))
    return None
