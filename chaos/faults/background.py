"""Work of a fault that goes on while others are hurt: one thread, which ends when it is told to or by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from chaos.target import TargetError


@dataclass(slots=True)
class BackgroundWork:
    """At most one thread at a time. What it raises comes out of `finish`."""

    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _error: TargetError | None = None

    def begin(self, work: Callable[[threading.Event], None]) -> None:
        """Runs `work` in a thread; it looks at the event between its steps."""

        def run() -> None:
            try:
                work(self._stop)
            except TargetError as error:
                self._error = error

        self._stop.clear()
        self._error = None
        self._thread = threading.Thread(target=run, name="chaos-fault", daemon=True)
        self._thread.start()

    def finish(self, patience_s: float, stop_timeout_s: float = 60.0) -> None:
        """Waits so long for its own end, then tells it to stop, and waits for that. Raises what it raised, and
        TargetError if it does not stop."""
        if self._thread is None:
            return
        self._thread.join(patience_s)
        self._stop.set()
        self._thread.join(stop_timeout_s)
        if self._thread.is_alive():
            raise TargetError("a fault's work did not stop")
        self._thread = None
        if self._error is not None:
            raise self._error
