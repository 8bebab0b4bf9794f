"""The processes of ranks other than the first: started, watched, killed, and started again. In a thread of rank 0.

It is not a rank and never waits for one. A rank that has to go is killed, since a collective cannot be given up; then
its connections close, and a rank that waits in one hears of it.
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

from common.errors import RankLostError
from common.processes.fork_server import ChildProcess, ImportsUnderWayError

LOOK_S = 0.05
STEADY_S = 10.0
"""A process that ran this long is restarted at once."""
MAX_DELAY_S = 10.0
KILLED_S = 2.0
"""How long to wait for a killed process to end."""
STOPPED_S = 0.4
"""A debugger or a signal may stop a process for a moment."""
ASLEEP_S = 1.0
"""Rank 0 waits and the other sleeps: it has missed a wake-up, or waits for something that does not come."""
HOPELESS_S = 30.0
"""Whatever it does, no part of a command takes this long."""


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """One look at a process. `state` is the letter of /proc/PID/stat; cpu_s its processor time so far."""

    state: str
    cpu_s: float


class HangDetector:
    """Whether the process of one rank still computes, from what the kernel says of it. Time is an argument.

    A rank answers within microseconds to seconds, whatever it computes, and a machine may be busy. So time alone proves
    nothing. A process that is stopped does not go on by itself; one that sleeps, while rank 0 waits for it, and uses no
    processor time, hangs; one that is runnable waits for a processor, and is left alone.
    """

    def __init__(self) -> None:
        self._stopped_since_s: float | None = None
        self._asleep_since_s: float | None = None
        self._cpu_s = -1.0

    def trouble(self, sample: ProcessSample, waited_s: float, now_s: float) -> str:
        """Returns what is wrong with it, or "". `waited_s`: how long rank 0 has waited for it now, 0 where it does
        not."""
        if sample.state in "Tt":
            self._stopped_since_s = now_s if self._stopped_since_s is None else self._stopped_since_s
        else:
            self._stopped_since_s = None
        is_asleep = waited_s > 0 and sample.state == "S" and sample.cpu_s == self._cpu_s
        self._cpu_s = sample.cpu_s
        if not is_asleep:
            self._asleep_since_s = None
        elif self._asleep_since_s is None:
            self._asleep_since_s = now_s
        if self._stopped_since_s is not None and now_s - self._stopped_since_s >= STOPPED_S:
            return "it is stopped"
        if self._asleep_since_s is not None and now_s - self._asleep_since_s >= ASLEEP_S:
            return "it sleeps while rank 0 waits for it"
        if waited_s >= HOPELESS_S:
            return f"it has not come for {waited_s:.0f} s"
        return ""


def parse_stat(text: str, ticks_per_second: int) -> ProcessSample:
    """Reads /proc/PID/stat; the name in parentheses may hold anything."""
    fields = text.rsplit(")", 1)[1].split()
    return ProcessSample(fields[0], (int(fields[11]) + int(fields[12])) / ticks_per_second)


@dataclass(slots=True)
class Seat:
    """One process, and its next after it."""

    process: ChildProcess | None = None
    started_s: float = 0.0
    start_at_s: float = 0.0
    failures_in_a_row: int = 0
    detector: HangDetector = field(default_factory=HangDetector)
    waited_s: float = 0.0
    """How long rank 0 has waited for it."""
    trouble: str = ""
    is_killed: bool = False

    @property
    def is_there(self) -> bool:
        """Returns whether its process is of use."""
        return self.process is not None and not self.is_killed and self.process.poll() is None


class RankSupervisor:
    """Seats 1..n. `check` is what rank 0 calls while it waits; everything else it may call from the same thread."""

    def __init__(
        self,
        num_seats: int,
        spawn: Callable[[int], ChildProcess],
        log: structlog.stdlib.BoundLogger,
        clock: Callable[[], float] = time.monotonic,
        look: Callable[[int], ProcessSample | None] | None = None,
    ) -> None:
        """`spawn` starts the process of a seat; `look` looks at one by its process id, and returns None where it is
        gone."""
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
        """Starts them all, and watches them."""
        self._thread.start()

    def process_of(self, seat: int) -> int:
        """Returns the process id; 0 while there is none."""
        with self._lock:
            one = self._seats[seat]
            return one.process.pid if one.is_there and one.process is not None else 0

    def check(self, seat: int, process: int, waited_s: float) -> None:
        """Raises RankLostError if this process is not in the seat any more, though another one may be.

        `waited_s`: that rank 0 has waited for it.
        """
        with self._lock:
            one = self._seats[seat]
            one.waited_s = waited_s
            if not one.is_there or one.process is None:
                raise RankLostError(f"the rank of seat {seat} is gone: {one.trouble or 'its process ended'}")
            if one.process.pid != process:
                raise RankLostError(f"the rank of seat {seat} was lost, and another process is in its place")

    def kill(self, seat: int, why: str) -> None:
        """Kills a process by SIGKILL; there is another one after a moment. Returns when it has ended, or cannot do
        anything any more."""
        with self._lock:
            victim = self._kill(seat, why)
        _wait_for(victim)

    def end(self) -> None:
        """Kills them all, and starts no more."""
        self._ending.set()
        with self._lock:
            for seat in self._seats:
                self._kill(seat, "the stage ends")
            victims = [one.process for one in self._seats.values()]
        for victim in victims:
            _wait_for(victim)

    def _kill(self, seat: int, why: str) -> ChildProcess | None:
        one = self._seats[seat]
        if not one.is_there or one.process is None:
            return None
        one.trouble, one.is_killed = why, True
        one.process.kill()
        return one.process

    def _run(self) -> None:
        while not self._ending.wait(LOOK_S):
            for seat in self._seats:
                try:
                    self._attend(seat)
                except Exception as error:
                    # With this thread the kernel would end all ranks.
                    self._log.error("rank_watch_failed", seat=seat, reason=repr(error))

    def _attend(self, seat: int) -> None:
        now_s = self._clock()
        one = self._seats[seat]
        if one.process is None:  # nothing else changes that
            if now_s >= one.start_at_s and not self._ending.is_set():
                self._start(seat, one, now_s)
            return
        with self._lock:
            self._look_after(seat, one, one.process, now_s)

    def _look_after(self, seat: int, one: Seat, process: ChildProcess, now_s: float) -> None:
        status = process.poll()
        if status is not None:
            self._bury(seat, one, status, now_s)
            return
        if one.is_killed:
            return
        sample = self._look(process.pid)
        trouble = one.detector.trouble(sample, one.waited_s, now_s) if sample is not None else ""
        one.waited_s = 0.0  # until rank 0 says again that it waits
        if trouble:
            self._log.warning("rank_killed", seat=seat, reason=trouble)
            self._kill(seat, trouble)

    def _start(self, seat: int, one: Seat, now_s: float) -> None:
        try:
            process = self._spawn(seat)
        except ImportsUnderWayError:
            return
        except (OSError, subprocess.SubprocessError) as error:
            one.start_at_s = now_s + 1.0
            self._log.error("rank_not_started", seat=seat, reason=str(error))
            return
        with self._lock:
            one.process, one.is_killed, one.waited_s = process, False, 0.0
            one.started_s, one.detector, one.trouble = now_s, HangDetector(), ""
            victim = self._kill(seat, "the stage ends") if self._ending.is_set() else None
        _wait_for(victim)

    def _bury(self, seat: int, one: Seat, status: int, now_s: float) -> None:
        lived_s = now_s - one.started_s
        one.failures_in_a_row = 0 if lived_s >= STEADY_S else one.failures_in_a_row + 1
        delay_s = min(MAX_DELAY_S, 0.5 * 2 ** (one.failures_in_a_row - 1)) if one.failures_in_a_row > 1 else 0.0
        one.process, one.start_at_s = None, now_s + delay_s
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        self._log.warning("rank_ended", seat=seat, how=name, reason=one.trouble)


def _wait_for(victim: ChildProcess | None) -> None:
    """Waits for the end of one that was killed. One that hangs in the kernel may not go away; it does nothing more
    there either."""
    if victim is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            victim.wait(KILLED_S)


def read_sample(process: int) -> ProcessSample | None:
    """Looks at a process of this machine; returns None where it is gone, or where the system does not tell."""
    with contextlib.suppress(OSError):
        return parse_stat((Path("/proc") / str(process) / "stat").read_text(), os.sysconf("SC_CLK_TCK"))
    return None
