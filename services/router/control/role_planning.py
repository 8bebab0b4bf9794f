"""Roles for the stage nodes that can take them: others get one only where nobody else can. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.checkpoint.model_config import ModelConfig
from common.ids import NodeId, PipelineId, SlotIndex
from common.topology import LayerRange, StageSlot
from services.router.control.eligibility import loadable_slots
from services.router.control.mirror_roles import Nodes
from services.router.control.roles import ObservedStage, RolePlan, plan_roles
from services.router.control.sizes import MeshShape, too_small
from services.router.control.unable import Unable

Misfits = dict[tuple[NodeId, int], str]
"""Nodes that have no room for a slot, with its index, and how much is missing."""


class RolePlanning:
    """Plans until nobody is named for a slot that it has no room for. Nothing is told before that."""

    def __init__(self, config: ModelConfig, shape: MeshShape, layers: Sequence[LayerRange]) -> None:
        self._config = config
        self._shape = shape
        self._layers = layers
        self.unable = Unable()

    def plan(
        self,
        nodes: Nodes,
        current: Mapping[StageSlot, NodeId],
        mirrors: Mapping[StageSlot, NodeId],
        *,
        keeps_surplus: bool,
        only_holders: bool,
    ) -> tuple[RolePlan, Misfits]:
        """The plan, and who is too small for a slot that it could have got. `only_holders`: for those of `current`."""
        misfits: Misfits = {}
        while True:
            observed = [
                stage
                for stage in self._observe(nodes, misfits)
                if not only_holders or stage.node_id in current.values()
            ]
            pp, spares = self._shape.pp, self._shape.spares
            plan = plan_roles(observed, current, pp, spares, mirrors, keeps_surplus=keeps_surplus)
            found: Misfits = {}
            for pipeline, holders in plan.pipelines.items():
                found |= self.misfits(pipeline, holders, nodes, current)
            misfits |= found
            if not found and not self.unable.forgive({*plan.lacking, *(hole.index for hole in plan.holes)}):
                return plan, misfits

    def misfits(
        self,
        pipeline: PipelineId,
        holders: Sequence[NodeId | None],
        nodes: Nodes,
        current: Mapping[StageSlot, NodeId],
    ) -> Misfits:
        """Of those who do not hold their slots yet."""
        new = {
            index: node_id
            for index, node_id in enumerate(holders)
            if node_id is not None and current.get(StageSlot(pipeline, SlotIndex(index))) != node_id
        }
        capacities = {index: nodes[node_id][0].capacity_bytes for index, node_id in new.items()}
        lacking = too_small(self._config, self._shape, self._layers, capacities)
        return {(new[index], index): reason for index, reason in lacking.items()}

    def _observe(self, nodes: Nodes, misfits: Misfits) -> list[ObservedStage]:
        """Without those who are too small for all slots."""
        observed: list[ObservedStage] = []
        for node_id, (description, order) in nodes.items():
            unable = self.unable.of(node_id)
            left_out = {index for name, index in misfits if name == node_id}.union(unable)
            slots = loadable_slots(description, self._layers, left_out)
            if slots is None or slots or description.part is not None or unable:
                observed.append(ObservedStage(node_id, description.numeric_class, order, slots, description.host_label))
        return observed
