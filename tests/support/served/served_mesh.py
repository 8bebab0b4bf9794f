"""Real processes for a test: a mesh that is ready, a client for it, and its logs where the test fails."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.processes.supervisor import LocalMesh
from tests.support.served.mesh_client import MeshClient, mesh_client

READY_WITHIN_S = 120
LOG_TAIL_LINES = 40


@dataclass(frozen=True)
class ServedMesh:
    """A mesh that has said that it is ready."""

    local: LocalMesh
    client: MeshClient

    def log_tails(self) -> str:
        """The last lines of every process's log; a failing test shows them."""
        return log_tails(self.local)


@contextmanager
def served_mesh(
    model: Path,
    settings: Mapping[str, str] | None = None,
    ready_within_s: float = READY_WITHIN_S,
    places: Mapping[str, Mapping[str, str]] | None = None,
    modules: Mapping[str, str] | None = None,
) -> Iterator[ServedMesh]:
    """Starts a mesh for `model` with settings by their environment's names, and ends it.

    `places`, `modules`: as LocalMesh has them.

    Its state folder is short (sockets live there, and their paths are bounded) and gone afterwards.
    """
    state_dir = Path(tempfile.mkdtemp(prefix="moemesh-"))
    environment = {"MODEL": str(model), "PORT": "0", "KV_CACHE_TOKENS": "32768", **(settings or {})}
    try:
        with LocalMesh(
            environment=environment, state_dir=state_dir, places=places or {}, modules=modules or {}
        ) as local:
            try:
                local.wait_ready(timeout_s=ready_within_s)
                with mesh_client(local.url) as client:
                    yield ServedMesh(local, client)
            except BaseException:
                print(log_tails(local))
                raise
    finally:
        shutil.rmtree(state_dir, ignore_errors=True)


def log_tails(local: LocalMesh) -> str:
    """The last lines of each log."""
    tails = []
    for path in sorted((local.state_dir / "logs").iterdir()):
        tails.append("\n".join([f"---- {path.name}", *path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]]))
    return "\n".join(tails)
