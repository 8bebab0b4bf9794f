"""A placement as a question and its answer, computed in another process, and what of the answer still counts. Pure.

P shards in the order of (layer, expert, slice), H nodes that hold something, C copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.checkpoint.model_config import ModelConfig
from common.errors import CapacityError
from common.ids import NodeId
from common.topology import NodeDescription, ShardId
from common.wire.array import BoolArray, Int32Array
from services.router.control.experts.placement import ExpertNodeCapacity, place_shards
from services.router.control.experts.roll_out import PlacementTarget, aim
from services.router.control.experts.shard_bits import NOBODY, ShardBits, by_shard, pairs, stack, unpack
from services.router.control.sizes import MeshShape, shard_bytes

MAX_NAMED = 8
MAX_STALE_ANSWERS = 2
"""How many in a row: where nodes come and go all the time, a placement a little out of date is better than none."""


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """Everything that a placement depends on."""

    version: int
    shape: tuple[int, int, int]
    """Layers, experts of a layer, slices of an expert."""
    moe_layers: tuple[int, ...]
    shard_bytes: int
    copies: int
    nodes: tuple[ExpertNodeCapacity, ...]
    """Those that may be given shards."""
    holders: tuple[NodeId, ...]
    """Those that have some, or may have, in the order of their ids."""
    ready: ShardBits
    """[H, W]: what they hold."""
    told: ShardBits
    """[H, W]: what they were told to hold."""


@dataclass(frozen=True, slots=True)
class PlacementAnswer:
    """Who is to hold which shard."""

    version: int
    """The request's version."""
    node_ids: tuple[NodeId, ...]
    owners: Int32Array
    """[C, P]: 1 + index into `node_ids`, the primary first; 0: none."""
    missing_copies: int
    """Copies that were asked for and for which there is no room, or no further node."""
    unseen: tuple[int, ...]
    """Experts whose weights no node sees that may be given shards."""
    has_room: bool
    """Whether all that some node sees has a place."""
    problem: str
    """Why not every shard can be placed, as a sentence; empty if it can."""


def answer_request(request: PlacementRequest) -> PlacementAnswer:
    """Place all that some node sees. What is held goes on being served where no node can take it over."""
    num_layers, num_experts, num_slices = request.shape
    places = [
        ShardId(layer, expert, piece)
        for layer in request.moe_layers
        for expert in range(num_experts)
        for piece in range(num_slices)
    ]
    told = unpack(request.told, num_layers * num_experts * num_slices)
    unseen = unseen_experts([node.experts for node in request.nodes], num_experts)
    seen = [shard for shard in places if shard.expert not in unseen]
    current = {
        node_id: frozenset(ShardId(*place) for place in np.argwhere(row.reshape(request.shape)).tolist())
        for node_id, row in zip(request.holders, told, strict=True)
    }
    kept = keep_what_is_held(request, "", unseen)
    try:
        placed = place_shards(seen, request.shard_bytes, request.nodes, request.copies, current)
    except CapacityError as error:
        return replace(kept, problem=str(error))
    # What some node sees is placed all the same: a node that sees the rest may come at any moment.
    missing = placed.missing_copies + request.copies * (len(places) - len(seen))
    owners = _overwrite(kept.owners, placed.owners, kept.node_ids, request.shape)
    problem = describe_unseen(unseen) if unseen else ""
    return replace(kept, owners=owners, missing_copies=missing, has_room=True, problem=problem)


def keep_what_is_held(request: PlacementRequest, problem: str, unseen: tuple[int, ...] = ()) -> PlacementAnswer:
    """Where no placement can be had: every node keeps what it has, and people are told why."""
    node_ids = tuple(sorted({*request.holders, *(node.node_id for node in request.nodes)}))
    rows = np.array([0, *(1 + node_ids.index(node_id) for node_id in request.holders)], dtype=np.int32)
    num_layers, num_experts, num_slices = request.shape
    owners = rows[by_shard(*pairs(request.ready), num_layers * num_experts * num_slices) + 1]
    return PlacementAnswer(request.version, node_ids, owners, 0, unseen, has_room=False, problem=problem)


def unseen_experts(seen: Iterable[frozenset[int] | None], num_experts: int) -> tuple[int, ...]:
    """Returns experts whose weights no node sees; none where there are no nodes at all. `seen` by node; None: all."""
    parts = list(seen)
    if not parts or None in parts:
        return ()
    return tuple(sorted(set(range(num_experts)).difference(*(part for part in parts if part is not None))))


