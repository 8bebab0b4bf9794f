"""A mesh of processes of this machine as a target: the supervisor of `make run`, started for the run."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from chaos.proxy.link_proxy import LinkProxy
from chaos.target import Node, TargetError
from common.errors import MoemeshError
from common.processes.supervisor import LocalMesh

DEMO_CHECKPOINT = Path(__file__).resolve().parents[2] / "compose" / "demo" / "checkpoint"


@dataclass
class LocalTarget:
    """Entering starts the mesh, leaving ends it. Its state folder lives as long as it does."""

    settings: Mapping[str, str]
    """Settings by environment name. MODEL may be left out where the environment has it, or for the demo model."""
    keep_logs: Path | None = None
    """The processes' logs are copied to this folder at the end."""
    port: int = 0
    modules: Mapping[str, str] = field(default_factory=dict)
    """A build with something else in place of a service; see LocalMesh."""
    state_dir: Path | None = None
    """The state folder of the mesh, while it runs."""
    features: frozenset[str] = field(default=frozenset({"processes"}))
    _mesh: LocalMesh | None = None
    _leaving: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        # The router must have the same address after a restart.
        self.port = self.port or free_port()
        # Short: sockets live there, and their paths are bounded.
        self.state_dir = Path(tempfile.mkdtemp(prefix="chaos-"))
        with ExitStack() as stack, _as_target_error():
            stack.callback(self._clear, self.state_dir)
            settings = {**self.settings, **self.enter_surroundings(stack)}
            model = settings.get("MODEL") or os.environ.get("MODEL") or str(DEMO_CHECKPOINT)
            environment = {**settings, "MODEL": model, "PORT": str(self.port), "HOST": "127.0.0.1"}
            mesh = LocalMesh(environment, self.state_dir, modules=self.modules_run(), places=self.places())
            self._mesh = mesh.__enter__()
            stack.callback(mesh.close)
            # What was entered last is left first: the mesh says goodbye through its surroundings.
            self._leaving = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._leaving.close()

    def enter_surroundings(self, stack: ExitStack) -> Mapping[str, str]:
        """Enters what a mesh of this kind runs in, and returns the settings that lead it there. Raises TargetError."""
        return {}

    def modules_run(self) -> Mapping[str, str]:
        """Returns what runs in place of a service, by the service's name."""
        return self.modules

    def places(self) -> Mapping[str, Mapping[str, str]]:
        """Returns settings of single nodes, by their names."""
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
            with suppress(ProcessLookupError):
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

    def _clear(self, state_dir: Path) -> None:
        if self.keep_logs is not None and (state_dir / "logs").exists():
            shutil.copytree(state_dir / "logs", self.keep_logs, dirs_exist_ok=True)
        shutil.rmtree(state_dir, ignore_errors=True)


@dataclass
class ProxiedLocalTarget(LocalTarget):
    """As LocalTarget, but links are TCP on the loopback, through the proxy, instead of Unix sockets, and can be hurt.

    It is slower by two hops of a Python program for each message.
    """

    features: frozenset[str] = field(default=frozenset({"processes", "proxy"}))
    proxy: LinkProxy | None = None

    def enter_surroundings(self, stack: ExitStack) -> Mapping[str, str]:
        self.proxy = stack.enter_context(LinkProxy(lambda host, port: owner_of_port(port, self._pids())))
        return {"CONTROL": f"tcp://127.0.0.1:{free_port()}", "SOCKS_PROXY": self.proxy.address}

    def _pids(self) -> dict[str, int]:
        try:
            return {node.name: node.pid for node in self.nodes()}
        except TargetError:
            return {}  # the first process connects before the mesh is known here


def inodes_of_port(table: str, port: int) -> set[int]:
    """Returns the inodes of the sockets with this local port, from the text of /proc/net/tcp."""
    rows = (line.split() for line in table.splitlines()[1:])
    return {int(row[9]) for row in rows if int(row[1].rpartition(":")[2], 16) == port} - {0}  # 0: without an owner


def owner_of_port(port: int, pids: Mapping[str, int]) -> str:
    """Returns the first of these, by name, that has a socket on this port of the loopback, or "" if none has."""
    inodes = inodes_of_port(Path("/proc/net/tcp").read_text(), port)
    return next((name for name, pid in pids.items() if not inodes.isdisjoint(_inodes_of_process(pid))), "")


def _inodes_of_process(pid: int) -> Iterator[int]:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return  # it has ended, or is not ours to look into
    for name in names:
        try:
            link = os.readlink(f"{folder}/{name}")
        except OSError:
            continue  # closed since
        if link.startswith("socket:["):
            yield int(link[8:-1])


@contextmanager
def _as_target_error() -> Iterator[None]:
    try:
        yield
    except MoemeshError as error:
        raise TargetError(error.message) from error


def free_port() -> int:
    """Returns a port of the loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
