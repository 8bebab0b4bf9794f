"""Journal first, then send: between the mesh thread and the front. And what is done between steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from common.errors import MoemeshError
from common.ids import RequestId
from services.router.engine import Token
from services.router.journal.disk_thread import Disk
from services.router.journal.journal import Journal
from services.router.mesh.steps import Sink

LOOK_INTERVAL_S = 0.5


class JournalFirst:
    """Hands on what the journal has written. Raises FencedError, and hands on nothing then."""

    def __init__(self, journal: Journal, sink: Sink) -> None:
        self._journal = journal
        self._sink = sink

    def __call__(self, outcomes: list[tuple[RequestId, Token | MoemeshError]]) -> None:
        """Runs in the mesh thread; outcomes are handed on in the disk's, as a rule."""
        self._journal.append(outcomes, partial(self._sink, outcomes))


class Housekeeping:
    """Does what the mesh thread sees to between steps. It is cheap enough for every turn, and waits for no disk."""

    def __init__(
        self,
        look_after_folder: Callable[[], None],
        disk: Disk,
        check_disk: Callable[[], None],
        journal: Journal | None,
        look_after_sockets: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`look_after_folder` is done in `disk`, now and then; `check_disk` raises what failed there. Sockets belong to
        the mesh thread, so it looks after their files itself, as soon as the disk has answered."""
        self._look_after_folder = look_after_folder
        self._disk = disk
        self._check_disk = check_disk
        self._journal = journal
        self._look_after_sockets = look_after_sockets
        self._clock = clock
        self._next_look_s = 0.0
        self._is_looking = False
        self._has_looked = False

    def __call__(self) -> None:
        """Runs in the mesh thread. Raises FencedError."""
        self._check_disk()
        now_s = self._clock()
        if now_s >= self._next_look_s and not self._is_looking:
            self._next_look_s = now_s + LOOK_INTERVAL_S
            self._is_looking = True
            self._disk.submit(self._look)
        if self._has_looked:
            self._has_looked = False
            self._look_after_sockets()
        if self._journal is not None:
            self._journal.tick()

    def _look(self) -> None:
        self._look_after_folder()
        self._has_looked = True
        self._is_looking = False
