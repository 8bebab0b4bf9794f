"""Computes placements in a process of its own, so that a second of work for a large model holds up no token."""

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
from functools import partial
from pathlib import Path

import structlog

from services.router.control.experts.placing import PlacementAnswer, PlacementRequest, answer_request, keep_what_is_held
from services.router.mesh.placement_process import LENGTH, decode_answer, encode

ANSWER_LIMIT_S = 60.0
STILL_S = 3.0
"""How long a process may get no processor time: however full a machine is, one that computes gets some of it."""
LOOK_S = 0.1
MAX_PROCESSES = 2
"""How many processes may try one request: should two of them end over it, a thread of the router answers it."""
_COMMAND = (sys.executable, "-m", "services.router.mesh.placement_process")
_ROOT = Path(__file__).resolve().parents[3]


class ProcessPlacer:
    """A process that computes, and a thread that writes to it and reads from it.

    A process that ends, stands still, is late, or sends what is not an answer, is replaced, and the request is asked
    again. Where no placement can be computed at all, all nodes keep what they hold: it costs no token.
    """

    def __init__(
        self,
        on_answer: Callable[[], None],
        log: structlog.stdlib.BoundLogger,
        command: Sequence[str] = _COMMAND,
        answer_limit_s: float = ANSWER_LIMIT_S,
    ) -> None:
        """`on_answer` is called in another thread when `pop_answer` has something."""
        self._on_answer = on_answer
        self._log = log
        self._command = command
        self._answer_limit_s = answer_limit_s
        self._requests: queue.SimpleQueue[PlacementRequest | None] = queue.SimpleQueue()
        self._answers: deque[PlacementAnswer] = deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="placer", daemon=True)

    def start(self) -> None:
        """Starts the process already, so that the first request need not wait for it."""
        self._thread.start()

    def close(self) -> None:
        """Ends the process; what it was computing is lost."""
        self._is_closing = True
        self._requests.put(None)
        if (process := self._process) is not None:
            process.kill()
        self._thread.join(timeout=5.0)

    def begin(self, request: PlacementRequest) -> None:
        """Computes this next, and does not wait for it."""
        self._requests.put(request)

    def pop_answer(self) -> PlacementAnswer | None:
        """Returns an answer that is there; None: none yet."""
        return self._answers.popleft() if self._answers else None

    # ---- the thread

    def _run(self) -> None:
        try:
            with contextlib.suppress(OSError):  # it is tried again, and said, with the first request
                self._launch()
            while (request := self._requests.get()) is not None and not self._is_closing:
                self._answers.append(self._answer(request))
                self._on_answer()
        finally:
            self._end()

    def _answer(self, request: PlacementRequest) -> PlacementAnswer:
        for _ in range(MAX_PROCESSES):
            try:
                return self._ask(request)
            except Exception as error:  # also what came may not be an answer
                if self._is_closing:
                    break
                self._log.warning("placement_process_lost", reason=str(error) or type(error).__name__)
                self._end()
        if self._is_closing:
            return keep_what_is_held(request, "the router ends")
        self._log.error("placement_computed_in_router", reason="two placement processes gave no answer")
        try:
            return answer_request(request)
        except Exception as error:  # it is one of ours, and costs what would have moved, not the mesh
            self._log.critical("placement_failed", exc_info=error)
            return keep_what_is_held(request, f"the experts cannot be placed: {error or type(error).__name__}")

    def _ask(self, request: PlacementRequest) -> PlacementAnswer:
        process = self._process or self._launch()
        assert process.stdin is not None
        assert process.stdout is not None
        patience = ProcessPatience(self._answer_limit_s, partial(process_cpu_seconds, process.pid))
        _write(process.stdin.fileno(), encode(request), patience)
        (size,) = LENGTH.unpack(_read(process.stdout.fileno(), LENGTH.size, patience))
        return decode_answer(_read(process.stdout.fileno(), size, patience))

    def _launch(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            (*self._command, str(os.getpid())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env=environment,
            bufsize=0,
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


class ProcessPatience:
    """How long to wait for a process: until the limit where it computes, much shorter where it stands still."""

    def __init__(self, limit_s: float, cpu_seconds: Callable[[], float | None]) -> None:
        """`cpu_seconds` of the process; None where the system does not tell: then only the limit counts."""
        self._cpu_seconds = cpu_seconds
        self._deadline_s = time.monotonic() + limit_s
        self._limit_s = limit_s
        self._seen_cpu_s: float | None = None
        self._still_s = 0.0

    def wait(self, descriptor: int, event: int) -> None:
        """Waits until it is ready. Raises TimeoutError."""
        poller = select.poll()  # select() takes no descriptor above 1,023
        poller.register(descriptor, event)
        while not poller.poll(LOOK_S * 1000):
            if time.monotonic() >= self._deadline_s:
                raise TimeoutError(f"no answer within {self._limit_s:g} s")
            cpu_s = self._cpu_seconds()
            has_moved = cpu_s is None or cpu_s != self._seen_cpu_s
            self._seen_cpu_s, self._still_s = cpu_s, 0.0 if has_moved else self._still_s + LOOK_S
            if self._still_s >= STILL_S:
                raise TimeoutError(f"no answer, and no processor time for {STILL_S:g} s: it was stopped, or hangs")


def process_cpu_seconds(pid: int) -> float | None:
    """Returns CPU time of a process since it began; None where the system does not tell it."""
    if sys.platform != "linux":
        return None
    try:
        return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3), which Python does not have
    except OSError:
        return None


def _write(descriptor: int, data: bytes, patience: ProcessPatience) -> None:
    view = memoryview(data)
    while view:
        patience.wait(descriptor, select.POLLOUT)
        view = view[os.write(descriptor, view) :]


def _read(descriptor: int, size: int, patience: ProcessPatience) -> bytes:
    data = bytearray()
    while len(data) < size:
        patience.wait(descriptor, select.POLLIN)
        if not (read := os.read(descriptor, min(size - len(data), 1 << 20))):
            raise EOFError("the placement process has ended")
        data += read
    return bytes(data)
