"""Memory that a flood of requests has left behind goes back to the system.

What is freed stays with the C library, in pages that are empty but for a few live blocks, and in pools that each thread
which ever tokenized has of its own: after 64 prompts of 200 kB a router of 71 MB kept 350 MB, of which nothing was in
use. glibc gives such pages back when it is asked (`malloc_trim`), and only then. That takes 30 ms for 250 MB, in a
thread, and keeps nobody else from memory for longer than the usual.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

INTERVAL_S = 5.0
GROWTH_BYTES = 32 << 20
"""Since memory was given back last: less is not worth the while."""


def resident_bytes() -> int:
    """Of this process; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def give_back() -> None:
    """Free pages go to the system, where the C library can do that."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library
        return
    trim.argtypes = [ctypes.c_size_t]
    trim(0)


class MemoryRelief:
    """Gives memory back each time that the process has grown by so much."""

    def __init__(
        self,
        give_back: Callable[[], None] = give_back,
        resident_bytes: Callable[[], int] = resident_bytes,
        growth_bytes: int = GROWTH_BYTES,
    ) -> None:
        self._give_back = give_back
        self._resident_bytes = resident_bytes
        self._growth_bytes = growth_bytes
        self._least_bytes = resident_bytes()
        """What it was when it was last given back, or less."""

    def look(self) -> None:
        """In any thread but one at a time: it may take some ten milliseconds."""
        resident = self._resident_bytes()
        if resident - self._least_bytes > self._growth_bytes:
            self._give_back()
            self._least_bytes = self._resident_bytes()
        else:
            self._least_bytes = min(self._least_bytes, resident)

    async def run(self, interval_s: float = INTERVAL_S) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            await asyncio.to_thread(self.look)
