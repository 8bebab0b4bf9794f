"""Slots, lease terms and generations of all pipelines as nodes come and go. Pure: returns actions, sends nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from common.errors import CapacityError
from common.ids import Generation, LeaseTerm, NodeId, PipelineId, SlotIndex
from common.messages import AssignStage, Header, StageReady, Unassign
from common.model_config import ModelConfig
from common.topology import NodeDescription, StageSlot
from services.router.control.actions import Action, ClosePipeline, OpenPipeline, Tell
from services.router.control.roles import ObservedStage, plan_roles
from services.router.control.sizes import MeshShape, plan_layers, pool_blocks


@dataclass(slots=True)
class Pipeline:
    """One pipeline's holders in one generation."""

    generation: Generation
    holders: tuple[NodeId, ...]
    num_blocks: int
    ready: set[int] = field(default_factory=set)
    is_open: bool = False


class StageRoles:
    """Assigns slots. `results_endpoints` is where last stages send their results."""

    def __init__(
        self, config: ModelConfig, shape: MeshShape, results_endpoints: tuple[str, ...], results_ipc_token: str
    ) -> None:
        self.layers = plan_layers(config, shape)
        self._config = config
        self._shape = shape
        self._results = results_endpoints, results_ipc_token
        self._nodes: dict[NodeId, tuple[NodeDescription, int]] = {}
        self._num_joined = 0
        self._pipelines: dict[PipelineId, Pipeline] = {}
        self._lease_terms: dict[StageSlot, LeaseTerm] = {}
        self._last_generation = 0
        """One count for all pipelines: a step of another pipeline, too, is told by its generation."""
        self.detail = f"0 of {shape.pp} stage nodes"

    @property
    def pipelines(self) -> Mapping[PipelineId, Pipeline]:
        """As they are now."""
        return self._pipelines

    @property
    def num_open(self) -> int:
        """Pipelines that take steps."""
        return sum(pipeline.is_open for pipeline in self._pipelines.values())

    def slot_of(self, node_id: NodeId) -> StageSlot | None:
        """The slot that a node holds, or None for a spare."""
        for pipeline_id, pipeline in self._pipelines.items():
            if node_id in pipeline.holders:
                return StageSlot(pipeline_id, SlotIndex(pipeline.holders.index(node_id)))
        return None

    def join(self, description: NodeDescription) -> list[Action]:
        """A stage node registered (again: a node that reconnects is told its slot anew)."""
        node_id = description.node_id
        slot = self.slot_of(node_id)
        if node_id not in self._nodes:
            self._num_joined += 1
        self._nodes[node_id] = (description, self._num_joined)
        return self._replan() + (self.renew(slot.pipeline) if slot is not None else [])

    def lose(self, node_id: NodeId) -> list[Action]:
        """A stage node is gone or leaves."""
        if self._nodes.pop(node_id, None) is None:
            return []
        return self._replan()

    def renew(self, pipeline_id: PipelineId) -> list[Action]:
        """Give a pipeline a new generation with the same holders: what it had in flight is void."""
        pipeline = self._pipelines.get(pipeline_id)
        if pipeline is None:
            return []
        return self._assign(pipeline_id, pipeline.holders)

    def take_ready(self, node_id: NodeId, message: StageReady, generation: int) -> list[Action]:
        """A stage is ready for a slot; the pipeline opens with the last of them. Stale reports change nothing."""
        pipeline = self._pipelines.get(PipelineId(message.pipeline))
        if pipeline is None or pipeline.generation != generation or pipeline.is_open:
            return []
        if message.slot >= len(pipeline.holders) or pipeline.holders[message.slot] != node_id:
            return []
        pipeline.ready.add(message.slot)
        if len(pipeline.ready) < len(pipeline.holders):
            return []
        pipeline.is_open = True
        return [
            OpenPipeline(
                PipelineId(message.pipeline),
                pipeline.generation,
                pipeline.holders[0],
                pipeline.num_blocks,
                len(pipeline.holders),
            )
        ]

    def _replan(self, too_small: Set[NodeId] = frozenset()) -> list[Action]:
        """Roles for all nodes but those that turned out too small for the slot that they would have got."""
        observed = [
            ObservedStage(node_id, description.numeric_class, order)
            for node_id, (description, order) in self._nodes.items()
            if node_id not in too_small
        ]
        current = {
            StageSlot(pipeline_id, SlotIndex(index)): node_id
            for pipeline_id, pipeline in self._pipelines.items()
            for index, node_id in enumerate(pipeline.holders)
        }
        plan = plan_roles(observed, current, self._shape.pp, self._shape.spares)
        self.detail = plan.detail
        wanted: dict[PipelineId, list[NodeId]] = {}
        for slot, node_id in plan.assignments.items():
            wanted.setdefault(slot.pipeline, []).append(node_id)
        actions: list[Action] = []
        for pipeline_id in [p for p in self._pipelines if p not in wanted]:
            actions += self._dissolve(pipeline_id)
        for slot, node_id in current.items():
            if node_id in plan.spares:
                actions.append(Tell(node_id, Unassign(self._lease_terms[slot]), Header()))
        misfits: dict[NodeId, str] = {}
        for pipeline_id, holders in wanted.items():
            pipeline = self._pipelines.get(pipeline_id)
            if pipeline is not None and pipeline.holders == tuple(holders):
                continue
            found = self._misfits(holders)
            misfits |= found
            actions += self._give_up(pipeline_id) if found else self._assign(pipeline_id, tuple(holders))
        if misfits:
            actions += self._replan(too_small | misfits.keys())
            self.detail += f"; {', '.join(f'{node_id}: {reason}' for node_id, reason in misfits.items())}"
        return actions

    def _misfits(self, holders: Sequence[NodeId]) -> dict[NodeId, str]:
        """Nodes that have no room for the slot that they would hold, and how much is missing."""
        found: dict[NodeId, str] = {}
        for slot, node_id in enumerate(holders):
            capacities = [sys.maxsize] * len(holders)
            capacities[slot] = self._nodes[node_id][0].capacity_bytes
            try:
                pool_blocks(self._config, self._shape, self.layers, capacities)
            except CapacityError as error:
                found[node_id] = str(error)
        return found

    def _dissolve(self, pipeline_id: PipelineId) -> list[Action]:
        was_open = self._pipelines.pop(pipeline_id).is_open
        return [ClosePipeline(pipeline_id)] if was_open else []

    def _give_up(self, pipeline_id: PipelineId) -> list[Action]:
        """No node fits a hole of this pipeline; its holders are free for another."""
        pipeline = self._pipelines.get(pipeline_id)
        if pipeline is None:
            return []
        slots = [(node_id, StageSlot(pipeline_id, SlotIndex(index))) for index, node_id in enumerate(pipeline.holders)]
        return self._dissolve(pipeline_id) + [
            Tell(node_id, Unassign(self._lease_terms[slot]), Header())
            for node_id, slot in slots
            if node_id in self._nodes
        ]

    def _assign(self, pipeline_id: PipelineId, holders: tuple[NodeId, ...]) -> list[Action]:
        """A new generation. A slot that changes hands gets a new lease term."""
        before = self._pipelines.get(pipeline_id)
        actions: list[Action] = [ClosePipeline(pipeline_id)] if before is not None and before.is_open else []
        self._last_generation += 1
        generation = Generation(self._last_generation)
        capacities = [self._nodes[node_id][0].capacity_bytes for node_id in holders]
        num_blocks = pool_blocks(self._config, self._shape, self.layers, capacities)
        self._pipelines[pipeline_id] = Pipeline(generation, holders, num_blocks)
        for index, node_id in enumerate(holders):
            slot = StageSlot(pipeline_id, SlotIndex(index))
            if before is None or index >= len(before.holders) or before.holders[index] != node_id:
                self._lease_terms[slot] = LeaseTerm(self._lease_terms.get(slot, 0) + 1)
            actions.append(Tell(node_id, self._assignment(slot, holders, num_blocks), Header(generation=generation)))
        return actions

    def _assignment(self, slot: StageSlot, holders: tuple[NodeId, ...], num_blocks: int) -> AssignStage:
        is_last = slot.index == len(holders) - 1
        downstream = self._results
        if not is_last:
            following = self._nodes[holders[slot.index + 1]][0]
            downstream = following.endpoints, following.ipc_token
        return AssignStage(
            pipeline=slot.pipeline,
            slot=slot.index,
            num_slots=len(holders),
            first_layer=self.layers[slot.index].start,
            stop_layer=self.layers[slot.index].stop,
            lease_term=self._lease_terms[slot],
            num_blocks=num_blocks,
            downstream=downstream[0],
            downstream_ipc_token=downstream[1],
        )
