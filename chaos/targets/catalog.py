"""Targets by the name of `--target`. One line a target; nothing registers itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from chaos.target import Target, TargetError
from chaos.targets.docker_target import DockerTarget, project_at
from chaos.targets.hosts_target import HostsTarget
from chaos.targets.local_target import LocalTarget
from chaos.targets.proxied_local_target import ProxiedLocalTarget
from chaos.targets.remote_target import RemoteTarget

DEFAULT_PROJECT = "moemesh"


@dataclass(frozen=True, slots=True)
class TargetRequest:
    """What a person has said about the target. `settings` come from the suite, by their environment's names."""

    settings: Mapping[str, str]
    against: str
    """Base URL of a deployment that runs already; empty: the target finds or starts one itself."""
    logs: Path
    """Where a target that was started for the run leaves its logs."""
    links: str = "direct"
    """`proxy`: a mesh that is started for the run has its links through the harness's proxy."""
    num_hosts: int = 0
    """Such a mesh runs on so many hosts that the harness plays; 0: on this machine alone."""


TargetMaker = Callable[[TargetRequest], AbstractContextManager[Target]]


def make_local(request: TargetRequest) -> AbstractContextManager[Target]:
    """A mesh of its own; with `against` none is started, and nothing can be hurt."""
    if request.against:
        return RemoteTarget(request.against.rstrip("/"))
    if request.num_hosts:
        return HostsTarget(request.settings, request.logs, num_hosts=request.num_hosts)
    made = ProxiedLocalTarget if request.links == "proxy" else LocalTarget
    return made(request.settings, request.logs)


def make_docker(request: TargetRequest) -> AbstractContextManager[Target]:
    """The compose project at the URL, else that of COMPOSE_PROJECT_NAME, else the one of compose.yaml, as it runs."""
    if request.against:
        return DockerTarget(project_at(request.against))
    return DockerTarget(os.environ.get("COMPOSE_PROJECT_NAME") or DEFAULT_PROJECT)


TARGETS: Mapping[str, TargetMaker] = {"docker": make_docker, "local": make_local}


def make_target(name: str, request: TargetRequest) -> AbstractContextManager[Target]:
    """Raises TargetError that names what there is."""
    if name not in TARGETS:
        raise TargetError(f"there is no target {name!r}; there are {', '.join(TARGETS)}")
    return TARGETS[name](request)
