"""Which stage node holds which pipeline slot, among those that have its weights and room for them. Pure.

Slots are stable: nobody is moved without need.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from common.checkpoint.model_config import ModelConfig
from common.errors import ConfigurationError
from common.ids import NodeId, PipelineId, SlotIndex
from common.topology import LayerRange, NodeDescription, StageSlot
from services.router.control.mirror_roles import Nodes
from services.router.control.sizes import MeshShape, too_small

Misfits = dict[tuple[NodeId, int], str]
"""Nodes that have no room for a slot, with its index, and how much is missing."""


@dataclass(frozen=True, slots=True)
class ObservedStage:
    """A stage node that is alive."""

    node_id: NodeId
    numeric_class: str
    join_order: int
    """Lower joined earlier; ties go by id."""
    slots: frozenset[int] | None = None
    """Indexes of the slots whose weights it sees; None: of all."""
    host_label: str = ""
    """What fails together with it."""

    def can_hold(self, slot: StageSlot) -> bool:
        """Returns whether it sees the slot's weights."""
        return self.slots is None or slot.index in self.slots


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
    lacking: tuple[int, ...] = ()
    """Indexes of slots that stay empty although nodes are free, since none of these sees their weights."""

    @property
    def pipelines(self) -> dict[PipelineId, tuple[NodeId | None, ...]]:
        """Returns holders by slot; None for a hole."""
        found: dict[PipelineId, dict[int, NodeId | None]] = {}
        for slot in sorted([*self.assignments, *self.holes], key=_slot_order):
            found.setdefault(slot.pipeline, {})[slot.index] = self.assignments.get(slot)
        return {pipeline: tuple(holders.values()) for pipeline, holders in found.items()}


def plan_roles(
    stage_nodes: Sequence[ObservedStage],
    current: Mapping[StageSlot, NodeId],
    pp: int,
    spares: int,
    mirrors: Mapping[StageSlot, NodeId] | None = None,
    *,
    keeps_surplus: bool = True,
) -> RolePlan:
    """Gives slots to n living nodes: floor((n - spares) / pp) pipelines, the rest spares.

    `current` may name dead nodes; those slots are holes, and a hole stays one until somebody is free for it: its mirror
    before others, then spares in join order that mirror nobody, each preferring the numeric class of its pipeline. A
    whole pipeline is never broken up for another. Of several broken ones the highest gives its nodes to the lower ones.
    Nobody gets a slot whose weights it does not see. Where those who are free see others, holders of the same pipeline
    change places for them, those who have just come before those who serve; a pipeline that cannot be whole is not
    begun. Who sees least goes first among equals, so that those who see everything are left as spares. Then hosts
    count: one that no other pipeline is on goes first, then the one that can hold most of this pipeline, so that a host
    that is lost takes as few pipelines along as can be, and spares are left on others.
    A pipeline that has a holder or a mirror is kept while `keeps_surplus`, also where fewer than `spares` are left over
    then: a node that was killed is back in a moment. Without it those with a hole, then the highest ones, are given up
    until the rule holds. The first one is always formed.
    ConfigurationError for pp < 1 or spares < 0.
    """
    if pp < 1 or spares < 0:
        raise ConfigurationError(f"PP is {pp} and SPARES {spares}; at least 1 and 0 are needed")
    nodes = {node.node_id: node for node in sorted(stage_nodes, key=lambda node: (node.join_order, node.node_id))}
    assignments = _living_holders(current, nodes, pp)
    free = [node for node in nodes.values() if node.node_id not in set(assignments.values())]
    mirrors = {slot: of for slot, of in (mirrors or {}).items() if slot.index < pp and of in nodes}
    kept = sorted({slot.pipeline for slot in (*assignments, *mirrors)})
    for pipeline in kept:
        _fill_holes(pipeline, pp, assignments, free, nodes, mirrors)
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
    lacking: set[int] = set()
    while len(kept) < num_wanted:
        pipeline = PipelineId(next(number for number in range(len(kept) + 1) if number not in kept))
        begun, left = dict(assignments), list(free)
        _fill_holes(pipeline, pp, begun, left, nodes, {})
        if missing := [slot.index for slot in _slots(pipeline, pp) if slot not in begun]:
            lacking.update(missing if left else ())
            break
        assignments, free = begun, left
        kept = sorted([*kept, pipeline])
    holes = [slot for pipeline in kept for slot in _slots(pipeline, pp) if slot not in assignments]
    lacking.update(slot.index for slot in holes if free)
    num_whole = len(kept) - len({slot.pipeline for slot in holes})
    return RolePlan(
        assignments={slot: assignments[slot] for slot in sorted(assignments, key=_slot_order)},
        holes=tuple(holes),
        spares=tuple(sorted((node.node_id for node in free), key=list(nodes).index)),
        detail=_detail(len(nodes), num_whole, holes, len(free), pp, spares),
        num_surplus=max(0, len(kept) - num_wanted),
        lacking=tuple(sorted(lacking)),
    )


