"""Who computes placements: a process of its own, so that a second of work for a large model holds up no token."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from services.router.control.placing import PlacementAnswer, PlacementRequest, answer_request
from services.router.placement_codec import LENGTH, decode_answer, encode_request

ANSWER_LIMIT_S = 60.0
MAX_PROCESSES = 2
"""For one request: should two of them end over it, the request is answered by a thread of the router."""
_COMMAND = (sys.executable, "-m", "services.router.placement_process")
_ROOT = Path(__file__).resolve().parents[2]


class Placer(Protocol):
    """Takes a request, has its answer some time later."""

    def begin(self, request: PlacementRequest) -> None:
        """Compute this next; does not wait."""

    def take(self) -> PlacementAnswer | None:
        """An answer that is there; None: none yet. Raises what the computation raised."""


class InlinePlacer:
    """Computes at once, in the thread that asks."""

    def __init__(self) -> None:
        self._answers: deque[PlacementAnswer] = deque()

    def begin(self, request: PlacementRequest) -> None:
        """See Placer."""
        self._answers.append(answer_request(request))

    def take(self) -> PlacementAnswer | None:
        """See Placer."""
        return self._answers.popleft() if self._answers else None


class ProcessPlacer:
    """A process that computes, and a thread that writes to it and reads from it.

    A process that ends, or does not answer in time, is replaced, and the request is asked again.
    """

    def __init__(
        self,
        on_answer: Callable[[], None],
        log: structlog.stdlib.BoundLogger,
        command: Sequence[str] = _COMMAND,
        answer_limit_s: float = ANSWER_LIMIT_S,
    ) -> None:
        """`on_answer` is called in another thread when `take` has something."""
        self._on_answer = on_answer
        self._log = log
        self._command = command
        self._answer_limit_s = answer_limit_s
        self._requests: queue.SimpleQueue[PlacementRequest | None] = queue.SimpleQueue()
        self._answers: deque[PlacementAnswer | Exception] = deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="placer", daemon=True)

    def start(self) -> None:
        """Start the process already, so that the first request need not wait for it."""
        self._thread.start()

    def close(self) -> None:
        """End the process; what it was computing is lost."""
        self._is_closing = True
        self._requests.put(None)
        if (process := self._process) is not None:
            process.kill()
        self._thread.join(timeout=5.0)

    def begin(self, request: PlacementRequest) -> None:
        """See Placer."""
        self._requests.put(request)

    def take(self) -> PlacementAnswer | None:
        """See Placer."""
        if not self._answers:
            return None
        answer = self._answers.popleft()
        if isinstance(answer, Exception):
            raise answer
        return answer

    # ---- the thread

    def _run(self) -> None:
        try:
            with contextlib.suppress(OSError):  # it is tried again, and said, with the first request
                self._launch()
            while (request := self._requests.get()) is not None and not self._is_closing:
                try:
                    self._answers.append(self._answer(request))
                except Exception as error:
                    self._answers.append(error)
                self._on_answer()
        finally:
            self._end()

    def _answer(self, request: PlacementRequest) -> PlacementAnswer:
        for _ in range(MAX_PROCESSES):
            try:
                return self._ask(request)
            except (OSError, EOFError) as error:
                if self._is_closing:
                    raise
                self._log.warning("placement_process_lost", reason=str(error))
                self._end()
        self._log.error("placement_computed_in_router", reason="its own process ended twice over it")
        return answer_request(request)

    def _ask(self, request: PlacementRequest) -> PlacementAnswer:
        process = self._process or self._launch()
        assert process.stdin is not None
        assert process.stdout is not None
        deadline_s = time.monotonic() + self._answer_limit_s
        _write(process.stdin.fileno(), encode_request(request), deadline_s)
        (size,) = LENGTH.unpack(_read(process.stdout.fileno(), LENGTH.size, deadline_s))
        return decode_answer(_read(process.stdout.fileno(), size, deadline_s))

    def _launch(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=_ROOT, env=environment, bufsize=0
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        self._process = process
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _is_ready(descriptor: int, event: int, deadline_s: float) -> bool:
    poller = select.poll()  # select() takes no descriptor above 1,023
    poller.register(descriptor, event)
    return bool(poller.poll(max(0.0, deadline_s - time.monotonic()) * 1000))


def _write(descriptor: int, data: bytes, deadline_s: float) -> None:
    view = memoryview(data)
    while view:
        if not _is_ready(descriptor, select.POLLOUT, deadline_s):
            raise TimeoutError("it does not read its request")
        view = view[os.write(descriptor, view) :]


def _read(descriptor: int, size: int, deadline_s: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not _is_ready(descriptor, select.POLLIN, deadline_s):
            raise TimeoutError("no answer in time")
        if not (read := os.read(descriptor, min(size - len(data), 1 << 20))):
            raise EOFError("the process has ended")
        data += read
    return bytes(data)
