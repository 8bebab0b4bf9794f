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
    """By pipeline, then index; those of pipelines with a hole too."""
    holes: tuple[StageSlot, ...]
    """Slots that nobody can fill now; their pipelines take no steps."""
    spares: tuple[NodeId, ...]
    """By join order."""
    detail: str
    """What there is and what is missing, as a sentence for people."""
    num_surplus: int = 0
    """Pipelines beyond the rule, whose nodes are wanted as spares."""

    @property
    def pipelines(self) -> dict[PipelineId, tuple[NodeId | None, ...]]:
        """Holders by slot; None for a hole."""
        found: dict[PipelineId, dict[int, NodeId | None]] = {}
        for slot in sorted([*self.assignments, *self.holes], key=_slot_order):
            found.setdefault(slot.pipeline, {})[slot.index] = self.assignments.get(slot)
        return {pipeline: tuple(holders.values()) for pipeline, holders in found.items()}


def layers_of(slot: StageSlot, layer_ranges: Sequence[LayerRange]) -> LayerRange:
    """The slot's layers; `layer_ranges` has one range a slot and is the same for every pipeline."""
    return layer_ranges[slot.index]


def plan_roles(
    stage_nodes: Sequence[ObservedStage],
    current: Mapping[StageSlot, NodeId],
    pp: int,
    spares: int,
    mirrors: Mapping[StageSlot, NodeId] | None = None,
    *,
    keeps_surplus: bool = True,
) -> RolePlan:
    """Slots for n living nodes: floor((n - spares) / pp) pipelines, the rest spares.

    `current` may name dead nodes; those slots are holes, and a hole stays one until somebody is free for it: its mirror
    before others, then spares in join order that mirror nobody, each preferring the numeric class of its pipeline. A
    whole pipeline is never broken up for another. Of several broken ones the highest gives its nodes to the lower ones.
    A pipeline that exists is kept while `keeps_surplus`, also where fewer than `spares` are left over then: a node that
    was killed is back in a moment. Without it those with a hole, then the highest ones, are given up until the rule
    holds. The first one is always formed.
    ConfigurationError for pp < 1 or spares < 0.
    """
    if pp < 1 or spares < 0:
        raise ConfigurationError(f"PP is {pp} and SPARES {spares}; at least 1 and 0 are needed")
    nodes = {node.node_id: node for node in sorted(stage_nodes, key=lambda node: (node.join_order, node.node_id))}
    assignments = _living_holders(current, nodes, pp)
    free = [node for node in nodes.values() if node.node_id not in set(assignments.values())]
    kept = sorted({slot.pipeline for slot in assignments})
    for pipeline in kept:
        _fill_holes(pipeline, pp, assignments, free, nodes, mirrors or {})
    _merge_broken(kept, pp, assignments, nodes)
    kept = sorted({slot.pipeline for slot in assignments})
    num_wanted = max((len(nodes) - spares) // pp, 1)
    if not keeps_surplus:
        by_worth = sorted(kept, key=lambda pipeline: any(s not in assignments for s in _slots(pipeline, pp)))
        for pipeline in by_worth[num_wanted:]:
            for slot in _slots(pipeline, pp):
                assignments.pop(slot, None)
        kept = sorted(by_worth[:num_wanted])
    free = [node for node in nodes.values() if node.node_id not in set(assignments.values())]
    while len(kept) < num_wanted and len(free) >= pp:
        pipeline = PipelineId(next(number for number in range(len(kept) + 1) if number not in kept))
        _fill_holes(pipeline, pp, assignments, free, nodes, {})
        kept = sorted([*kept, pipeline])
    holes = [slot for pipeline in kept for slot in _slots(pipeline, pp) if slot not in assignments]
    num_whole = len(kept) - len({slot.pipeline for slot in holes})
    return RolePlan(
        assignments={slot: assignments[slot] for slot in sorted(assignments, key=_slot_order)},
        holes=tuple(holes),
        spares=tuple(sorted((node.node_id for node in free), key=list(nodes).index)),
        detail=_detail(len(nodes), num_whole, holes, len(free), pp, spares),
        num_surplus=max(0, len(kept) - num_wanted),
    )


def _slot_order(slot: StageSlot) -> tuple[int, int]:
    return slot.pipeline, slot.index


def _slots(pipeline: PipelineId, pp: int) -> list[StageSlot]:
    return [StageSlot(pipeline, SlotIndex(index)) for index in range(pp)]


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
    mirrors: Mapping[StageSlot, NodeId],
) -> None:
    """Fill what `free` suffices for; takes what it uses from there."""
    slots = _slots(pipeline, pp)
    holes = [slot for slot in slots if slot not in assignments]
    classes = Counter(nodes[assignments[slot]].numeric_class for slot in slots if slot in assignments)
    if not classes:
        # An empty pipeline takes the class of the first in line whose class can fill it, so that it is of one class.
        available = Counter(node.numeric_class for node in free)
        whole = [node.numeric_class for node in free if available[node.numeric_class] >= len(holes)]
        classes.update(whole[:1])
    wanted = max(sorted(classes), key=classes.__getitem__, default=None)
    others_mirrors = {node_id for slot, node_id in mirrors.items() if slot not in holes}
    for slot in holes:
        if not free:
            return
        own_mirror = mirrors.get(slot)
        node = min(
            free,  # in join order: `min` takes the first of equals
            key=lambda node: (
                node.node_id != own_mirror,
                node.numeric_class != wanted,
                node.node_id in others_mirrors,
            ),
        )
        free.remove(node)
        assignments[slot] = node.node_id


def _merge_broken(
    kept: Sequence[PipelineId],
    pp: int,
    assignments: dict[StageSlot, NodeId],
    nodes: Mapping[NodeId, ObservedStage],
) -> None:
    """Nodes of the highest broken pipeline fill the holes of the lowest one, until at most one is left broken."""
    while True:
        broken = [p for p in kept if 0 < sum(slot in assignments for slot in _slots(p, pp)) < pp]
        if len(broken) < 2:
            return
        lowest, highest = broken[0], broken[-1]
        giving = [slot for slot in _slots(highest, pp) if slot in assignments]
        giving = giving[: pp - sum(slot in assignments for slot in _slots(lowest, pp))]
        moved = [nodes[assignments.pop(slot)] for slot in giving]
        _fill_holes(lowest, pp, assignments, moved, nodes, {})


def _detail(num_nodes: int, num_pipelines: int, holes: Sequence[StageSlot], num_free: int, pp: int, spares: int) -> str:
    missing = "".join(f"; nobody holds slot {slot.index} of pipeline {slot.pipeline}" for slot in holes)
    if num_pipelines == 0:
        return f"{num_nodes} of {pp} stage nodes{missing}"
    pipelines = "1 pipeline" if num_pipelines == 1 else f"{num_pipelines} pipelines"
    sentence = f"{num_nodes} stage nodes: {pipelines} of {pp}, {num_free} spare"
    return (sentence if num_free >= spares else f"{sentence} of the {spares} wanted") + missing
