"""Links are half open: the victim's peers see every link of it end, while the victim believes that they are open and
hears nothing. New links work: it is over when the victim's own heartbeat notices, so there is nothing to heal."""

from __future__ import annotations

from collections.abc import Sequence

from chaos.faults.base import Fault
from chaos.proxy.link_proxy import link_proxy
from chaos.target import Node, Target, TargetError


class HalfClose(Fault):
    """Each victim loses, once, all links that it has at that moment."""

    name = "half_close"
    needs = frozenset({"proxy"})

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        proxy = link_proxy(target)
        untouched = [victim.name for victim in victims if proxy.half_close(victim.name) == 0]
        if untouched:
            raise TargetError(f"no link of {', '.join(untouched)} goes through the proxy")
