"""A mesh of processes of this machine as a target: the supervisor of `make run`, started for the run."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from chaos.target import Node, TargetError
from common.errors import ConfigurationError, MoemeshError
from common.processes.supervisor import LocalMesh

DEMO_CHECKPOINT = Path(__file__).resolve().parents[2] / "compose" / "demo" / "checkpoint"


@dataclass(slots=True)
class LocalTarget:
    """A context manager: entering starts the mesh, leaving ends it. Its state folder lives as long as it does.

    `keep_logs`: where the processes' logs are copied at the end.
    """

    settings: Mapping[str, str]
    """By their environment's names. MODEL may be left out where the environment has it, or for the demo model."""
    keep_logs: Path | None = None
    port: int = 0
    modules: Mapping[str, str] = field(default_factory=dict)
    """See LocalMesh: a build with something else in place of a service."""
    state_dir: Path | None = None
    """The mesh's, while it runs."""
    _mesh: LocalMesh | None = None
    features: frozenset[str] = field(default=frozenset({"processes"}))

    def __enter__(self) -> Self:
        # The router must have the same address after a restart.
        self.port = self.port or free_port()
        # Short: sockets live there, and their paths are bounded.
        self.state_dir = Path(tempfile.mkdtemp(prefix="chaos-"))
        model = self.settings.get("MODEL") or os.environ.get("MODEL") or str(DEMO_CHECKPOINT)
        environment = {**self.settings, "MODEL": model, "PORT": str(self.port), "HOST": "127.0.0.1"}
        try:
            mesh = LocalMesh(environment, self.state_dir, modules=self.modules, places=self.places())
            self._mesh = mesh.__enter__()
        except MoemeshError as error:
            self._clear()
            raise TargetError(error.message) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._mesh is not None:
                self._mesh.close()
        finally:
            self._clear()

    def places(self) -> Mapping[str, Mapping[str, str]]:
        """Settings of single nodes, by name: none here."""
        return {}

    @property
    def mesh(self) -> LocalMesh:
        """Raises TargetError outside of the context."""
        if self._mesh is None:
            raise TargetError("the local mesh is not started")
        return self._mesh

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def nodes(self) -> list[Node]:
        kinds = self.mesh.kinds()
        running = self.mesh.processes()
        return sorted((Node(name, kinds[name], pid) for name, pid in running if name in kinds), key=lambda n: n.name)

    def signal(self, node: Node, number: int) -> None:
        # A pid is given again to others; only a child that runs is ours.
        if (node.name, node.pid) in self.mesh.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(node.pid, number)

    def stop(self, node: Node, timeout_s: float) -> None:
        with _as_target_error():
            self.mesh.stop(node.name, timeout_s)

    def start(self, name: str) -> None:
        with _as_target_error():
            self.mesh.start(name)

    def scale(self, kind: str, count: int) -> None:
        if kind not in ("stage", "expert"):
            raise TargetError(f"{kind} cannot be scaled; stage and expert can")
        with _as_target_error():
            self.mesh.scale(kind, count)

    def _clear(self) -> None:
        if self.state_dir is None:
            return
        if self.keep_logs is not None and (self.state_dir / "logs").exists():
            shutil.copytree(self.state_dir / "logs", self.keep_logs, dirs_exist_ok=True)
        shutil.rmtree(self.state_dir, ignore_errors=True)


@contextlib.contextmanager
def _as_target_error() -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        raise TargetError(error.message) from error


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
