"""Processes that begin with everything imported: forks of one that has done it.

Importing torch takes seconds of a core, for every process anew; a fork takes milliseconds, and shares the memory. The
server is a process with one thread that has imported and does nothing else; `common.processes.fork_child` is its side.
Messages are msgpack maps over a pair of SOCK_SEQPACKET sockets.

Forks are children of the server: the kernel kills them when the server ends, and the server when its creator ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from common.processes.child_process import end_with_parent, start_module
from common.processes.fork_child import MAX_MESSAGE_BYTES, READY, serve_forks

REPLY_S = 5.0
LAUNCH_AGAIN_S = 1.0
IMPORTS_S = 120.0
"""How long all imports may take: a disk that hangs must be reported."""
KILLED_S = 5.0
"""How long to wait for its end after SIGKILL."""
TELL_S = 0.3
"""How long to wait for the server to report the exit status of an ended process."""


class ImportsUnderWayError(Exception):
    """The server imports, or has only just ended: ask again a moment later."""


class ForkedProcess:
    """One that was forked. All methods from any thread."""

    def __init__(self, server: ForkServer, pid: int, pidfd: int) -> None:
        """`pidfd` belongs to it: a process id may be another process's once the server has seen this one's end."""
        self.pid = pid
        self.returncode: int | None = None
        self._server = server
        self._pidfd = pidfd
        self._ended_s = 0.0

    def __del__(self) -> None:
        os.close(self._pidfd)

    def poll(self) -> int | None:
        """Exit status, or minus the signal that ended it; None while it runs."""
        if self.returncode is None:
            self._server.collect()
        if self.returncode is None and _is_readable(self._pidfd, 0.0):
            now_s = time.monotonic()
            self._ended_s = self._ended_s or now_s
            if now_s - self._ended_s > TELL_S:
                self.returncode = -signal.SIGKILL  # how is not known: the server hangs
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended. Raises subprocess.TimeoutExpired."""
        deadline_s = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            if _is_readable(self._pidfd, left_s):
                time.sleep(0.001)  # until the server has said how
        return status

    def send_signal(self, sig: int) -> None:
        """Nothing where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, sig)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


ChildProcess = subprocess.Popen[bytes] | ForkedProcess
"""A child of this process, or one that was forked for it: it is ended and waited for alike."""


class ForkServer:
    """This process's end. All methods from any thread."""

    def __init__(self, preload: Sequence[str], environment: Mapping[str, str], log_path: Path | None = None) -> None:
        """`preload`: modules. `environment` and `log_path`: of the server; what is forked has its own."""
        self._preload = list(preload)
        self._environment = dict(environment)
        self._log_path = log_path
        self._lock = threading.RLock()
        self._link: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._own_fork = 0
        self._is_ready = False
        self._launched_s = 0.0
        self._running: dict[int, ForkedProcess] = {}
        self.failures_in_a_row = 0
        """How often it has ended before it was ready."""

    def launch(self) -> None:
        """Start it, with a new interpreter. The kernel ends it with the thread that calls this."""
        with self._lock:
            self._launched_s = time.monotonic()
            own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with other, contextlib.ExitStack() as stack:
                self._process = start_module(
                    "common.processes.fork_child",
                    str(other.fileno()),
                    *self._preload,
                    environment=self._environment,
                    log=None if self._log_path is None else stack.enter_context(self._log_path.open("ab")),
                    pass_fds=(other.fileno(),),
                )
            self._link, self._is_ready = own, False

    def fork_off(self) -> None:
        """Start it as a fork of this process, as long as that has a single thread and has imported everything."""
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            own.close()
            end_with_parent(parent)
            serve_forks(other)
        other.close()
        with self._lock:
            self._launched_s = time.monotonic()
            self._link, self._is_ready, self._own_fork = own, False, pid

    def spawn(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        descriptors: Mapping[int, int] | None = None,
    ) -> ForkedProcess:
        """`python -m module arguments`, in a session of its own.

        `descriptors`: the number in the new process of descriptors of this one; 1 and 2 are where it prints (else it
        prints where the server does). Raises ImportsUnderWayError, OSError.
        """
        descriptors = descriptors or {}
        request = {
            "module": module,
            "arguments": list(arguments),
            "environment": dict(environment),
            "descriptors": list(descriptors),
        }
        # An environment may hold bytes that are not text, and os.environ has them as surrogates.
        packed: bytes = msgpack.packb(request, unicode_errors="surrogateescape")
        if len(packed) > MAX_MESSAGE_BYTES:
            raise OSError(f"settings and environment of {len(packed)} bytes are too long: {MAX_MESSAGE_BYTES} at most")
        with self._lock:
            link = self._ready_link()
            try:
                socket.send_fds(link, [packed], list(descriptors.values()))
                reply = self._read_reply(link)
            except (ConnectionError, TimeoutError):
                self._give_up()
                raise
        if isinstance(reply, str):
            raise OSError(reply)
        return reply

    def collect(self) -> None:
        """Take in what the server has said about those that have ended."""
        with self._lock:
            while self._link is not None and _is_readable(self._link.fileno(), 0.0):
                try:
                    message, _ = _receive(self._link)
                except OSError:
                    self._give_up()
                    return
                self._handle(message)

    def close(self) -> None:
        """End it, and all that it has forked and that still runs."""
        with self._lock:
            self._give_up()

    def _ready_link(self) -> socket.socket:
        self.collect()
        if self._link is None:
            if time.monotonic() - self._launched_s < LAUNCH_AGAIN_S:
                raise ImportsUnderWayError("the process that forks has only just ended")
            self.launch()
        if self._link is None or not self._is_ready:
            if time.monotonic() - self._launched_s > IMPORTS_S:
                self._give_up()
                raise OSError(f"the process that forks has not imported its modules within {IMPORTS_S:.0f} s")
            raise ImportsUnderWayError("the process that forks still imports")
        return self._link

    def _read_reply(self, link: socket.socket) -> ForkedProcess | str:
        """Returns what was forked, or why nothing was."""
        deadline_s = time.monotonic() + REPLY_S
        while _is_readable(link.fileno(), max(0.0, deadline_s - time.monotonic())):
            message, descriptors = _receive(link)
            if "error" in message:
                return str(message["error"])
            if "forked" in message:
                if not descriptors:  # the kernel has dropped it, and what was forked could not be ended
                    self._give_up()
                    raise OSError("no file descriptor is left for a forked process")
                process = ForkedProcess(self, message["forked"], descriptors[0])
                self._running[process.pid] = process
                return process
            self._handle(message)
        raise TimeoutError(f"the process that forks did not answer within {REPLY_S:.0f} s")

    def _handle(self, message: dict[str, Any]) -> None:
        if "ended" in message:
            process = self._running.pop(message["ended"], None)
            if process is not None:
                process.returncode = message["status"]
        elif message == READY:
            self._is_ready, self.failures_in_a_row = True, 0

    def _give_up(self) -> None:
        """It is gone, or has to go."""
        if self._link is None:
            return
        self._link.close()
        self._link = None
        if not self._is_ready:
            self.failures_in_a_row += 1
        for process in self._running.values():
            process.kill()
            process.returncode = -signal.SIGKILL
        self._running.clear()
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel keeps it until a disk answers
                self._process.wait(KILLED_S)
            self._process = None
        if self._own_fork:
            os.kill(self._own_fork, signal.SIGKILL)
            os.waitpid(self._own_fork, 0)
            self._own_fork = 0


