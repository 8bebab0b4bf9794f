"""One mesh in containers, under a project name and on a port of its own, gone when the tests end."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.served.metrics_text import read_metrics

REPOSITORY = Path(__file__).parents[2]
BUILD_TIMEOUT_S = 1200.0
COMMAND_TIMEOUT_S = 300.0
READY_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class ComposeMesh:
    """A running project."""

    project: str
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def compose(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Output of `docker compose ...` in the repository's root. Raises AssertionError with what it said."""
        environment = os.environ | {"COMPOSE_PROJECT_NAME": self.project, "PORT": str(self.port)}
        result = subprocess.run(
            ["docker", "compose", *arguments],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert result.returncode == 0, f"docker compose {' '.join(arguments)}:\n{result.stdout}\n{result.stderr}"
        return result.stdout

    def running(self, service: str) -> int:
        """How many containers of a service are up."""
        return len(self.compose("ps", "--status", "running", "--quiet", service).split())

    def scale(self, **replicas: int) -> None:
        """As a person does it, for `stage` and `expert`; returns when the router knows just as many of each."""
        flags = [word for service, number in replicas.items() for word in ("--scale", f"{service}={number}")]
        self.compose("up", "-d", "--wait", "--no-build", *flags)
        self._wait_for(f"{replicas} registered", lambda: self.registered_nodes() == replicas)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Returns when /ready says so."""
        self._wait_for("/ready", self.is_ready)

    def is_ready(self) -> bool:
        """What /ready says now."""
        return self._get("/ready").status_code == 200

    def registered_nodes(self) -> dict[str, int]:
        """How many nodes of each kind the router knows."""
        counts = read_metrics(self._get("/metrics").text).by_label("moemesh_nodes", "kind")
        return {kind: int(count) for kind, count in counts.items()}

    def _get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=5, trust_env=False)

    def _wait_for(self, what: str, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        seen = "no"
        while time.monotonic() < deadline:
            try:
                if holds():
                    return
            except httpx.HTTPError as error:
                seen = repr(error)
            time.sleep(0.2)
        raise AssertionError(f"{what}: {seen} after {READY_TIMEOUT_S:.0f} s\n{self.logs()}")

    def logs(self, lines: int = 40) -> str:
        """The last lines of every container."""
        return self.compose("logs", "--no-color", "--tail", str(lines))

    def exit_codes_since(self, started_s: float) -> dict[str, int]:
        """Of the containers that ended since then (seconds of the epoch), by name; 137 is one that had to be killed."""
        command = ["docker", "events", "--since", f"{started_s:.3f}", "--until", f"{time.time():.3f}"]
        command += ["--filter", "event=die", "--filter", f"label=com.docker.compose.project={self.project}"]
        command += ["--format", "{{.Actor.Attributes.name}} {{.Actor.Attributes.exitCode}}"]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMMAND_TIMEOUT_S)
        rows = result.stdout.splitlines()
        return {name: int(code) for name, code in (row.split() for row in rows)}

    def take_down(self) -> None:
        """Containers, network and volumes go."""
        self.compose("down", "--volumes", "--remove-orphans")

    def leftovers(self) -> list[str]:
        """What Docker still has of this project: containers, volumes, networks."""
        found: list[str] = []
        for listing in (["ps", "--all"], ["volume", "ls"], ["network", "ls"]):
            command = ["docker", *listing, "--quiet", "--filter", f"label=com.docker.compose.project={self.project}"]
            result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMMAND_TIMEOUT_S)
            found += result.stdout.split()
        return found


@contextmanager
def compose_mesh() -> Iterator[ComposeMesh]:
    """Built, up and ready; taken down with its volumes, whatever happens inside."""
    mesh = ComposeMesh(project=f"moemesh-test-{os.getpid()}", port=free_port())
    mesh.compose("build", timeout_s=BUILD_TIMEOUT_S)
    try:
        mesh.compose("up", "-d", "--wait", "--no-build")
        assert mesh.is_ready(), "--wait waits for the mesh"
        yield mesh
    finally:
        mesh.take_down()


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
