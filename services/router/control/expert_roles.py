"""Which expert node is to hold which shards, as nodes come, load and go. Pure: returns actions, sends nothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from common.array import Uint8Array, array_to_frame
from common.endpoints import join_endpoints
from common.errors import CapacityError
from common.ids import NodeId
from common.messages import AssignShards, Header, PublishPlacement
from common.model_config import ModelConfig
from common.topology import NodeDescription, ShardId
from services.router.control.actions import Action, Tell
from services.router.control.draining import Draining
from services.router.control.eligibility import describe_unseen, unseen_experts
from services.router.control.placement import ExpertNodeCapacity, Placement, place_shards
from services.router.control.roll_out import Assignment, next_assignment
from services.router.control.sizes import MeshShape, shard_bytes

SETTLE_S = 1.0
"""Before the first placement: nodes that start together are placed together, so that nothing is loaded twice."""


class ExpertRoles:
    """Places shards. `num_expected` nodes are waited for (shortly) before the first placement."""

    def __init__(self, config: ModelConfig, shape: MeshShape, num_expected: int) -> None:
        self._config = config
        self._shape = shape
        self._num_expected = num_expected
        self._shards = [
            ShardId(layer, expert, piece)
            for layer in config.moe_layer_indices
            for expert in range(config.num_experts)
            for piece in range(shape.num_slices)
        ]
        self._shard_bytes = shard_bytes(config, shape)
        self._nodes: dict[NodeId, NodeDescription] = {}
        self._ready: dict[NodeId, frozenset[ShardId]] = {}
        self._told: dict[NodeId, frozenset[ShardId]] = {}
        self._target: Placement | None = None
        self._assignment: Assignment | None = None
        self._last_joined_s = 0.0
        self._must_place = False
        self._version = 0
        self._draining = Draining()
        self.has_news = False
        """Whether what may be asked has changed since `take_news`."""
        self._has_room = True
        """Whether all that somebody sees has a place."""
        self._unseen: tuple[int, ...] = ()
        """Experts whose weights no node sees that stays."""
        self.problem = ""
        """Why not every shard can be placed, as a sentence; empty if it can."""

    @property
    def version(self) -> int:
        """Of what was published last."""
        return self._version

    @property
    def is_served(self) -> bool:
        """Whether every shard has a node that can be asked."""
        return self._assignment is not None and not self._assignment.orphans()

    @property
    def num_shards(self) -> int:
        """Of the whole model."""
        return len(self._shards)

    @property
    def missing_copies(self) -> int:
        """Safety copies that are wished for and have no room or no node."""
        return self._target.missing_copies if self._target is not None else 0

    @property
    def detail(self) -> str:
        """What is served, as a sentence."""
        if self.problem:
            return self.problem
        if self._assignment is None:
            return f"{len(self._nodes)} of {self._num_expected} expert nodes"
        num_orphans = len(self._assignment.orphans())
        return f"{len(self._shards) - num_orphans} of {len(self._shards)} expert shards loaded"

    @property
    def ready(self) -> Mapping[NodeId, frozenset[ShardId]]:
        """What each node holds, by its own report."""
        return self._ready

    def join(self, description: NodeDescription, now_s: float, held: frozenset[ShardId] = frozenset()) -> list[Action]:
        """An expert node registered. One that reconnects is told anew; what it had ready it still has, since another
        process would have another id. `held`: what it has from a router before this one."""
        self._nodes[description.node_id] = description
        self._ready.setdefault(description.node_id, held)
        self._told.pop(description.node_id, None)
        self._last_joined_s = now_s
        self._must_place = True
        return self.tick(now_s)

    def drain(self, node_id: NodeId, now_s: float) -> list[Action]:
        """An expert node wants to stop: others are to hold what it holds. It is asked until they do; see `may_go`."""
        if node_id not in self._nodes or node_id in self._draining:
            return []
        self._draining.begin(node_id, now_s)
        self._must_place = True
        return self.tick(now_s)

    def may_go(self, now_s: float) -> list[NodeId]:
        """Nodes that wanted to stop and that nobody needs, or that cannot be waited for any longer: `lose` them."""
        owners = self._assignment.owners if self._assignment is not None else {}
        # Nobody can take over what nobody else sees.
        asked = {n for shard, nodes in owners.items() if shard.expert not in self._unseen for n in nodes}
        return self._draining.may_go(asked, not self._has_room or self._must_place, now_s)

    def lose(self, node_id: NodeId, now_s: float) -> list[Action]:
        """An expert node is gone."""
        self._draining.end(node_id)
        if self._nodes.pop(node_id, None) is None:
            return []
        self._ready.pop(node_id, None)
        self._told.pop(node_id, None)
        self._must_place = True
        return self.tick(now_s)

    def take_report(self, node_id: NodeId, held: frozenset[ShardId]) -> list[Action]:
        """A node says what it holds; the rollout goes on."""
        if node_id not in self._nodes:
            return []
        self._ready[node_id] = held
        return self._roll_on()

    def tick(self, now_s: float) -> list[Action]:
        """Place what nodes can hold, once those that are expected are there or have had time to come."""
        settled = self._target is not None or now_s - self._last_joined_s >= SETTLE_S
        if not self._must_place or not (settled or len(self._nodes) >= self._num_expected):
            return []
        self._must_place = False
        self._target = self._place()
        return self._roll_on()

    def _place(self) -> Placement:
        capacities = [
            ExpertNodeCapacity(
                node.node_id,
                node.host_label,
                node.capacity_bytes,
                node.numeric_class,
                None if node.part is None else node.part.experts,
            )
            for node in self._nodes.values()
            if node.node_id not in self._draining
        ]
        current = {node_id: self._told.get(node_id, held) for node_id, held in self._ready.items()}
        self._unseen = unseen_experts([node.experts for node in capacities], self._config.num_experts)
        seen = [shard for shard in self._shards if shard.expert not in self._unseen]
        # What is held goes on being served where nobody can take it over.
        holders = {shard: tuple(n for n in sorted(self._ready) if shard in self._ready[n]) for shard in self._shards}
        try:
            placed = place_shards(seen, self._shard_bytes, capacities, self._shape.copies, current)
        except CapacityError as error:
            self.problem, self._has_room = str(error), False
            return Placement(owners=holders, missing_copies=0)
        self.problem, self._has_room = describe_unseen(self._unseen) if self._unseen else "", True
        # What somebody sees is placed all the same: who sees the rest may come at any moment.
        missing = placed.missing_copies + self._shape.copies * (len(self._shards) - len(seen))
        return Placement({**holders, **placed.owners}, missing)

    def publish_to(self, stages: list[NodeId]) -> list[Action]:
        """The placement as it is, for stages that have just joined."""
        if self._assignment is None:
            return []
        message = self._published()
        return [Tell(node_id, message, Header()) for node_id in stages]

    def take_news(self, stages: list[NodeId]) -> list[Action]:
        """Publish to all stages what has changed."""
        self.has_news = False
        return self.publish_to(stages)

    def _roll_on(self) -> list[Action]:
        if self._target is None:
            return []
        capacity = {node.node_id: node.capacity_bytes for node in self._nodes.values()}
        told = {node_id: self._told.get(node_id, frozenset()) for node_id in self._nodes}
        before = self._assignment.owners if self._assignment is not None else None
        self._assignment = next_assignment(self._target, self._ready, told, capacity, self._shard_bytes)
        orphans = frozenset(self._assignment.orphans())
        actions: list[Action] = []
        for node_id, shards in self._assignment.shards.items():
            # One that leaves keeps what it has, so that calls that are under way to it are answered.
            if self._told.get(node_id) != shards and node_id not in self._draining:
                self._told[node_id] = shards
                message = AssignShards(self._version + 1, array_to_frame(self._bitmap(shards, orphans)))
                actions.append(Tell(node_id, message, Header()))
        if before != self._assignment.owners or actions:
            self._version += 1
            self.has_news = True
        return actions

    def _bitmap(self, shards: frozenset[ShardId], orphans: frozenset[ShardId]) -> Uint8Array:
        bitmap = np.zeros((self._config.num_layers, self._config.num_experts, self._shape.num_slices), dtype=np.uint8)
        for shard in shards:
            bitmap[shard] = 2 if shard in orphans else 1
        return bitmap

    def _published(self) -> PublishPlacement:
        assert self._assignment is not None
        nodes = sorted(self._nodes)
        numbers = {node_id: number for number, node_id in enumerate(nodes)}
        shape = (len(nodes), self._config.num_layers, self._config.num_experts, self._shape.num_slices)
        copies = np.zeros(shape, dtype=np.uint8)
        for shard, owners in self._assignment.owners.items():
            for place, node_id in enumerate(owners):
                copies[(numbers[node_id], *shard)] = min(255, 1 + place)
        described = [self._nodes[node_id] for node_id in nodes]
        return PublishPlacement(
            version=self._version,
            node_ids=tuple(nodes),
            incarnations=tuple(node.incarnation for node in described),
            endpoints=tuple(join_endpoints(node.endpoints) for node in described),
            ipc_tokens=tuple(node.ipc_token for node in described),
            numeric_classes=tuple(node.numeric_class for node in described),
            copies=array_to_frame(copies),
        )
