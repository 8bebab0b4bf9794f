"""What a node sends and what it is sent comes late. The proxy does that where links lead through it. Else netem does,
where the kernel has it, only on what the node sends and for twice as long: the same for a question and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from chaos.faults.base import Range
from chaos.faults.network import NetworkFault, NetworkNamespace, replace_discipline
from chaos.proxy.link_rules import LinkRule, around
from chaos.target import Node, Target, TargetError
from chaos.targets.host_commands import run


class Delay(NetworkFault):
    """All that comes to a victim or leaves it is `delay_ms` late, each way."""

    name = "delay"
    programs = ("nsenter", "tc", "ip", "unshare")
    delay_ms: Annotated[float, Range(0.1, 60_000)] = 50

    def uses_proxy(self, target: Target) -> bool:
        return "proxy" in target.features

    def unavailable(self, target: Target) -> str:
        if reason := super().unavailable(target):
            return reason
        return "" if self.uses_proxy(target) or _has_netem() else "this kernel has no netem"

    def rules(self, target: Target, victims: Sequence[Node]) -> list[LinkRule]:
        late = LinkRule(delay_ms=self.delay_ms)
        return [rule for victim in victims for rule in around(victim.name, late)]

    def apply_in_namespaces(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            namespace = NetworkNamespace(victim.pid)
            replace_discipline(namespace, self._undo, "netem", "delay", f"{2 * self.delay_ms:.1f}ms")


def _has_netem() -> bool:
    """Returns whether this kernel can delay packets; that is tried in a namespace which ends with the trial."""
    try:
        run(["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"])
    except TargetError:
        return False
    return True
