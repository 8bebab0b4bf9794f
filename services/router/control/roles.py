"""Which stage node holds which pipeline slot. Slots are stable: nobody is moved without need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.errors import ConfigurationError
from common.ids import NodeId, PipelineId, SlotIndex
from common.topology import LayerRange, StageSlot


@dataclass(frozen=True, slots=True)
class ObservedStage:
    """A stage node that is alive."""

    node_id: NodeId
    numeric_class: str
    join_order: int
    """Lower joined earlier; ties go by id."""


@dataclass(frozen=True, slots=True)
class RolePlan:
    """Who holds what."""

    assignments: Mapping[StageSlot, NodeId]
    """By pipeline, then index; complete pipelines only."""
    spares: tuple[NodeId, ...]
    """By join order."""
    num_pipelines: int
    detail: str
    """What there is and what is missing, as a sentence for people."""


def layers_of(slot: StageSlot, layer_ranges: Sequence[LayerRange]) -> LayerRange:
    """The slot's layers; `layer_ranges` has one range a slot and is the same for every pipeline."""
    return layer_ranges[slot.index]


def plan_roles(
    stage_nodes: Sequence[ObservedStage], current: Mapping[StageSlot, NodeId], pp: int, spares: int
) -> RolePlan:
    """Slots for n living nodes: floor((n - spares) / pp) pipelines, the rest spares.

    A spare is there to fill a hole: a pipeline that exists is kept, and the first one is formed, as long as nodes
    suffice for it at all, even where fewer than `spares` are left over then. `current` may name dead nodes; those slots
    are holes. Holes are filled in slot order: by spares in join order, then by nodes of pipelines that dissolve (the
    highest ids), each preferring the numeric class that its pipeline has. ConfigurationError for pp < 1 or spares < 0.
    """
    if pp < 1 or spares < 0:
        raise ConfigurationError(f"PP is {pp} and SPARES {spares}; at least 1 and 0 are needed")
    nodes = {node.node_id: node for node in sorted(stage_nodes, key=lambda node: (node.join_order, node.node_id))}
    held = _living_holders(current, nodes, pp)
    num_existing = len({slot.pipeline for slot in held})
    num_pipelines = max((len(nodes) - spares) // pp, min(max(num_existing, 1), len(nodes) // pp))

    assignments = {slot: node_id for slot, node_id in held.items() if slot.pipeline < num_pipelines}
    dissolved = {node_id for slot, node_id in held.items() if slot.pipeline >= num_pipelines}
    placed = set(assignments.values())
    free = [nodes[node_id] for node_id in nodes if node_id not in placed]
    free.sort(key=lambda node: node.node_id in dissolved)  # stable: join order within both groups
    for pipeline in range(num_pipelines):
        _fill_holes(PipelineId(pipeline), pp, assignments, free, nodes)
    return RolePlan(
        assignments={slot: assignments[slot] for slot in sorted(assignments, key=_slot_order)},
        spares=tuple(sorted((node.node_id for node in free), key=list(nodes).index)),
        num_pipelines=num_pipelines,
        detail=_detail(len(nodes), num_pipelines, len(free), pp, spares),
    )


def _slot_order(slot: StageSlot) -> tuple[int, int]:
    return slot.pipeline, slot.index


def _living_holders(
    current: Mapping[StageSlot, NodeId], nodes: Mapping[NodeId, ObservedStage], pp: int
) -> dict[StageSlot, NodeId]:
    """Slots of this shape whose holder lives; a node that is named twice keeps its first slot."""
    held: dict[StageSlot, NodeId] = {}
    seen: set[NodeId] = set()
    for slot in sorted(current, key=_slot_order):
        node_id = current[slot]
        if slot.index < pp and node_id in nodes and node_id not in seen:
            held[slot] = node_id
            seen.add(node_id)
    return held


def _fill_holes(
    pipeline: PipelineId,
    pp: int,
    assignments: dict[StageSlot, NodeId],
    free: list[ObservedStage],
    nodes: Mapping[NodeId, ObservedStage],
) -> None:
    """Complete one pipeline out of `free`, which must suffice; takes what it uses from there."""
    slots = [StageSlot(pipeline, SlotIndex(index)) for index in range(pp)]
    holes = [slot for slot in slots if slot not in assignments]
    classes = Counter(nodes[assignments[slot]].numeric_class for slot in slots if slot in assignments)
    if not classes:
        # An empty pipeline takes the class of the first in line whose class can fill it, so that it is of one class.
        available = Counter(node.numeric_class for node in free)
        whole = [node.numeric_class for node in free if available[node.numeric_class] >= len(holes)]
        classes.update(whole[:1])
    wanted = max(sorted(classes), key=classes.__getitem__, default=None)
    for slot in holes:
        node = next((node for node in free if node.numeric_class == wanted), free[0])
        free.remove(node)
        assignments[slot] = node.node_id


def _detail(num_nodes: int, num_pipelines: int, num_free: int, pp: int, spares: int) -> str:
    if num_pipelines == 0:
        return f"{num_nodes} of {pp} stage nodes"
    pipelines = "1 pipeline" if num_pipelines == 1 else f"{num_pipelines} pipelines"
    sentence = f"{num_nodes} stage nodes: {pipelines} of {pp}, {num_free} spare"
    return sentence if num_free >= spares else f"{sentence} of the {spares} wanted"
