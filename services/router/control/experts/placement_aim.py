"""Which placement expert nodes are led to: what is asked for, what has come, and what is left of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from common.ids import NodeId
from common.topology import NodeDescription
from common.wire.array import BoolArray
from services.router.control.experts.placement import ExpertNodeCapacity
from services.router.control.experts.placing import PlacementAnswer, PlacementRequest, pack, who_holds
from services.router.control.experts.roll_out import NOBODY, Target, aim

MAX_STALE_ANSWERS = 2
"""In a row: where nodes come and go all the time, a placement that is a little out of date is better than none."""


class PlacementAim:
    """One request is answered at a time. An answer to a state that is no more is passed over, and asked for anew."""

    def __init__(
        self,
        table_shape: tuple[int, int, int],
        moe_layers: tuple[int, ...],
        is_named: BoolArray,
        shard_bytes: int,
        copies: int,
    ) -> None:
        """`is_named` [P]: the shards of the MoE layers, of all that `table_shape` has room for."""
        self._table_shape = table_shape
        self._moe_layers = moe_layers
        self._is_named = is_named
        self._shard_bytes = shard_bytes
        self._copies = copies
        self.answer: PlacementAnswer | None = None
        """The placement that counts; None: none has come yet."""
        self._must_place = False
        self._requested: int | None = None
        """Version of the request that is being answered."""
        self._state_version = 0
        self._num_stale = 0

    @property
    def is_waited_for(self) -> bool:
        """Whether a placement is wanted for which nobody could be asked yet."""
        return self._must_place and self._requested is None

    def change(self) -> None:
        """Something that a placement depends on is different now."""
        self._state_version += 1
        self._must_place = True

    def take_request(
        self, nodes: list[NodeDescription], ready: Mapping[NodeId, BoolArray], told: Mapping[NodeId, BoolArray]
    ) -> PlacementRequest | None:
        """What is to be placed now, on `nodes`; None: nothing, or the last request is not answered yet."""
        if not self._must_place or self._requested is not None:
            return None
        self._must_place, self._requested = False, self._state_version
        holders = sorted(ready)
        return PlacementRequest(
            version=self._state_version,
            shape=self._table_shape,
            moe_layers=self._moe_layers,
            shard_bytes=self._shard_bytes,
            copies=self._copies,
            nodes=tuple(map(_capacity, nodes)),
            holders=tuple(holders),
            ready=pack([ready[node_id] for node_id in holders], self._is_named.size),
            told=pack([told.get(node_id, ready[node_id]) for node_id in holders], self._is_named.size),
        )

    def take_answer(self, answer: PlacementAnswer) -> bool:
        """False for one that is passed over."""
        if answer.version == self._requested:
            self._requested = None
        if answer.version != self._state_version and self._num_stale < MAX_STALE_ANSWERS:
            self._num_stale += 1
            return False
        self._num_stale = 0
        self.answer = answer
        return True

    def target(self, ready: Mapping[NodeId, BoolArray]) -> Target:
        """For the nodes of `ready`, who live; before the first placement, that they keep what they have."""
        nodes = sorted(ready)
        if self.answer is None:
            owners = who_holds([ready[node_id] for node_id in nodes], self._is_named.size)
            return aim(owners, len(nodes), self._is_named, is_settled=False)
        numbers = {node_id: number for number, node_id in enumerate(nodes)}
        rows = np.array([NOBODY, *(numbers.get(node_id, NOBODY) for node_id in self.answer.node_ids)])
        owners = rows[self.answer.owners]
        return aim(owners, len(nodes), self._is_named, self.answer.version == self._state_version)


def _capacity(node: NodeDescription) -> ExpertNodeCapacity:
    return ExpertNodeCapacity(
        node.node_id,
        node.host_label,
        node.capacity_bytes,
        node.numeric_class,
        None if node.part is None else node.part.experts,
    )
