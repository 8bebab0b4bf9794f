"""The power of a host goes: its link and all its processes in one moment, and nobody is told. Healed, it is back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chaos.faults.parameters import Parameters
from chaos.target import Node, Target, TargetError
from chaos.targets.played_hosts import hosts_of
from chaos.undo import UndoList


class HostLoss:
    """The hosts of all victims; with the victim rule `host` the victims are all who run on one."""

    name = "host_loss"
    needs = frozenset({"hosts"})

    def __init__(self) -> None:
        self._undo = UndoList()

    def unavailable(self, target: Target) -> str:
        return ""  # a target that has hosts could make them

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        hosts = hosts_of(target)
        lost = {victim.host for victim in victims}
        if "" in lost:
            raise TargetError("a victim runs on no played host: only stages and experts can lose theirs")
        for host in sorted(lost):
            # The link first: of a process that ends without power nobody hears, neither a goodbye nor a closed socket.
            self._undo.add(hosts.plug_in, int(host))
            hosts.unplug(int(host))
        for node in target.nodes():
            if node.host in lost:
                self._undo.add(target.start, node.name)
                target.stop(node, 0.0)
        for host in sorted(
            lost
        ):  # once more, as the last step is undone first: processes start on a host that is reached
            self._undo.add(hosts.plug_in, int(host))

    def heal(self, target: Target) -> None:
        self._undo.run()


def make_host_loss(parameters: Mapping[str, Any]) -> HostLoss:
    """No parameters."""
    Parameters(parameters).done()
    return HostLoss()