def _is_readable(descriptor: int, timeout_s: float | None) -> bool:
    """Returns whether a link has a message, or its end, or a process has ended; waits that long for it, None: without
    end."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def _receive(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Waits for one. Raises OSError, ConnectionResetError at the end."""
    data, descriptors, _, _ = socket.recv_fds(link, MAX_MESSAGE_BYTES, 1)
    if not data:
        raise ConnectionResetError("the process that forks has ended")
    return msgpack.unpackb(data), descriptors


FORKED_MODULES = (
    {"services.stage": "services.stage.process", "services.expert": "services.expert.process"},
    {"services.router": "services.router.service"},
)
"""What is imported before a fork, by what runs after it; one process that forks for each group."""
HOPELESS_AFTER = 3


@dataclass(slots=True)
class LocalStarter:
    """Starts the processes of a mesh on one machine, as forks of processes that have imported what they need.

    Nodes are forks of one that has torch. The router has no use for torch, and is a fork of another: while none runs,
    every stream stands still, and three quarters of its start were imports. The kernel ends what is started here with
    the thread that called.
    """

    log_dir: Path
    environment: Mapping[str, str]
    """The environment of the fork servers."""
    _forks: dict[str, ForkServer] = field(default_factory=dict, init=False)
    """The fork servers, by what is started."""

    def begin(self) -> None:
        """Let the imports begin. Raises OSError."""
        if sys.platform == "linux":  # elsewhere a library may not bear a fork
            for group in FORKED_MODULES:
                forks = ForkServer(sorted(group.values()), self.environment, self.log_path)
                forks.launch()
                self._forks |= dict.fromkeys(group, forks)

    @property
    def log_path(self) -> Path:
        """Of the processes that fork; they say something only where they cannot."""
        return self.log_dir / "forks.log"

    def start(self, command: str, environment: Mapping[str, str], log_path: Path) -> ChildProcess:
        """`python -m command`, in a session of its own: Ctrl-C goes to the supervisor, which ends them in order.

        Raises ImportsUnderWayError, OSError, subprocess.SubprocessError.
        """
        module, *arguments = command.split()
        with log_path.open("ab") as log:
            if (forks := self._forks.get(module)) is not None:
                return forks.spawn(module, arguments, environment, {1: log.fileno(), 2: log.fileno()})
            return start_module(module, *arguments, environment=environment, log=log)

    @property
    def is_hopeless(self) -> bool:
        """Returns whether the imports have failed again and again; `log_path` says why."""
        return any(forks.failures_in_a_row >= HOPELESS_AFTER for forks in self._forks.values())

    def close(self) -> None:
        """After all that it has started has ended."""
        for forks in self._forks.values():
            forks.close()
        self._forks.clear()
