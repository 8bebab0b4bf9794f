"""How the processes of a mesh on one machine are started: as forks of processes that have imported what they need.

Nodes are forks of one that has torch. The router has no use for torch, and is a fork of another: while none runs,
every stream stands still, and three quarters of its start were imports.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.processes.child_process import ChildProcess, end_with_parent, module_command, module_environment
from common.processes.fork_server import ForkServer

FORKED_MODULES = (
    {"services.stage": "services.stage.process", "services.expert": "services.expert.process"},
    {"services.router": "services.router.service"},
)
"""What is imported before a fork, by what runs after it; one process that forks for each group."""
HOPELESS_AFTER = 3


@dataclass(slots=True)
class LocalStarter:
    """Of one mesh. The kernel ends what it starts with the thread that calls it."""

    log_dir: Path
    environment: Mapping[str, str]
    """Of the processes that fork."""
    _forks: dict[str, ForkServer] = field(default_factory=dict, init=False)
    """By what is started."""

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
            parent = os.getpid()
            return subprocess.Popen(
                module_command(module, *arguments),
                env=module_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: end_with_parent(parent),
            )

    @property
    def is_hopeless(self) -> bool:
        """The imports have failed again and again; `log_path` says why."""
        return any(forks.failures_in_a_row >= HOPELESS_AFTER for forks in self._forks.values())

    def close(self) -> None:
        """After all that it has started has ended."""
        for forks in self._forks.values():
            forks.close()
        self._forks.clear()
