"""A mesh of local processes: start, watch, restart what dies, end all of it. For `make run` and for tests.

No child outlives the supervisor, even one that is killed: children ask the kernel to kill them when their parent ends.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from common.config import read_settings
from common.errors import ConfigurationError, DeadlineError, FencedError, NodeLostError
from common.processes.cgroup import count_memory_kills, memory_groups
from common.processes.child_exit import describe_exit, last_sentence
from common.processes.folder_lock import FolderLock, lock_folder
from common.processes.fork_server import ChildProcess, ImportsUnderWayError, LocalStarter
from common.processes.local_http import open_local
from common.processes.memory import offered_bytes

RESTART_DELAY_S = 0.25
MAX_RESTART_DELAY_S = 8.0
NO_START_DELAY_S = 1.0
"""How long to wait before a failed start is tried again: no memory, no process or no file is left just now."""
STEADY_S = 10.0
"""A process that ran for this long is restarted at once; one that dies sooner waits longer each time."""
GRACE_S = 20.0
KILLED_S = 5.0
"""How long to wait for the end of a killed process: the kernel may keep it until a disk answers."""
ASK_INTERVAL_S = 0.1
"""The pause between questions whether the mesh is ready."""
LOOK_INTERVAL_S = 0.5
"""The pause between looks at the mesh's own files in its state folder."""


@dataclass(slots=True)
class Child:
    """One place in the mesh, and the process that fills it now."""

    name: str
    module: str
    environment: dict[str, str]
    log_path: Path
    process: ChildProcess | None = None
    started_s: float = 0.0
    restart_at_s: float = 0.0
    failures_in_a_row: int = 0
    restarts: int = 0
    is_wanted: bool = True
    trouble: str = ""
    """Why it could not be started the last time; people have been told. Empty: it could."""
    memory_kills_before: int = 0
    """Processes here that the kernel had ended for want of memory when it was started."""


