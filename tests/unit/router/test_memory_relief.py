"""What a flood leaves behind is given back."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading

import pytest

from services.router.service import MemoryRelief

MIB = 1 << 20


class Process:
    """Its size, and what of it would be given back."""

    def __init__(self) -> None:
        self.resident = self.in_use = 70 * MIB
        self.num_given_back = 0
        self.is_relieved = threading.Event()

    def give_back(self) -> None:
        self.resident = self.in_use
        self.num_given_back += 1
        self.is_relieved.set()

    def relief(self) -> MemoryRelief:
        return MemoryRelief(self.give_back, lambda: self.resident)


def test_memory_is_given_back_after_each_flood_and_not_for_less() -> None:
    process = Process()
    relief = process.relief()
    for _ in range(3):
        process.resident = 300 * MIB
        relief.look()
        assert process.resident == 70 * MIB
        process.resident += 20 * MIB
        relief.look()
        assert process.resident == 90 * MIB
        process.resident = process.in_use
    assert process.num_given_back == 3


def test_what_is_in_use_is_not_asked_for_again_and_again() -> None:
    process = Process()
    relief = process.relief()
    process.resident = process.in_use = 500 * MIB
    for _ in range(10):
        relief.look()
    assert process.num_given_back == 1


def test_it_looks_now_and_then_until_it_is_cancelled() -> None:
    async def main() -> None:
        process = Process()
        task = asyncio.create_task(process.relief().run(interval_s=0.001))
        for _ in range(2):
            process.resident = 300 * MIB
            assert await asyncio.to_thread(process.is_relieved.wait, 10)
            process.is_relieved.clear()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(main(), 20))


FLOOD = """
from services.router.service import MemoryRelief, resident_bytes
relief = MemoryRelief()
fresh = resident_bytes()
blocks = [bytes(1024) for _ in range(200_000)]
blocks = blocks[::200]  # what lives on is spread over all pages
flooded = resident_bytes()
relief.look()
print(fresh, flooded, resident_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_pages_between_a_few_live_blocks_go_back_to_the_system() -> None:
    said = subprocess.run([sys.executable, "-c", FLOOD], capture_output=True, check=True, cwd=".").stdout.split()
    fresh, flooded, after = (int(number) for number in said)
    assert flooded - fresh > 150 * MIB, "else the C library has given it back by itself"
    assert after - fresh < 30 * MIB
