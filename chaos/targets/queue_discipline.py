"""How a node's network interfaces send: replaced by a slower or a later way with `tc`, and put back."""

from __future__ import annotations

from chaos.target import TargetError
from chaos.targets.host_commands import NetworkNamespace, run
from chaos.undo import UndoList


def replace_discipline(namespace: NetworkNamespace, undo: UndoList, *discipline: str) -> None:
    """On all interfaces but loopback; a discipline that was set before is not known and not put back."""
    for interface in namespace.interfaces():
        namespace.run("tc", "qdisc", "replace", "dev", interface, "root", *discipline)
        undo.add(namespace.run_if_there, "tc", "qdisc", "del", "dev", interface, "root")


def has_netem() -> bool:
    """Whether this kernel can delay packets; tried in a namespace that ends with the trial."""
    try:
        run(["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"])
    except TargetError:
        return False
    return True
