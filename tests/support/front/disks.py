"""Disks for tests: one that is done at once, and one that hangs when the test wants it."""

from __future__ import annotations

import asyncio
from typing import Any

from services.router.journal.disk_thread import Job


class PromptDisk:
    """Does each job where it is handed in. Jobs that are handed in meanwhile come after it."""

    busy_s = 0.0

    def submit(self, job: Job) -> None:
        job()

    def check(self) -> None:
        """Nothing fails here but where it is handed in."""


class HangingDisk:
    """Does nothing until `answer`; the test says how long that has been so."""

    def __init__(self) -> None:
        self.busy_s = 0.0
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

    def check(self) -> None:
        """Nothing fails here but in `answer`."""
