"""How the processes of a mesh on one machine are started: nodes are forked from one that has imported torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.child_process import ChildProcess, end_with_parent, module_command, module_environment
from common.fork_server import ForkServer

FORKED_MODULES = {"services.stage": "services.stage.process", "services.expert": "services.expert.process"}
"""What is imported before a fork, by what runs after it. The router has no use for torch."""
HOPELESS_AFTER = 3


@dataclass(slots=True)
class LocalStarter:
    """Of one mesh. The kernel ends what it starts with the thread that calls it."""

    log_dir: Path
    environment: Mapping[str, str]
    """Of the process that forks."""
    _forks: ForkServer | None = field(default=None, init=False)

    def begin(self) -> None:
        """Let the imports begin. Raises OSError."""
        if sys.platform == "linux":  # elsewhere a library may not bear a fork
            preload = sorted(set(FORKED_MODULES.values()))
            self._forks = ForkServer(preload, self.environment, self.log_path)
            self._forks.launch()

    @property
    def log_path(self) -> Path:
        """Of the process that forks; it says something only where it cannot."""
        return self.log_dir / "forks.log"

    def start(self, command: str, environment: Mapping[str, str], log_path: Path) -> ChildProcess:
        """`python -m command`, in a session of its own: Ctrl-C goes to the supervisor, which ends them in order.

        Raises ImportsUnderWayError, OSError, subprocess.SubprocessError.
        """
        module, *arguments = command.split()
        with log_path.open("ab") as log:
            if self._forks is not None and module in FORKED_MODULES:
                return self._forks.spawn(module, arguments, environment, {1: log.fileno(), 2: log.fileno()})
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
        return self._forks is not None and self._forks.failures_in_a_row >= HOPELESS_AFTER

    def close(self) -> None:
        """After all that it has started has ended."""
        if self._forks is not None:
            self._forks.close()
            self._forks = None