def _slot_order(slot: StageSlot) -> tuple[int, int]:
    return slot.pipeline, slot.index


def _slots(pipeline: PipelineId, pp: int) -> list[StageSlot]:
    return [StageSlot(pipeline, SlotIndex(index)) for index in range(pp)]


def _living_holders(
    current: Mapping[StageSlot, NodeId], nodes: Mapping[NodeId, ObservedStage], pp: int
) -> dict[StageSlot, NodeId]:
    """Returns slots of this shape whose holder lives; a node that is named twice keeps its first slot."""
    held: dict[StageSlot, NodeId] = {}
    seen: set[NodeId] = set()
    for slot in sorted(current, key=_slot_order):
        node_id = current[slot]
        if slot.index < pp and node_id in nodes and node_id not in seen and nodes[node_id].can_hold(slot):
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
    if not classes:  # whose holders are all gone goes on with its mirrors
        followers = [nodes[mirrors[slot]] for slot in holes if slot in mirrors]
        classes.update(follower.numeric_class for follower in followers if follower in free)
    if not classes:
        # An empty pipeline takes the class of the first in line whose class can fill it, so that it is of one class.
        of_class = {name: [node for node in free if node.numeric_class == name] for name in _classes(free)}
        classes.update([name for name, able in of_class.items() if _can_fill(slots, able)][:1])
    wanted = max(sorted(classes), key=classes.__getitem__, default=None)
    others_mirrors = {node_id for slot, node_id in mirrors.items() if slot not in holes}
    used_by_others = {nodes[of].host_label for slot, of in assignments.items() if slot.pipeline != pipeline}

    def worth(
        node: ObservedStage, own_mirror: NodeId | None, num_here: Mapping[str, int]
    ) -> tuple[bool, bool, bool, int, bool, int]:
        is_other_class, mirrors_others = node.numeric_class != wanted, node.node_id in others_mirrors
        num_slots = pp if node.slots is None else len(node.slots)
        is_shared = node.host_label in used_by_others
        return (
            node.node_id != own_mirror,
            is_other_class,
            mirrors_others,
            num_slots,
            is_shared,
            -num_here[node.host_label],
        )

    for slot in holes:
        able = [node for node in free if node.can_hold(slot)]
        if able:
            num_here = _slots_by_host(slots, assignments, free, nodes)
            # In join order: `min` takes the first of equals.
            node = min(able, key=lambda node: worth(node, mirrors.get(slot), num_here))
            free.remove(node)
            assignments[slot] = node.node_id
    for hole in [slot for slot in holes if slot not in assignments]:
        if not _pass_on(hole, [slot for slot in holes if slot in assignments], assignments, free, nodes):
            _pass_on(hole, [slot for slot in slots if slot in assignments], assignments, free, nodes)


def _slots_by_host(
    slots: Sequence[StageSlot],
    assignments: Mapping[StageSlot, NodeId],
    free: Sequence[ObservedStage],
    nodes: Mapping[NodeId, ObservedStage],
) -> Counter[str]:
    """Counts the slots of a pipeline that each host can hold: those it holds, and as many more as it has nodes."""
    held = Counter(nodes[assignments[slot]].host_label for slot in slots if slot in assignments)
    unheld = len(slots) - held.total()
    return held + Counter({label: min(unheld, n) for label, n in Counter(node.host_label for node in free).items()})


def _pass_on(
    hole: StageSlot,
    movable: Sequence[StageSlot],
    assignments: dict[StageSlot, NodeId],
    free: list[ObservedStage],
    nodes: Mapping[NodeId, ObservedStage],
) -> bool:
    """Fill a hole whose weights nobody free sees: the holder of another slot goes there, and so on, along a shortest
    chain that ends with somebody free. Takes that one from `free`; False: there is no such chain."""
    goes_to: dict[StageSlot, StageSlot] = {}
    queue = deque([hole])
    while queue:
        slot = queue.popleft()
        entering = next((node for node in free if node.can_hold(slot)), None)
        if entering is not None:
            free.remove(entering)
            moved = entering.node_id
            while slot != hole:
                assignments[slot], moved, slot = moved, assignments[slot], goes_to[slot]
            assignments[hole] = moved
            return True
        for other in movable:
            if other not in goes_to and nodes[assignments[other]].can_hold(slot):
                goes_to[other] = slot
                queue.append(other)
    return False