@dataclass(slots=True)
class LocalMesh:
    """Router, stages and experts as processes of this machine. A context manager: leaving it ends all of them.

    `environment` holds settings by their environment's names and wins over this process's own environment.
    """

    environment: Mapping[str, str]
    state_dir: Path
    clock: Callable[[], float] = time.monotonic
    modules: Mapping[str, str] = field(default_factory=dict)
    """What runs in place of `services.X`, by service: a module and its arguments. Tests plant bugs with it."""
    places: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Settings of single places by name (`stage-0`), over those of all: where each has a part of the checkpoint."""
    children: dict[str, Child] = field(default_factory=dict)
    num_nodes_at_start: int = 0
    starter: LocalStarter = field(init=False)
    _folder_lock: FolderLock | None = None
    _next_look_s: float = 0.0
    _folder_trouble: str = ""
    _watcher: threading.Thread | None = None
    _ending: threading.Event = field(default_factory=threading.Event)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.starter = LocalStarter(self.state_dir / "logs", self._settings_of_all())

    def __enter__(self) -> Self:
        settings = read_settings(self.environment)
        # Nodes of a second mesh in this folder would join the first.
        self._folder_lock = lock_folder(self.state_dir, "mesh")
        (self.state_dir / "logs").mkdir(exist_ok=True)
        (self.state_dir / "http.url").unlink(missing_ok=True)
        self.num_nodes_at_start = settings.stage_processes + settings.experts
        self.starter.begin()
        self.add("router", "router-0")
        for number in range(settings.stage_processes):
            self.add("stage", f"stage-{number}")
        for number in range(settings.experts):
            self.add("expert", f"expert-{number}")
        self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Returns where the router answers HTTP. Raises NodeLostError while it does not listen."""
        try:
            return (self.state_dir / "http.url").read_text().strip()
        except FileNotFoundError:
            raise NodeLostError("the router does not listen yet") from None

    def add(self, service: str, name: str) -> None:
        """Start one more process: `stage` or `expert` (a mesh has one `router`).

        The kernel ends it with the thread that calls this; other threads than the one that owns the mesh use `scale`.
        """
        with self._lock:
            child = self._place(service, name)
            with contextlib.suppress(ImportsUnderWayError):  # the watcher starts it in a moment
                self._start(child)

    def _settings_of_all(self) -> dict[str, str]:
        environment = {**os.environ, **self.environment, "STATE_DIR": str(self.state_dir)}
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        threads = environment.get("THREADS", "").strip()
        environment.setdefault("OMP_NUM_THREADS", threads if threads.isdecimal() else "1")
        return environment

    def _place(self, service: str, name: str) -> Child:
        """To be called with the lock."""
        environment = {**self._settings_of_all(), **self.places.get(name, {})}
        self._share_memory(environment)
        if name in self.children:
            raise ConfigurationError(f"{name} is part of this mesh already")
        child = Child(name, f"services.{service}", environment, self.logs(name))
        self.children[name] = child
        return child

    def _share_memory(self, environment: dict[str, str]) -> None:
        """Each process would offer what is free, and all of them share one memory."""
        num_nodes = max(1, self.num_nodes_at_start)
        if environment.get("DEVICE", "cpu") not in ("", "cpu"):
            # How much a GPU has only a process with torch can tell: each node works its part out for itself.
            environment["DEVICE_PROCESSES"] = environment.get("DEVICE_PROCESSES") or str(num_nodes)
        elif environment.get("CAPACITY_BYTES", "0").strip() in ("", "0"):
            environment["CAPACITY_BYTES"] = str(offered_bytes() // num_nodes)

    def stop(self, name: str, timeout_s: float = GRACE_S) -> None:
        """End one process in an orderly way and leave it ended until `start`. Raises ConfigurationError."""
        with self._lock:
            child = self._child(name)
            child.is_wanted = False
        self._end([child], timeout_s)

    def start(self, name: str) -> None:
        """Have a process that was stopped again; the watcher starts it. Raises ConfigurationError.

        One that runs stays as it is.
        """
        with self._lock:
            child = self._child(name)
            child.is_wanted = True
            child.failures_in_a_row = 0
            child.restart_at_s = max(self.clock(), child.started_s)  # it did not fail: no delay

    def scale(self, service: str, count: int, timeout_s: float = GRACE_S) -> None:
        """Have `count` stages or experts: the watcher starts new ones, the newest end first and in an orderly way."""
        with self._lock:
            prefix = f"{service}-"
            numbered = [name for name, child in self.children.items() if child.module == f"services.{service}"]
            highest = max(
                (int(n.removeprefix(prefix)) for n in numbered if n.removeprefix(prefix).isdecimal()), default=-1
            )
            for number in range(highest + 1, highest + 1 + count - len(numbered)):
                self._place(service, f"{prefix}{number}")
            leaving = [self.children.pop(name) for name in numbered[count:]]
            for child in leaving:
                child.is_wanted = False
        self._end(leaving, timeout_s)

    def kinds(self) -> dict[str, str]:
        """Returns what each place in the mesh is for, by name: router, stage or expert."""
        with self._lock:
            return {name: child.module.removeprefix("services.") for name, child in self.children.items()}

    def processes(self) -> list[tuple[str, int]]:
        """Returns name and pid of every process that runs now."""
        with self._lock:
            return [
                (child.name, child.process.pid)
                for child in self.children.values()
                if child.process is not None and child.process.poll() is None
            ]

    def logs(self, name: str) -> Path:
        """Returns a process's log file; a restarted process goes on in it."""
        return self.state_dir / "logs" / f"{name}.log"

    def wait_ready(self, timeout_s: float, on_progress: Callable[[str], None] | None = None) -> None:
        """Waits until /ready says yes. Raises DeadlineError (what is missing) or NodeLostError (cannot start)."""
        until_s = time.monotonic() + timeout_s
        while True:
            self._raise_if_hopeless()
            is_ready, said = self._ask_ready()
            if on_progress is not None:
                on_progress(said)
            if is_ready:
                return self._forgive()
            if time.monotonic() >= until_s:
                raise DeadlineError(f"the mesh was not ready within {timeout_s:.0f} s: {said}")
            time.sleep(ASK_INTERVAL_S)

    def close(self) -> None:
        """End all processes: nodes first, so that they can say goodbye, then the router."""
        with self._lock:
            children = list(self.children.values())
            for child in children:
                child.is_wanted = False
        self._end([child for child in children if child.module != "services.router"], GRACE_S)
        self._end([child for child in children if child.module == "services.router"], GRACE_S)
        # Last: the kernel ends a child with the thread that started it, and the watcher started what was restarted.
        self._ending.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        self.starter.close()
        if self._folder_lock is not None:
            self._folder_lock.close()
            self._folder_lock = None

    # ---- inside

    def _child(self, name: str) -> Child:
        try:
            return self.children[name]
        except KeyError:
            raise ConfigurationError(f"{name} is not part of this mesh; it has {', '.join(self.children)}") from None

    def _start(self, child: Child) -> None:
        command = self.modules.get(child.module.removeprefix("services."), child.module)
        child.process = self.starter.start(command, child.environment, child.log_path)
        child.started_s = self.clock()
        child.trouble = ""
        child.memory_kills_before = count_memory_kills()

    def _watch(self) -> None:
        while not self._ending.wait(0.05):
            self._look_after_folder()
            with self._lock:
                for child in self.children.values():
                    self._attend(child)

    def _look_after_folder(self) -> None:
        """Its lock and the folder for logs are made again where they were removed."""
        if self._folder_lock is None or self.clock() < self._next_look_s:
            return
        self._next_look_s = self.clock() + LOOK_INTERVAL_S
        try:
            is_news, trouble = self._folder_lock.look_after(), ""
            (self.state_dir / "logs").mkdir(exist_ok=True)
        except (FencedError, OSError) as error:
            is_news, trouble = False, str(error)
        if is_news:
            _tell_people(f"files of STATE_DIR={self.state_dir} were removed and have been recreated")
        if trouble and trouble != self._folder_trouble:
            _tell_people(f"STATE_DIR={self.state_dir} cannot be used any more: {trouble}")
        self._folder_trouble = trouble

    def _attend(self, child: Child) -> None:
        """Start it if it is missing. One that cannot be started now is tried again: were the watcher to end with it,
        the kernel would end all children that the watcher has started."""
        if not child.is_wanted or (child.process is not None and child.process.poll() is None):
            return
        try:
            if child.process is not None:
                self._revive(child)
            elif self.clock() >= child.restart_at_s:
                self._start(child)
        except ImportsUnderWayError:
            return  # what it needs is being imported
        except (OSError, subprocess.SubprocessError) as error:
            child.restart_at_s = self.clock() + NO_START_DELAY_S
            if str(error) != child.trouble:
                child.trouble = str(error)
                _tell_people(f"{child.name} cannot be started, and is tried again every second: {error}")

    def _revive(self, child: Child) -> None:
        now_s = self.clock()
        if child.restart_at_s < child.started_s:  # it has only just been seen dead
            is_early = now_s - child.started_s < STEADY_S
            child.failures_in_a_row = child.failures_in_a_row + 1 if is_early else 0
            delay_s = min(MAX_RESTART_DELAY_S, RESTART_DELAY_S * 2 ** max(0, child.failures_in_a_row - 1))
            child.restart_at_s = now_s + (delay_s if is_early else 0.0)
            if child.process is not None and (child.process.returncode or 0) < 0:
                _tell_people(f"{child.name}: {_describe_end(child)}. It is started again")
        if now_s >= child.restart_at_s:
            self._start(child)
            child.restarts += 1

    def _forgive(self) -> None:
        """All of them started: a process that dies from now on was killed, and its count starts anew."""
        with self._lock:
            for child in self.children.values():
                child.failures_in_a_row = 0

    def _raise_if_hopeless(self) -> None:
        """A process that died three times in a row at start has something to say: its last line of log."""
        if self.starter.is_hopeless:
            raise NodeLostError(f"no node can start: {_last_sentence(self.starter.log_path)}")
        for child in list(self.children.values()):
            process = child.process
            refused = process is not None and process.poll() == 1 and child.restarts == 0
            if child.failures_in_a_row >= 3 or refused:
                raise NodeLostError(f"{child.name} cannot start: {_describe_end(child)}")

    def _ask_ready(self) -> tuple[bool, str]:
        try:
            try:
                with open_local(f"{self.url}/ready", timeout_s=5) as reply:
                    return True, str(reply.read(2000), "utf-8", "replace")
            except urllib.error.HTTPError as reply:
                return False, str(reply.read(2000), "utf-8", "replace")
        except (NodeLostError, OSError, http.client.HTTPException) as error:
            return False, str(error)

    @staticmethod
    def _end(children: list[Child], timeout_s: float) -> None:
        running = [c.process for c in children if c.process is not None and c.process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGCONT)  # a paused one must hear it too
        deadline_s = time.monotonic() + timeout_s
        for process in running:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        for process in running:
            try:
                process.wait(KILLED_S)
            except subprocess.TimeoutExpired:
                _tell_people(
                    f"process {process.pid} was killed and has not ended: it waits for a disk, and is left behind"
                )


def _tell_people(sentence: str) -> None:
    """Writes to stderr. It may have no reader any more; the watcher goes on all the same."""
    with contextlib.suppress(OSError):
        print(f"moemesh supervisor: {sentence}", file=sys.stderr, flush=True)


def _describe_end(child: Child) -> str:
    """Says how a child's process has ended; of one that was never started, why not."""
    status = child.process.returncode if child.process is not None else None
    if status is None:
        return child.trouble or _last_sentence(child.log_path)
    memory_kills = count_memory_kills() - child.memory_kills_before
    return describe_exit(status, _last_sentence(child.log_path), memory_kills, memory_groups())


def _last_sentence(log_path: Path) -> str:
    return last_sentence(log_path.read_text(errors="replace") if log_path.exists() else "")
