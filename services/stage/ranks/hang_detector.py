"""Whether the process of a rank still computes, from what the kernel says of it. Pure; time is an argument.

A rank answers within microseconds to seconds, whatever it computes, and a machine may be busy. So time alone proves
nothing. A process that is stopped does not go on by itself; one that sleeps, while rank 0 waits for it, and uses no
processor time, hangs; one that is runnable waits for a processor, and is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

STOPPED_S = 0.4
"""A debugger or a signal may stop a process for a moment."""
ASLEEP_S = 1.0
"""Rank 0 waits and the other sleeps: it has missed a wake-up, or waits for something that does not come."""
HOPELESS_S = 30.0
"""Whatever it does, no part of a command takes so long."""


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """One look at a process. `state` is the letter of /proc/PID/stat; cpu_s its processor time so far."""

    state: str
    cpu_s: float


class Vigil:
    """Over one rank."""

    def __init__(self) -> None:
        self._stopped_since_s: float | None = None
        self._asleep_since_s: float | None = None
        self._cpu_s = -1.0

    def trouble(self, sample: ProcessSample, waited_s: float, now_s: float) -> str:
        """What is wrong with it, or "". `waited_s`: how long rank 0 has waited for it now, 0 where it does not."""
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
            return "it sleeps while it is waited for"
        if waited_s >= HOPELESS_S:
            return f"it has not come for {waited_s:.0f} s"
        return ""


def parse_stat(text: str, ticks_per_second: int) -> ProcessSample:
    """/proc/PID/stat; the name in parentheses may hold anything."""
    fields = text.rsplit(")", 1)[1].split()
    return ProcessSample(fields[0], (int(fields[11]) + int(fields[12])) / ticks_per_second)
