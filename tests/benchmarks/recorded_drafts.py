"""A router whose drafts are recorded answers, right at a rate: `python -m tests.benchmarks.recorded_drafts FILE`.

FILE is JSON, a `Recording` as a dict. Without answers the router's own source drafts. In either case how long each
step took that had its pipeline to itself is written into `steps`, a line a step: manner, rows, seconds.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from common.ids import RequestId
from services.router import service
from services.router.__main__ import main
from services.router.scheduling.drafts.source import Guess
from services.router.scheduling.drafts.step_times import Manner, StepTimes


@dataclass(frozen=True)
class Recording:
    """What a router drafts, and where it writes."""

    answers: list[list[list[int]]]
    """(prompt, answer); no prompt twice."""
    rate: float
    steps: str
    """The path of the file that is written."""


class RecordedAnswers:
    """A `DraftSource`: knows how each prompt is answered, and errs at places that are drawn anew for each request."""

    def __init__(self, recording: Recording) -> None:
        self._answers = {tuple(prompt): answer for prompt, answer in recording.answers}
        self._rate = recording.rate

    def propose(self, request: RequestId, prompt: Sequence[int], generated: Sequence[int], most: int) -> Guess:
        start = len(generated)
        answer = self._answers.get(tuple(prompt), [])[start : start + most]
        return Guess(tuple(token + self._errs(request, start + place) for place, token in enumerate(answer)))

    def forget(self, request: RequestId) -> None:
        """There is nothing to forget."""

    def _errs(self, request: RequestId, place: int) -> bool:
        return zlib.crc32(f"{request} {place}".encode()) / 2**32 >= self._rate


def record_steps(file: TextIO) -> None:
    """Lets all times that a router notes be written there, too."""
    note = StepTimes.note

    def noting(times: StepTimes, manner: Manner, num_rows: int, seconds: float) -> None:
        print(manner.value, num_rows, f"{seconds:.6f}", file=file)
        note(times, manner, num_rows, seconds)

    setattr(StepTimes, "note", noting)  # noqa: B010


def read_steps(path: Path) -> dict[tuple[Manner, int], list[float]]:
    """Returns seconds by manner and rows."""
    found: dict[tuple[Manner, int], list[float]] = {}
    for line in path.read_text().splitlines():
        manner, num_rows, seconds = line.split()
        found.setdefault((Manner(manner), int(num_rows)), []).append(float(seconds))
    return found


if __name__ == "__main__":
    read: Any = json.loads(Path(sys.argv[1]).read_text())
    recording = Recording(**read)
    if recording.answers:
        setattr(service, "draft_source", lambda: RecordedAnswers(recording))  # noqa: B010
    record_steps(Path(recording.steps).open("w", buffering=1))
    sys.exit(main())
