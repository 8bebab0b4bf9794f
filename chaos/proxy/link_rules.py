"""What is done to the bytes between two nodes, and what several such rules come to together. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from chaos.proxy.zmtp_frames import FrameRule

ANYBODY = ""
"""This in place of a node's name means any node."""


@dataclass(frozen=True, slots=True)
class LinkRule:
    """It holds for bytes from `source` to `destination`, whichever of them opened the connection."""

    source: str = ANYBODY
    destination: str = ANYBODY
    delay_ms: float = 0.0
    bytes_per_s: float = 0.0
    """0 means no limit."""
    is_stalled: bool = False
    """Nothing arrives, nothing is lost: what was on its way arrives when the rule is gone."""
    frames: tuple[FrameRule, ...] = ()

    def holds_for(self, source: str, destination: str) -> bool:
        """Returns whether it speaks of this direction."""
        return self.source in (ANYBODY, source) and self.destination in (ANYBODY, destination)


def combined(rules: Iterable[LinkRule], source: str, destination: str) -> LinkRule:
    """Returns the one rule that all rules for a direction come to together.

    Delays add up, the smallest bandwidth counts, one stall is enough, damages follow each other.
    """
    found = [rule for rule in rules if rule.holds_for(source, destination)]
    return LinkRule(
        source,
        destination,
        delay_ms=sum(rule.delay_ms for rule in found),
        bytes_per_s=min((rule.bytes_per_s for rule in found if rule.bytes_per_s), default=0.0),
        is_stalled=any(rule.is_stalled for rule in found),
        frames=tuple(damage for rule in found for damage in rule.frames),
    )


def around(node: str, rule: LinkRule) -> list[LinkRule]:
    """Returns the same rule for all that comes to a node and all that leaves it."""
    return [replace(rule, source=node), replace(rule, destination=node)]
