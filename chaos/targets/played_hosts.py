"""Hosts played by network namespaces of this machine, on one bridge, so that one can be lost as a whole, and a mesh on
them: stages and experts in the namespaces, the router on this machine itself.

The bridge lies in a namespace of its own: in this machine's, its packet filter would decide what hosts may say. Needs
root and `ip`. Traffic goes to these namespaces and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from chaos.target import Node, Target, TargetError
from chaos.targets.host_commands import missing, run
from chaos.targets.local_target import LocalTarget, free_port
from chaos.targets.on_host import NAMESPACE_VARIABLE, NAMESPACES

PREFIX = "moemesh-chaos"
SERVICES = ("stage", "expert")
MAX_NODES_OF_A_KIND = 64
_NODE = re.compile(r"(?:stage|expert)-(\d+)")
_OWN_HOST_NUMBER = 254
_MAX_HOSTS = 200


class PlayedHosts:
    """Entering makes `count` hosts, numbered from 0, which this machine reaches; leaving removes them."""

    def __init__(self, count: int) -> None:
        if not 1 <= count <= _MAX_HOSTS:
            raise TargetError(f"{count} hosts cannot be played; 1 to {_MAX_HOSTS} can")
        self.count = count
        self._switch = f"{PREFIX}-{os.getpid()}-switch"
        self._own_link = _own_link(os.getpid())
        self._network = ""

    def __enter__(self) -> Self:
        if reason := missing("ip"):
            raise TargetError(f"hosts cannot be played: {reason}")
        remove_left_over()
        self._network = free_network(run(["ip", "-j", "-4", "address", "show"]))
        try:
            self._make()
        except TargetError:
            self._remove()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._remove()

    @property
    def own_address(self) -> str:
        """Hosts reach this machine at it."""
        return f"{self._network}.{_OWN_HOST_NUMBER}"

    def address(self, number: int) -> str:
        """Returns the address at which the others reach a host."""
        return f"{self._network}.{number + 1}"

    def namespace(self, number: int) -> str:
        """Returns the name of a host's network namespace."""
        return f"{PREFIX}-{os.getpid()}-host-{number}"

    def unplug(self, number: int) -> None:
        """Takes a host's link away: nothing from it arrives anywhere, and nothing arrives at it."""
        run(["ip", "-n", self._switch, "link", "set", f"host{number}", "down"])

    def plug_in(self, number: int) -> None:
        """Undoes `unplug`; a host that has its link keeps it."""
        run(["ip", "-n", self._switch, "link", "set", f"host{number}", "up"])

    def _make(self) -> None:
        run(["ip", "netns", "add", self._switch])
        _configure(self._switch, "link add bridge type bridge", "link set bridge up")
        run(["ip", "link", "add", self._own_link, "type", "veth", "peer", "name", "own", "netns", self._switch])
        run(["ip", "address", "add", f"{self.own_address}/24", "dev", self._own_link])
        run(["ip", "link", "set", self._own_link, "up"])
        _configure(self._switch, "link set own master bridge", "link set own up")
        for number in range(self.count):
            name, port = self.namespace(number), f"host{number}"
            run(["ip", "netns", "add", name])
            _configure(name, f"link add eth0 type veth peer name {port} netns {self._switch}")
            _configure(name, f"address add {self.address(number)}/24 dev eth0", "link set lo up", "link set eth0 up")
            _configure(self._switch, f"link set {port} master bridge", f"link set {port} up")

    def _remove(self) -> None:
        _delete_link(self._own_link)
        for name in (self._switch, *(self.namespace(number) for number in range(self.count))):
            with contextlib.suppress(TargetError):  # it was not made yet
                run(["ip", "netns", "delete", name])


def _configure(namespace: str, *commands: str) -> None:
    for command in commands:
        run(["ip", "-n", namespace, *command.split()])


def _own_link(pid: int | str) -> str:
    """Returns the name of the link by which this machine reaches the hosts that a process plays."""
    return f"mm{pid}"


def _delete_link(name: str) -> None:
    """Deletes a link, with its other end, if there is one. With the namespace of its other end it would go as well, but
    some time later, and its name could not be given again meanwhile."""
    with contextlib.suppress(TargetError):
        run(["ip", "link", "delete", name])


def remove_left_over(folder: Path = NAMESPACES) -> None:
    """Deletes links and namespaces of harnesses that were killed."""
    for path in sorted(folder.glob(f"{PREFIX}-*")) if folder.is_dir() else ():
        pid = path.name.removeprefix(f"{PREFIX}-").partition("-")[0]
        if not Path("/proc", pid).exists():
            _delete_link(_own_link(pid))
            run(["ip", "netns", "delete", path.name])


def free_network(addresses: str) -> str:
    """Returns the first three numbers of a /24 that no link of this machine is in.

    `addresses` is the text of `ip -j -4 address show`.

    Raises TargetError where all are in use.
    """
    used = {str(entry["local"]).rpartition(".")[0] for link in json.loads(addresses) for entry in link["addr_info"]}
    for number in range(256):
        if (network := f"10.213.{number}") not in used:
            return network
    raise TargetError("no network of 10.213.0.0/16 is free for played hosts")


@dataclass
class HostsTarget(LocalTarget):
    """As LocalTarget, but with links over TCP between `num_hosts` hosts, each of which can be lost.

    Stage and expert number n are on host n modulo `num_hosts`; each host has a state folder of its own, so that no
    two share Unix sockets.
    """

    num_hosts: int = 3
    features: frozenset[str] = field(default=frozenset({"processes", "hosts"}))
    hosts: PlayedHosts | None = None

    def enter_surroundings(self, stack: ExitStack) -> Mapping[str, str]:
        self.hosts = stack.enter_context(PlayedHosts(self.num_hosts))
        address = self.hosts.own_address
        return {"CONTROL": f"tcp://{address}:{free_port()}", "ADVERTISE_HOST": address}

    def modules_run(self) -> Mapping[str, str]:
        modules = {service: self.modules.get(service, f"services.{service}") for service in SERVICES}
        return {**self.modules, **{name: f"chaos.targets.on_host {module}" for name, module in modules.items()}}

    def places(self) -> Mapping[str, Mapping[str, str]]:
        names = (f"{service}-{number}" for service in SERVICES for number in range(MAX_NODES_OF_A_KIND))
        return {name: self._place(int(self._host_of(name))) for name in names}

    def nodes(self) -> list[Node]:
        return [replace(node, host=self._host_of(node.name)) for node in super().nodes()]

    def _place(self, number: int) -> Mapping[str, str]:
        assert self.hosts is not None, "places are asked for while the mesh is started"
        assert self.state_dir is not None, "places are asked for while the mesh is started"
        return {
            "HOST_LABEL": f"host-{number}",
            "STATE_DIR": str(self.state_dir / f"host-{number}"),
            "ADVERTISE_HOST": self.hosts.address(number),
            NAMESPACE_VARIABLE: self.hosts.namespace(number),
        }

    def _host_of(self, name: str) -> str:
        found = _NODE.fullmatch(name)
        return str(int(found[1]) % self.num_hosts) if found else ""


def hosts_of(target: Target) -> PlayedHosts:
    """Returns a target's played hosts. Raises TargetError where it has none."""
    hosts = getattr(target, "hosts", None)
    if not isinstance(hosts, PlayedHosts):
        raise TargetError("this target plays no hosts")
    return hosts
