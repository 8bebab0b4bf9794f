"""A mesh in containers, found by the label that Compose gives them, on an engine of this machine.

Signals go to the process itself, from the host: what an engine kills it counts as stopped on purpose and does not
start again. A container that restarts keeps its name and address, and is another process.

Containers that were started with SOCKS_PROXY=HOST:PORT, an address of this machine that they reach, find the harness's
proxy there while it runs, and become a mesh only then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import docker
from docker.errors import DockerException, NotFound

from chaos.proxy.link_proxy import LinkProxy
from chaos.target import NODE_KINDS, Node, TargetError
from chaos.targets.host_commands import run

_LABEL = "com.docker.compose"
_NOT_A_SETTING = frozenset({"PATH", "HOME", "HOSTNAME", "HOST", "CONTROL", "STATE_DIR"})
COMPOSE_TIMEOUT_S = 120.0


class DockerTarget:
    """One compose project. Leaving the context leaves the containers as they are.

    Raises TargetError when there is no engine, and on entering when the project does not run.
    """

    def __init__(self, project: str) -> None:
        self.project = project
        self.features = frozenset({"processes", "containers", "netns"})
        self.proxy: LinkProxy | None = None
        self.client = _engine()

    def __enter__(self) -> Self:
        routers = self._containers("router")
        if not routers:
            self.client.close()
            raise TargetError(f"no router of the compose project {self.project!r} runs: `docker compose up -d --wait`")
        address = environment_of_container(routers[0]).get("SOCKS_PROXY", "")
        if address:
            names = ContainerNames(self._addresses)
            host, _, port = address.rpartition(":")
            self.proxy = LinkProxy(names.name_at, host, int(port), names.address_of).__enter__()
            self.features |= {"proxy"}
        return self

    def __exit__(self, *exception: object) -> None:
        if self.proxy is not None:
            self.proxy.__exit__()
        self.client.close()

    @cached_property
    def url(self) -> str:
        """It has the port that the router's container publishes; it is the same while that container is stopped."""
        for container in self._containers("router"):
            for binding in _published(container):
                host = binding.get("HostIp") or "127.0.0.1"
                return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{binding['HostPort']}"
        raise TargetError(f"the compose project {self.project!r} has no router that publishes a port")

    def nodes(self) -> list[Node]:
        """Returns the containers whose process runs; one that is starting or ending just now is left out."""
        found = []
        for kind in NODE_KINDS:
            for container in self._containers(kind):
                pid = process_of_container(int(container.attrs["State"].get("Pid") or 0))
                if pid:
                    found.append(Node(container.name, kind, pid, container.id))
        return sorted(found, key=lambda node: node.name)

    def signal(self, node: Node, number: int) -> None:
        """Sends it from the host; a process that is gone is not an error."""
        with suppress(ProcessLookupError):
            os.kill(node.pid, number)

    def stop(self, node: Node, timeout_s: float) -> None:
        """Does what `docker stop` does: the engine does not start it again."""
        self._call(node.name, "stop", timeout=max(1, round(timeout_s)))

    def start(self, name: str) -> None:
        """Does what `docker start` does: the same container has a new process."""
        self._call(name, "start")

    def scale(self, kind: str, count: int) -> None:
        """Has Compose do it, with the files and settings of the running containers; returns when they are up."""
        if kind not in ("stage", "expert"):
            raise TargetError(f"{kind} cannot be scaled: only stage and expert can")
        containers = self._containers(kind, is_running_only=False)
        if not containers:
            raise TargetError(f"{self.project!r} has no {kind} to learn the settings from")
        labels = containers[0].labels
        folder = Path(labels[f"{_LABEL}.project.working_dir"])
        files = [word for path in labels[f"{_LABEL}.project.config_files"].split(",") for word in ("-f", path)]
        command = ["docker", "compose", "-p", self.project, "--project-directory", str(folder), *files]
        command += ["up", "-d", "--no-deps", "--no-build", "--no-recreate", "--scale", f"{kind}={count}", kind]
        run(command, environment=os.environ | self._settings(containers[0]), timeout_s=COMPOSE_TIMEOUT_S)

    def pause(self, node: Node) -> None:
        """Does what `docker pause` does: all of the container's processes are frozen, its sockets stay."""
        self._call(node.name, "pause")

    def unpause(self, node: Node) -> None:
        """Undoes `pause`; a container that is not paused is not an error."""
        with suppress(NotFound):
            container = self.client.containers.get(node.name)
            if container.status == "paused":
                self._call(node.name, "unpause")

    # ---- inside

    def _settings(self, container: Any) -> dict[str, str]:
        found = environment_of_container(container)
        settings = {name: value for name, value in found.items() if name not in _NOT_A_SETTING}
        # Compose would take another published port for another router.
        return settings | {"PORT": self.url.rpartition(":")[2]}

    def _addresses(self) -> list[ContainerAddress]:
        found = []
        for kind in NODE_KINDS:
            for container in self._containers(kind):
                networks = container.attrs["NetworkSettings"]["Networks"].values()
                addresses = tuple(network["IPAddress"] for network in networks if network["IPAddress"])
                found.append(ContainerAddress(container.name, kind, addresses))
        return found

    def _containers(self, kind: str, is_running_only: bool = True) -> list[Any]:
        labels = [f"{_LABEL}.project={self.project}", f"{_LABEL}.service={kind}", f"{_LABEL}.oneoff=False"]
        try:
            # One may go between the listing and the look at it; that is not an error of ours.
            return list(
                self.client.containers.list(all=not is_running_only, filters={"label": labels}, ignore_removed=True)
            )
        except DockerException as error:
            raise TargetError(f"the Docker engine does not answer: {error}") from None

    def _call(self, name: str, action: str, **arguments: Any) -> None:
        try:
            getattr(self.client.containers.get(name), action)(**arguments)
        except NotFound:
            raise TargetError(f"there is no container {name}") from None
        except DockerException as error:
            raise TargetError(f"{action} of {name}: {error}") from None


