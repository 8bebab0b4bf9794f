"""When an expert node that wants to stop may go. Pure; times are arguments."""

from __future__ import annotations

from dataclasses import dataclass

from common.ids import NodeId

DRAIN_DEADLINE_S = 12.0
"""Below the 15 s after which a node goes without being let go."""
DRAIN_QUIET_S = 0.25
"""After the stages were told to ask others: their last calls are answered by then."""


@dataclass(slots=True)
class _Leaving:
    since_s: float
    quiet_since_s: float | None = None
    """Since when no stage is told to ask it; None: some are."""


class Draining:
    """Nodes that leave: they are asked until others hold what they hold, or until their time is up."""

    def __init__(self) -> None:
        self._leaving: dict[NodeId, _Leaving] = {}

    def __bool__(self) -> bool:
        return bool(self._leaving)

    def __contains__(self, node_id: NodeId) -> bool:
        return node_id in self._leaving

    def begin(self, node_id: NodeId, now_s: float) -> None:
        """It wants to go. Said again it changes nothing."""
        self._leaving.setdefault(node_id, _Leaving(now_s))

    def end(self, node_id: NodeId) -> None:
        """It is gone."""
        self._leaving.pop(node_id, None)

    def may_go(self, asked: set[NodeId], is_hopeless: bool, now_s: float) -> list[NodeId]:
        """Who need not be waited for any more, by id.

        `asked` are the nodes that calls are sent to. `is_hopeless`: those who stay cannot take everything over, so that
        waiting longer changes nothing.
        """
        free = []
        for node_id, leaving in sorted(self._leaving.items()):
            if node_id in asked:
                leaving.quiet_since_s = None
            elif leaving.quiet_since_s is None:
                leaving.quiet_since_s = now_s
            quiet = leaving.quiet_since_s is not None and now_s - leaving.quiet_since_s >= DRAIN_QUIET_S
            if is_hopeless or quiet or now_s - leaving.since_s >= DRAIN_DEADLINE_S:
                free.append(node_id)
        return free
