"""Slots that nodes could not take though they should have been able to: others are asked first. Pure."""

from __future__ import annotations

from collections.abc import Collection

from common.ids import NodeId


class Unable:
    """By node, the indexes of such slots. Its disk may have failed: where nobody else is left, it is asked again."""

    def __init__(self) -> None:
        self._slots: dict[NodeId, set[int]] = {}
        self._refused: dict[NodeId, int] = {}

    def note(self, node_id: NodeId, index: int, number: int) -> bool:
        """It could not take the role of this number; False: that was said before."""
        is_news = self._refused.get(node_id) != number
        self._refused[node_id] = number
        if is_news:
            self._slots.setdefault(node_id, set()).add(index)
        return is_news

    def of(self, node_id: NodeId) -> Collection[int]:
        """What it is not asked to take."""
        return self._slots.get(node_id, ())

    def forgive(self, indexes: Collection[int]) -> bool:
        """Nobody else can take these. False: nobody was left out of them."""
        forgiven = [slots for slots in self._slots.values() if not slots.isdisjoint(indexes)]
        for slots in forgiven:
            slots.difference_update(indexes)
        return bool(forgiven)

    def forget(self, node_id: NodeId) -> None:
        """It is gone; one that has refused nothing is no error."""
        self._slots.pop(node_id, None)
        self._refused.pop(node_id, None)