def describe_unseen(experts: Sequence[int]) -> str:
    """Says so as a sentence."""
    named = ", ".join(map(str, experts[:MAX_NAMED]))
    more = f" and {len(experts) - MAX_NAMED} more" if len(experts) > MAX_NAMED else ""
    return f"no expert node has the weights of {'expert' if len(experts) == 1 else 'experts'} {named}{more}"


def _overwrite(
    owners: Int32Array,
    placed: Mapping[ShardId, tuple[NodeId, ...]],
    node_ids: tuple[NodeId, ...],
    shape: tuple[int, int, int],
) -> Int32Array:
    numbers = {node_id: 1 + index for index, node_id in enumerate(node_ids)}
    depth = max(owners.shape[0], max((len(nodes) for nodes in placed.values()), default=0))
    table = np.zeros((depth, *shape), dtype=np.int32)
    table[: owners.shape[0]] = owners.reshape(-1, *shape)
    for shard, nodes in placed.items():
        table[:, shard.layer, shard.expert, shard.slice_index] = 0
        for place, node_id in enumerate(nodes):
            table[(place, *shard)] = numbers[node_id]
    return table.reshape(depth, -1)


class PlacementAim:
    """One request is answered at a time. An answer to a state that no longer holds is dropped and asked for again."""

    def __init__(self, config: ModelConfig, shape: MeshShape) -> None:
        self.table_shape = (config.num_layers, config.num_experts, shape.num_slices)
        self._moe_layers = tuple(config.moe_layer_indices)
        is_named = np.zeros(self.table_shape, dtype=np.bool_)
        is_named[list(self._moe_layers)] = True
        self.is_named: BoolArray = is_named.reshape(-1)
        """[P]: the shards of the MoE layers, of all that `table_shape` has room for."""
        self.shard_bytes = shard_bytes(config, shape)
        self._copies = shape.copies
        self.answer: PlacementAnswer | None = None
        """The placement that counts; None: none has come yet."""
        self._must_place = False
        self._requested: int | None = None
        """Version of the request that is being answered."""
        self._state_version = 0
        self._num_stale = 0

    @property
    def is_waited_for(self) -> bool:
        """Returns whether a placement is wanted that could not be asked for yet."""
        return self._must_place and self._requested is None

    def change(self) -> None:
        """Something that a placement depends on is different now."""
        self._state_version += 1
        self._must_place = True

    def pop_request(
        self, nodes: list[NodeDescription], ready: Mapping[NodeId, ShardBits], told: Mapping[NodeId, ShardBits]
    ) -> PlacementRequest | None:
        """Returns what is to be placed now, on `nodes`; None: nothing, or the last request is not answered yet."""
        if not self._must_place or self._requested is not None:
            return None
        self._must_place, self._requested = False, self._state_version
        holders = sorted(ready)
        return PlacementRequest(
            version=self._state_version,
            shape=self.table_shape,
            moe_layers=self._moe_layers,
            shard_bytes=self.shard_bytes,
            copies=self._copies,
            nodes=tuple(map(_capacity, nodes)),
            holders=tuple(holders),
            ready=stack([ready[node_id] for node_id in holders], self.is_named.size),
            told=stack([told.get(node_id, ready[node_id]) for node_id in holders], self.is_named.size),
        )

    def accept_answer(self, answer: PlacementAnswer) -> bool:
        """Returns False for one that is passed over."""
        if answer.version == self._requested:
            self._requested = None
        if answer.version != self._state_version and self._num_stale < MAX_STALE_ANSWERS:
            self._num_stale += 1
            return False
        self._num_stale = 0
        self.answer = answer
        return True

    def target(self, ready: Mapping[NodeId, ShardBits]) -> PlacementTarget:
        """Returns what the living nodes, those of `ready`, are to hold: before the first placement what they have."""
        nodes = sorted(ready)
        if self.answer is None:
            held = stack([ready[node_id] for node_id in nodes], self.is_named.size)
            return aim(by_shard(*pairs(held), self.is_named.size), len(nodes), self.is_named, is_settled=False)
        numbers = {node_id: number for number, node_id in enumerate(nodes)}
        rows = np.array([NOBODY, *(numbers.get(node_id, NOBODY) for node_id in self.answer.node_ids)], dtype=np.int32)
        owners = rows[self.answer.owners]
        return aim(owners, len(nodes), self.is_named, self.answer.version == self._state_version)


def _capacity(node: NodeDescription) -> ExpertNodeCapacity:
    return ExpertNodeCapacity(
        node.node_id,
        node.host_label,
        node.capacity_bytes,
        node.numeric_class,
        None if node.part is None else node.part.experts,
    )
