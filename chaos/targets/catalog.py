"""Targets by the name of `--target`. Nothing registers itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from chaos.target import Node, Target, TargetError
from chaos.targets.docker_target import DockerTarget, project_at
from chaos.targets.local_target import LocalTarget, ProxiedLocalTarget
from chaos.targets.played_hosts import HostsTarget

DEFAULT_PROJECT = "moemesh"


@dataclass(frozen=True, slots=True)
class RemoteTarget:
    """A deployment of which only the address is known: there are load and verdicts, and all faults are skipped."""

    url: str
    features: frozenset[str] = frozenset()

    def nodes(self) -> list[Node]:
        return []

    def signal(self, node: Node, number: int) -> None:
        raise self._refusal(node.name)

    def stop(self, node: Node, timeout_s: float) -> None:
        raise self._refusal(node.name)

    def start(self, name: str) -> None:
        raise self._refusal(name)

    def scale(self, kind: str, count: int) -> None:
        raise self._refusal(kind)

    def _refusal(self, name: str) -> TargetError:
        return TargetError(f"{name} cannot be reached: only {self.url} is known of this deployment")


def make_target(
    name: str, settings: Mapping[str, str], against: str, logs: Path, links: str = "direct", num_hosts: int = 0
) -> AbstractContextManager[Target]:
    """Makes the target of that name. Raises TargetError that names those that there are.

    `against` is the base URL of a deployment that runs already; empty: the target finds or starts one itself. One that
    is started has these settings, by their environment's names, and leaves its logs in the folder `logs`. With the
    links `proxy` they lead through the harness's proxy, and with `num_hosts` it runs on hosts that the harness plays.
    """
    match name:
        case "docker":
            # The project at the URL, else that of COMPOSE_PROJECT_NAME, else the one of compose.yaml.
            project = project_at(against) if against else os.environ.get("COMPOSE_PROJECT_NAME")
            return DockerTarget(project or DEFAULT_PROJECT)
        case "local" if against:
            return nullcontext(RemoteTarget(against.rstrip("/")))
        case "local" if num_hosts:
            return HostsTarget(settings, logs, num_hosts=num_hosts)
        case "local" if links == "proxy":
            return ProxiedLocalTarget(settings, logs)
        case "local":
            return LocalTarget(settings, logs)
        case _:
            raise TargetError(f"there is no target {name!r}; there are docker, local")
