"""Disks for tests: one that is done at once, and one that hangs when the test wants it."""

from __future__ import annotations

import asyncio
from typing import Any

from services.router.journal.disk_thread import DiskThread, Job


class PromptDisk(DiskThread):
    """Does each job where it is handed in. Jobs that are handed in meanwhile come after it."""

    def submit(self, job: Job) -> None:
        job()


class HangingDisk(DiskThread):
    """Does nothing until `answer`; the test says how long that has been so."""

    busy_s: float = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def answer(self) -> None:
        """Everything that waits, and nothing hangs any more."""
        self.busy_s = 0.0
        while self.jobs:
            self.jobs.pop(0)()

    async def answer_until(self, asking: asyncio.Task[Any]) -> None:
        """Whatever comes until that is done."""
        while not asking.done():
            await asyncio.sleep(0)
            self.answer()
