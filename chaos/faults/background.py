"""What faults have whose work goes on while others are hurt: one thread, which ends by itself or when it is told to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import field

from chaos.faults.base import Fault
from chaos.target import Target, TargetError

STOP_TIMEOUT_S = 60.0


class BackgroundFault(Fault):
    """`apply` begins the work; `heal` waits for its end and raises what it raised."""

    _stopped: threading.Event = field(default_factory=threading.Event, init=False, repr=False)
    _thread: threading.Thread | None = field(default=None, init=False, repr=False)
    _patience_s: float = field(default=0.0, init=False, repr=False)
    _error: TargetError | None = field(default=None, init=False, repr=False)

    def heal(self, target: Target) -> None:
        """Ends the work and undoes what it has done. Raises TargetError also if the work does not stop."""
        try:
            self._finish()
        finally:
            super().heal(target)

    def _begin(self, work: Callable[[], None], patience_s: float) -> None:
        """Runs `work` in a thread. It must look at `_stopped` wherever it waits.

        Healing waits `patience_s` for the work to end by itself, and then tells it to stop.
        """

        def run() -> None:
            try:
                work()
            except TargetError as error:
                self._error = error

        self._stopped.clear()
        self._error = None
        self._patience_s = patience_s
        self._thread = threading.Thread(target=run, name="chaos-fault", daemon=True)
        self._thread.start()

    def _finish(self) -> None:
        if self._thread is None:
            return
        self._thread.join(self._patience_s)
        self._stopped.set()
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            raise TargetError("a fault's work did not stop")
        self._thread = None
        if self._error is not None:
            raise self._error
