"""A host loses its power: its link and all its processes go in one moment, without a word. Healed, it is back."""

from __future__ import annotations

from collections.abc import Sequence

from chaos.faults.base import Fault
from chaos.target import Node, Target, TargetError
from chaos.targets.played_hosts import hosts_of


class HostLoss(Fault):
    """The hosts of all victims are lost; with the victim rule `host` the victims are all that run on one."""

    name = "host_loss"
    needs = frozenset({"hosts"})

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        hosts = hosts_of(target)
        lost = {victim.host for victim in victims}
        if "" in lost:
            raise TargetError("a victim runs on no played host: only stages and experts can lose theirs")
        numbers = sorted(map(int, lost))
        for number in numbers:
            # The link first: from a process that ends without power there is neither a goodbye nor a closed socket.
            self._undo.add(hosts.plug_in, number)
            hosts.unplug(number)
        for node in target.nodes():
            if node.host in lost:
                self._undo.add(target.start, node.name)
                target.stop(node, 0.0)
        for number in numbers:
            # What was added last is undone first: processes start on a host that is reached.
            self._undo.add(hosts.plug_in, number)