@dataclass(frozen=True, slots=True)
class ContainerAddress:
    """The names and addresses of one container."""

    name: str
    service: str
    """Other containers call it so."""
    addresses: tuple[str, ...]


@dataclass(slots=True)
class ContainerNames:
    """Which container is behind an address of a compose network: containers keep name and address over restarts.

    The engine is asked again only about what is not known: it takes long for a link that comes up.
    """

    look_up: Callable[[], Sequence[ContainerAddress]]
    _known: list[ContainerAddress] = field(default_factory=list)

    def name_at(self, host: str, port: int) -> str:
        """Returns the container's name, or "" if there is none at this address."""
        return next((entry.name for entry in self._matching(lambda entry: host in entry.addresses)), "")

    def address_of(self, host: str) -> str:
        """Returns the address that a service's name stands for; other names and addresses stay as they are."""
        if host.replace(".", "").isdigit():
            return host
        found = self._matching(lambda entry: entry.service == host and bool(entry.addresses))
        return found[0].addresses[0] if found else host

    def _matching(self, fits: Callable[[ContainerAddress], bool]) -> list[ContainerAddress]:
        found = [entry for entry in self._known if fits(entry)]
        if not found:
            self._known = list(self.look_up())
            found = [entry for entry in self._known if fits(entry)]
        return found


def project_at(url: str) -> str:
    """Returns the compose project whose router publishes this URL's port. Raises TargetError."""
    port = str(urlsplit(url).port or 80)
    try:
        with closing(_engine()) as client:
            routers = client.containers.list(filters={"label": f"{_LABEL}.service=router"}, ignore_removed=True)
            for container in routers:
                if any(binding["HostPort"] == port for binding in _published(container)):
                    return str(container.labels[f"{_LABEL}.project"])
    except DockerException as error:
        raise TargetError(f"no Docker engine answers: {error}") from None
    raise TargetError(f"no router of a compose project publishes port {port}")


def _engine() -> docker.DockerClient:
    try:
        return docker.from_env()
    except DockerException as error:
        raise TargetError(f"no Docker engine answers: {error}") from None


def _published(container: Any) -> list[dict[str, str]]:
    """Returns the bindings of its ports to ports of this machine, as the engine tells them."""
    ports = container.attrs["HostConfig"].get("PortBindings") or {}
    return [binding for bindings in ports.values() for binding in bindings]


def environment_of_container(container: Any) -> dict[str, str]:
    """Returns the settings that its process is started with."""
    pairs = [entry.partition("=") for entry in container.attrs["Config"]["Env"] or ()]
    return {name: value for name, _, value in pairs}


def process_of_container(init: int) -> int:
    """Returns the service's own process: the child of the container's init or, without an init, the first process.

    It is 0 if there is none now.
    """
    if not init:
        return 0
    try:
        words = Path(f"/proc/{init}/cmdline").read_bytes().split(b"\0")
        children = Path(f"/proc/{init}/task/{init}/children").read_text().split()
    except OSError:
        return 0
    if Path(words[0].decode(errors="replace")).name not in ("docker-init", "tini"):
        return init
    return int(children[0]) if children else 0