def _can_fill(slots: Sequence[StageSlot], able: Sequence[ObservedStage]) -> bool:
    """Returns whether these nodes can hold all of these slots at once."""
    held: dict[StageSlot, NodeId] = {}
    free, nodes = list(able), {node.node_id: node for node in able}
    return all(_pass_on(slot, [*held], held, free, nodes) for slot in slots)


def _classes(nodes: Sequence[ObservedStage]) -> list[str]:
    return list(dict.fromkeys(node.numeric_class for node in nodes))


def _merge_broken(
    kept: Sequence[PipelineId],
    pp: int,
    assignments: dict[StageSlot, NodeId],
    nodes: Mapping[NodeId, ObservedStage],
) -> None:
    """Nodes of the highest broken pipelines fill holes of the lowest ones, as long as there is one that can."""
    while True:
        broken = [p for p in kept if 0 < sum(slot in assignments for slot in _slots(p, pp)) < pp]
        pairs = ((lower, higher) for lower in broken for higher in reversed(broken) if lower < higher)
        if not any(_give(higher, lower, pp, assignments, nodes) for lower, higher in pairs):
            return


def _give(
    giver: PipelineId,
    taker: PipelineId,
    pp: int,
    assignments: dict[StageSlot, NodeId],
    nodes: Mapping[NodeId, ObservedStage],
) -> bool:
    """Returns whether the taker could use any of the giver's nodes."""
    giving = {slot: nodes[assignments.pop(slot)] for slot in _slots(giver, pp) if slot in assignments}
    left = list(giving.values())
    _fill_holes(taker, pp, assignments, left, nodes, {})
    assignments.update({slot: node.node_id for slot, node in giving.items() if node in left})
    return len(left) < len(giving)


def _detail(num_nodes: int, num_pipelines: int, holes: Sequence[StageSlot], num_free: int, pp: int, spares: int) -> str:
    missing = "".join(f"; nobody holds slot {slot.index} of pipeline {slot.pipeline}" for slot in holes)
    if num_pipelines == 0:
        return f"{num_nodes} of {pp} stage nodes{missing}"
    pipelines = "1 pipeline" if num_pipelines == 1 else f"{num_pipelines} pipelines"
    sentence = f"{num_nodes} stage nodes: {pipelines} of {pp}, {num_free} spare"
    return (sentence if num_free >= spares else f"{sentence} of the {spares} wanted") + missing


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
        """Returns the plan, and who is too small for a slot that it could get. `only_holders`: for those of
        `current`."""
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
        """Returns who of those who do not hold their slots yet has no room for them."""
        new = {
            index: node_id
            for index, node_id in enumerate(holders)
            if node_id is not None and current.get(StageSlot(pipeline, SlotIndex(index))) != node_id
        }
        capacities = {index: nodes[node_id][0].capacity_bytes for index, node_id in new.items()}
        lacking = too_small(self._config, self._shape, self._layers, capacities)
        return {(new[index], index): reason for index, reason in lacking.items()}

    def _observe(self, nodes: Nodes, misfits: Misfits) -> list[ObservedStage]:
        """Returns nodes, without those who are too small for all slots."""
        observed: list[ObservedStage] = []
        for node_id, (description, order) in nodes.items():
            unable = self.unable.of(node_id)
            left_out = {index for name, index in misfits if name == node_id}.union(unable)
            slots = loadable_slots(description, self._layers, left_out)
            if slots is None or slots or description.part is not None or unable:
                observed.append(ObservedStage(node_id, description.numeric_class, order, slots, description.host_label))
        return observed


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
        """Returns what it is not asked to take."""
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


def loadable_slots(
    node: NodeDescription, layers: Sequence[LayerRange], no_room: Set[int] = frozenset()
) -> frozenset[int] | None:
    """Returns the slots whose layers a stage node sees, by index, but those that it has no room for.

    None: all slots.
    """
    if node.part is None and not no_room:
        return None
    return frozenset(slot for slot, span in enumerate(layers) if slot not in no_room and node.can_load_layers(span))


def describe_unfilled(slots: Iterable[int], layers: Sequence[LayerRange], nodes: Iterable[NodeDescription]) -> str:
    """Returns why slots stay empty although nodes are free, as the end of a sentence; "" for none."""
    living = list(nodes)
    found = ""
    for slot in slots:
        is_seen = any(node.can_load_layers(layers[slot]) for node in living)
        who = "nobody else has" if is_seen else "nobody has"
        found += f"; {who} the weights of layers [{layers[slot].start}, {layers[slot].stop})"
    return found
