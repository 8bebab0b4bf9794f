"""Targets by the name of `--target`. One line per target; nothing registers itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from chaos.target import Node, Target, TargetError
from chaos.targets.docker_target import DockerTarget, project_at
from chaos.targets.local_target import LocalTarget, ProxiedLocalTarget
from chaos.targets.played_hosts import HostsTarget

DEFAULT_PROJECT = "moemesh"


@dataclass(frozen=True, slots=True)
class TargetRequest:
    """What a person has said about the target. `settings` come from the suite, by their environment's names."""

    settings: Mapping[str, str]
    against: str
    """Base URL of a deployment that runs already; empty: the target finds or starts one itself."""
    logs: Path
    """A target that is started for the run leaves its logs in this folder."""
    links: str = "direct"
    """With `proxy` a mesh that is started for the run has its links through the harness's proxy."""
    num_hosts: int = 0
    """The number of hosts that the harness plays for such a mesh; with 0 it runs on this machine alone."""


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


def make_local(request: TargetRequest) -> AbstractContextManager[Target]:
    """Makes a mesh of its own; with `against` none is started, and nothing can be hurt."""
    if request.against:
        return nullcontext(RemoteTarget(request.against.rstrip("/")))
    if request.num_hosts:
        return HostsTarget(request.settings, request.logs, num_hosts=request.num_hosts)
    made = ProxiedLocalTarget if request.links == "proxy" else LocalTarget
    return made(request.settings, request.logs)


def make_docker(request: TargetRequest) -> AbstractContextManager[Target]:
    """Finds the compose project at the URL, else that of COMPOSE_PROJECT_NAME, else the one of compose.yaml."""
    if request.against:
        return DockerTarget(project_at(request.against))
    return DockerTarget(os.environ.get("COMPOSE_PROJECT_NAME") or DEFAULT_PROJECT)


TARGETS: Mapping[str, Callable[[TargetRequest], AbstractContextManager[Target]]] = {
    "docker": make_docker,
    "local": make_local,
}


def make_target(name: str, request: TargetRequest) -> AbstractContextManager[Target]:
    """Makes the target of that name. Raises TargetError that names those that there are."""
    if name not in TARGETS:
        raise TargetError(f"there is no target {name!r}; there are {', '.join(TARGETS)}")
    return TARGETS[name](request)
