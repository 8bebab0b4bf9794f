"""Which stage node holds which pipeline slot, among those that have its weights and room for them. Pure.

Slots are stable: no node is moved without need.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from common.ids import NodeId, PipelineId, SlotIndex
from common.topology import LayerRange, NodeDescription, StageSlot
from services.router.control.mirror_roles import Nodes
from services.router.control.sizes import MeshShape, StageSizes

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
    """Assignments by pipeline, then index; those of pipelines with a hole too."""
    holes: tuple[StageSlot, ...]
    """Slots that no node can fill now; their pipelines take no steps."""
    spares: tuple[NodeId, ...]
    """Spares by join order."""
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
        for slot in sorted([*self.assignments, *self.holes]):
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

    `current` may name dead nodes; those slots are holes, and a hole stays one until a node is free for it: its mirror
    before others, then spares in join order that mirror none, each preferring the numeric class of its pipeline. A
    whole pipeline is never broken up for another. Of several broken ones the highest gives its nodes to the lower ones.
    No node gets a slot whose weights it does not see. Where the free ones see others, holders of the same pipeline
    change places for them, those that have just come before those that serve; a pipeline that cannot be whole is not
    begun. Those that see least go first among equals, so that those that see all are left as spares. Then hosts
    count: one that no other pipeline is on goes first, then the one that can hold most of this pipeline, so that a host
    that is lost takes as few pipelines along as can be, and spares are left on others.
    A pipeline that has a holder or a mirror is kept while `keeps_surplus`, also where fewer than `spares` are left over
    then: a node that was killed is back in a moment. Without it those with a hole, then the highest ones, are given up
    until the rule holds. The first one is always formed.
    """
    planner = _Planner(stage_nodes, current, pp)
    planner.repair({slot: of for slot, of in (mirrors or {}).items() if slot.index < pp and of in planner.nodes})
    num_wanted = max((len(planner.nodes) - spares) // pp, 1)
    if not keeps_surplus:
        planner.give_up_beyond(num_wanted)
    return planner.result(num_wanted, spares, planner.begin_up_to(num_wanted))


class _Planner:
    """The roles, changed step by step. A list of free nodes says which may be given a slot in one step: a node that
    gets one is removed from it."""

    def __init__(self, stage_nodes: Sequence[ObservedStage], current: Mapping[StageSlot, NodeId], pp: int) -> None:
        """Slots of this shape keep their holder if it lives; a node that is named twice keeps its first slot."""
        self.nodes = {
            node.node_id: node for node in sorted(stage_nodes, key=lambda node: (node.join_order, node.node_id))
        }
        self._pp = pp
        self._held: dict[StageSlot, NodeId] = {}
        for slot in sorted(current):
            node = self.nodes.get(current[slot])
            if slot.index < pp and node is not None and node.can_hold(slot) and node.node_id not in self._held.values():
                self._held[slot] = node.node_id

    def repair(self, mirrors: Mapping[StageSlot, NodeId]) -> None:
        """Fill the holes of pipelines that have a holder or a mirror."""
        kept, free = sorted({slot.pipeline for slot in (*self._held, *mirrors)}), self._free()
        for pipeline in kept:
            self._fill_holes(pipeline, free, mirrors)
        # Nodes of the highest broken pipelines fill holes of the lowest ones, as long as there is one that can.
        while any(self._give(higher, lower) for lower, higher in self._broken_pairs(kept)):
            pass

    def give_up_beyond(self, num_wanted: int) -> None:
        """Set the nodes free of pipelines beyond this number, whole ones last."""
        by_worth = sorted(self._pipelines(), key=lambda pipeline: bool(self._holes(pipeline)))
        given_up = by_worth[num_wanted:]
        self._held = {slot: node_id for slot, node_id in self._held.items() if slot.pipeline not in given_up}

    def begin_up_to(self, num_wanted: int) -> set[int]:
        """Form pipelines until there are this many. Returns the slots for which no free node sees the weights."""
        while len(kept := self._pipelines()) < num_wanted:
            pipeline = PipelineId(next(number for number in range(len(kept) + 1) if number not in kept))
            before, free = dict(self._held), self._free()
            self._fill_holes(pipeline, free, {})
            if missing := self._holes(pipeline):
                self._held = before
                return {slot.index for slot in missing} if free else set()
        return set()

    def result(self, num_wanted: int, spares: int, lacking: set[int]) -> RolePlan:
        """`spares`: how many are wished for."""
        kept, free = self._pipelines(), self._free()
        holes = [slot for pipeline in kept for slot in self._holes(pipeline)]
        num_whole = len(kept) - len({slot.pipeline for slot in holes})
        return RolePlan(
            assignments={slot: self._held[slot] for slot in sorted(self._held)},
            holes=tuple(holes),
            spares=tuple(node.node_id for node in free),
            detail=_detail(len(self.nodes), num_whole, holes, len(free), self._pp, spares),
            num_surplus=max(0, len(kept) - num_wanted),
            lacking=tuple(sorted(lacking.union(slot.index for slot in holes if free))),
        )

    def _slots(self, pipeline: PipelineId) -> list[StageSlot]:
        return [StageSlot(pipeline, SlotIndex(index)) for index in range(self._pp)]

    def _holes(self, pipeline: PipelineId) -> list[StageSlot]:
        return [slot for slot in self._slots(pipeline) if slot not in self._held]

    def _holders(self, pipeline: PipelineId) -> dict[StageSlot, ObservedStage]:
        return {slot: self.nodes[self._held[slot]] for slot in self._slots(pipeline) if slot in self._held}

    def _pipelines(self) -> list[PipelineId]:
        return sorted({slot.pipeline for slot in self._held})

    def _free(self) -> list[ObservedStage]:
        """Returns those without a slot, in join order."""
        holders = set(self._held.values())
        return [node for node in self.nodes.values() if node.node_id not in holders]

    def _fill_holes(self, pipeline: PipelineId, free: list[ObservedStage], mirrors: Mapping[StageSlot, NodeId]) -> None:
        """Fill what `free` suffices for."""
        holes = self._holes(pipeline)
        wanted = self._class_of(pipeline, free, mirrors)
        others_mirrors = {node_id for slot, node_id in mirrors.items() if slot not in holes}
        used_by_others = {self.nodes[of].host_label for slot, of in self._held.items() if slot.pipeline != pipeline}
        for slot in holes:
            able, num_here = [node for node in free if node.can_hold(slot)], self._slots_by_host(pipeline, free)
            worths = [
                (
                    node.node_id != mirrors.get(slot),
                    node.numeric_class != wanted,
                    node.node_id in others_mirrors,
                    self._pp if node.slots is None else len(node.slots),
                    node.host_label in used_by_others,
                    -num_here[node.host_label],
                    order,
                )
                for order, node in enumerate(able)
            ]
            if able:
                node = able[min(worths)[-1]]
                free.remove(node)
                self._held[slot] = node.node_id
        for hole in [slot for slot in holes if slot not in self._held]:
            new = [slot for slot in holes if slot in self._held]
            if not _pass_on(hole, new, self._held, free, self.nodes):
                _pass_on(hole, list(self._holders(pipeline)), self._held, free, self.nodes)

    def _class_of(
        self, pipeline: PipelineId, free: Sequence[ObservedStage], mirrors: Mapping[StageSlot, NodeId]
    ) -> str | None:
        """Returns the numeric class that most of a pipeline's holders have; where all are gone, most of its mirrors. An
        empty one takes the class of the first in line whose class can fill it, so that it is of one class."""
        holders = list(self._holders(pipeline).values())
        followers = [self.nodes[mirrors[slot]] for slot in self._slots(pipeline) if slot in mirrors]
        counted = holders or [follower for follower in followers if follower in free]
        if counted:
            classes = Counter(node.numeric_class for node in counted)
            return max(sorted(classes), key=classes.__getitem__)
        for name in dict.fromkeys(node.numeric_class for node in free):
            if _can_fill(self._slots(pipeline), [node for node in free if node.numeric_class == name]):
                return name
        return None

    def _slots_by_host(self, pipeline: PipelineId, free: Sequence[ObservedStage]) -> Counter[str]:
        """Counts the slots of a pipeline that each host can hold: those it holds, and as many more as it has nodes."""
        held = Counter(node.host_label for node in self._holders(pipeline).values())
        unheld, on_host = self._pp - held.total(), Counter(node.host_label for node in free)
        return held + Counter({label: min(unheld, num_nodes) for label, num_nodes in on_host.items()})

    def _broken_pairs(self, kept: Sequence[PipelineId]) -> list[tuple[PipelineId, PipelineId]]:
        """Returns two broken pipelines each, the lower one first: the lowest with the highest before all others."""
        broken = [p for p in kept if 0 < len(self._holes(p)) < self._pp]
        return [(lower, higher) for lower in broken for higher in reversed(broken) if lower < higher]

    def _give(self, giver: PipelineId, taker: PipelineId) -> bool:
        """Returns whether the taker could use any of the giver's nodes."""
        giving = self._holders(giver)
        for slot in giving:
            del self._held[slot]
        left = list(giving.values())
        self._fill_holes(taker, left, {})
        self._held.update({slot: node.node_id for slot, node in giving.items() if node in left})
        return len(left) < len(giving)


def _pass_on(
    hole: StageSlot,
    movable: Sequence[StageSlot],
    held: dict[StageSlot, NodeId],
    free: list[ObservedStage],
    nodes: Mapping[NodeId, ObservedStage],
) -> bool:
    """Fill a hole whose weights no free node sees: the holder of another slot goes there, and so on, along a shortest
    chain that ends with a free node. Takes that one from `free`; False: there is no such chain."""
    goes_to: dict[StageSlot, StageSlot] = {}
    queue = deque([hole])
    while queue:
        slot = queue.popleft()
        entering = next((node for node in free if node.can_hold(slot)), None)
        if entering is not None:
            free.remove(entering)
            moved = entering.node_id
            while slot != hole:
                held[slot], moved, slot = moved, held[slot], goes_to[slot]
            held[hole] = moved
            return True
        for other in movable:
            if other not in goes_to and nodes[held[other]].can_hold(slot):
                goes_to[other] = slot
                queue.append(other)
    return False


def _can_fill(slots: Sequence[StageSlot], able: Sequence[ObservedStage]) -> bool:
    """Returns whether these nodes can hold all of these slots at once."""
    held: dict[StageSlot, NodeId] = {}
    free, nodes = list(able), {node.node_id: node for node in able}
    return all(_pass_on(slot, [*held], held, free, nodes) for slot in slots)


def _detail(num_nodes: int, num_pipelines: int, holes: Sequence[StageSlot], num_free: int, pp: int, spares: int) -> str:
    missing = "".join(f"; no node holds slot {slot.index} of pipeline {slot.pipeline}" for slot in holes)
    if num_pipelines == 0:
        return f"{num_nodes} of {pp} stage nodes{missing}"
    pipelines = "1 pipeline" if num_pipelines == 1 else f"{num_pipelines} pipelines"
    sentence = f"{num_nodes} stage nodes: {pipelines} of {pp}, {num_free} spare"
    return (sentence if num_free >= spares else f"{sentence} of the {spares} wanted") + missing


class RolePlanning:
    """Plans until no node is named for a slot that it has no room for. Nothing is told before that."""

    def __init__(self, shape: MeshShape, layers: Sequence[LayerRange], sizes: StageSizes, nodes: Nodes) -> None:
        """`nodes`: as they are at any time."""
        self._shape = shape
        self._layers = layers
        self._sizes = sizes
        self._nodes = nodes
        self.unable = Unable()

    def plan(
        self,
        current: Mapping[StageSlot, NodeId],
        mirrors: Mapping[StageSlot, NodeId],
        *,
        keeps_surplus: bool,
        only_holders: bool,
    ) -> tuple[RolePlan, Misfits]:
        """Returns the plan, and which nodes are too small for a slot that they could get. `only_holders`: for those of
        `current`."""
        misfits: Misfits = {}
        while True:
            observed = [
                stage for stage in self._observe(misfits) if not only_holders or stage.node_id in current.values()
            ]
            pp, spares = self._shape.pp, self._shape.spares
            plan = plan_roles(observed, current, pp, spares, mirrors, keeps_surplus=keeps_surplus)
            found: Misfits = {}
            for pipeline, holders in plan.pipelines.items():
                found |= self.misfits(pipeline, holders, current)
            misfits |= found
            if not found and not self.unable.forgive({*plan.lacking, *(hole.index for hole in plan.holes)}):
                return plan, misfits

    def misfits(
        self, pipeline: PipelineId, holders: Sequence[NodeId | None], current: Mapping[StageSlot, NodeId]
    ) -> Misfits:
        """Returns which nodes of those that do not hold their slots yet have no room for them."""
        new = {
            index: node_id
            for index, node_id in enumerate(holders)
            if node_id is not None and current.get(StageSlot(pipeline, SlotIndex(index))) != node_id
        }
        capacities = {index: self._nodes[node_id].capacity_bytes for index, node_id in new.items()}
        lacking = self._sizes.too_small(capacities)
        return {(new[index], index): reason for index, reason in lacking.items()}

    def _observe(self, misfits: Misfits) -> list[ObservedStage]:
        """Returns nodes, without those that are too small for all slots."""
        observed: list[ObservedStage] = []
        for order, (node_id, description) in enumerate(self._nodes.items()):
            unable = self.unable.of(node_id)
            left_out = {index for name, index in misfits if name == node_id}.union(unable)
            slots = loadable_slots(description, self._layers, left_out)
            if slots is None or slots or description.part is not None or unable:
                observed.append(ObservedStage(node_id, description.numeric_class, order, slots, description.host_label))
        return observed


class Unable:
    """By node, the indexes of such slots. Its disk may have failed: where no other node is left, it is asked again."""

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
        """No other node can take these. False: none was left out of them."""
        forgiven = [slots for slots in self._slots.values() if not slots.isdisjoint(indexes)]
        for slots in forgiven:
            slots.difference_update(indexes)
        return bool(forgiven)

    def forget(self, node_id: NodeId) -> None:
        """It is gone; a node that has refused nothing is not an error."""
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
        who = "no other node has" if is_seen else "no node has"
        found += f"; {who} the weights of layers [{layers[slot].start}, {layers[slot].stop})"
    return found
