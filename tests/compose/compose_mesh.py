"""One mesh in containers, under a project name and on a port of its own, gone when the tests end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

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
        """As a person does it, here for `stage` and `expert`."""
        flags = [word for service, number in replicas.items() for word in ("--scale", f"{service}={number}")]
        self.compose("up", "-d", "--wait", "--no-build", *flags)

    def wait_until_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Returns when /ready says so; raises AssertionError with its last detail."""
        deadline = time.monotonic() + timeout_s
        detail = "no answer"
        while time.monotonic() < deadline:
            try:
                response = httpx.get(f"{self.url}/ready", timeout=5, trust_env=False)
                detail = response.text
                if response.status_code == 200:
                    return
            except httpx.HTTPError as error:
                detail = repr(error)
            time.sleep(0.2)
        raise AssertionError(f"not ready after {timeout_s:.0f} s: {detail}\n{self.logs()}")

    def logs(self, lines: int = 40) -> str:
        """The last lines of every container."""
        return self.compose("logs", "--no-color", "--tail", str(lines))

    def exit_codes(self) -> dict[str, int]:
        """Of all containers that have ended, by name."""
        rows = self.compose("ps", "--all", "--format", "json").splitlines()
        containers = [json.loads(row) for row in rows if row]
        return {row["Name"]: int(row["ExitCode"]) for row in containers if row["State"] == "exited"}


@contextmanager
def compose_mesh() -> Iterator[ComposeMesh]:
    """Built, up and ready; taken down with its volumes, whatever happens inside."""
    mesh = ComposeMesh(project=f"moemesh-test-{os.getpid()}", port=_free_port())
    mesh.compose("build", timeout_s=BUILD_TIMEOUT_S)
    try:
        mesh.compose("up", "-d", "--wait", "--no-build")
        mesh.wait_until_ready()
        yield mesh
    finally:
        mesh.compose("down", "--volumes", "--remove-orphans")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
