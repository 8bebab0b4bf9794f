"""A router that writes down each silence of its links: `python -m tests.benchmarks.recording_router FILE`.

A line a silence that an echo has ended: the router's clock, the node, seconds without an echo, and seconds without an
echo or an answer.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from common.node.silence import SilenceWatch
from services.router.__main__ import main
from services.router.mesh import sockets as witnesses


class RecordingWatch(SilenceWatch):
    """Writes what it is told."""

    path = Path()

    def __init__(self) -> None:
        super().__init__()
        self._file = self.path.open("w", buffering=1 << 16)

    def echoed(self, link: str, ping: int) -> float | None:
        unanswered_s = self.silence_s(link)
        silence_s = super().echoed(link, ping)
        if silence_s is not None:
            print(f"{time.monotonic():.4f} {link} {silence_s:.4f} {min(silence_s, unanswered_s):.4f}", file=self._file)
        return silence_s


if __name__ == "__main__":
    RecordingWatch.path = Path(sys.argv[1])
    setattr(witnesses, "SilenceWatch", RecordingWatch)  # noqa: B010
    sys.exit(main())
