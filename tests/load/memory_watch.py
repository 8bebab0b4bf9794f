"""Memory of several processes over time, against how far the work has come."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from tests.support.processes.process_table import process_size


@dataclass(frozen=True)
class MemorySample:
    """Bytes by process name, after so many requests."""

    num_done: int
    resident_bytes: dict[str, int]


class MemoryWatch:
    """Samples in a thread from entering to leaving."""

    def __init__(
        self, processes: Sequence[tuple[str, int]], num_done: Callable[[], int], interval_s: float = 0.1
    ) -> None:
        self._processes = list(processes)
        self._num_done = num_done
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.samples: list[MemorySample] = []

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            sizes = {name: process_size(pid).resident_bytes for name, pid in self._processes}
            self.samples.append(MemorySample(self._num_done(), sizes))
            if self._stop.wait(self._interval_s):
                return

    def growth_bytes(self, first: tuple[int, int], second: tuple[int, int]) -> dict[str, int]:
        """By process: median over the second span of requests [from, to) less the median over the first."""
        return {
            name: int(self._median_bytes(name, second) - self._median_bytes(name, first)) for name, _ in self._processes
        }

    def _median_bytes(self, name: str, span: tuple[int, int]) -> float:
        inside = [s.resident_bytes[name] for s in self.samples if span[0] <= s.num_done < span[1]]
        assert inside, f"no sample of {name} between {span[0]} and {span[1]} requests"
        return statistics.median(inside)
