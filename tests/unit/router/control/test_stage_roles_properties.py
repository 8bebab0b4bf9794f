"""Slots, lease terms and generations through any order of events."""

from __future__ import annotations

from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from common.ids import NodeId, PipelineId, SlotIndex
from common.messages import AssignMirror, AssignStage, MirrorTo, StageReady, Unassign
from common.topology import CheckpointPart, StageSlot
from services.router.control.actions import Action, ClosePipeline, OpenPipeline, SuspendPipeline, Tell
from tests.support.router.mesh_shapes import PLENTY, node
from tests.support.router.stage_reports import roles_of


class Stages(RuleBasedStateMachine):
    """Each node believes what it was told last; the router must never lose sight of that."""

    NAMES = "abcdefghi"
    SMALL = "hi"
    """Too small for any slot."""
    PARTS: ClassVar[dict[str, CheckpointPart]] = {}
    """What those see who do not see everything."""

    def __init__(self) -> None:
        super().__init__()
        self.roles = roles_of(spares=1)
        self.believed: dict[str, tuple[StageSlot, int, int] | None] = {}
        """Slot, lease term, generation."""
        self.reported: set[tuple[int, int, int]] = set()
        """Pipeline, slot, generation."""
        self.open: dict[int, int] = {}
        """Generation by pipeline."""
        self.suspended: set[int] = set()
        """Pipelines whose requests keep their blocks."""
        self.mirrors: list[tuple[str, int]] = []
        """Who was told to mirror something, and the number of that role."""
        self.last_generation = 0
        self.holders: dict[StageSlot, tuple[str, int]] = {}
        """Who was told the slot last, and in which lease term."""

    def carry_out(self, actions: list[Action]) -> None:
        assigned: set[int] = set()
        for action in actions:
            if isinstance(action, SuspendPipeline):
                del self.open[action.pipeline]
                self.suspended.add(action.pipeline)
            elif isinstance(action, ClosePipeline):
                assert action.pipeline in self.open or action.pipeline in self.suspended
                self.open.pop(action.pipeline, None)
                self.suspended.discard(action.pipeline)
            elif isinstance(action, OpenPipeline):
                pipeline = self.roles.pipelines[action.pipeline]
                assert action.pipeline not in self.open
                assert action.generation == pipeline.generation
                for slot, holder in enumerate(pipeline.holders):
                    assert holder is not None
                    assert self.believed[holder] is not None
                    assert (action.pipeline, slot, action.generation) in self.reported
                self.open[action.pipeline] = action.generation
                self.suspended.discard(action.pipeline)
            elif isinstance(action.message, AssignMirror | MirrorTo):
                assert action.node_id in self.believed, "only the living are told anything"
                if isinstance(action.message, AssignMirror):
                    self.mirrors.append((action.node_id, action.header.generation))
                    own = node(action.node_id, part=self.PARTS.get(action.node_id))
                    assert own.can_load_layers(self.roles.layers[action.message.slot])
            elif isinstance(action.message, Unassign):
                self.believed[action.node_id] = None
            else:
                self.apply_assignment(action)
                assigned.add(action.header.generation)
        if assigned:
            assert min(assigned) > self.last_generation
            self.last_generation = max(assigned)

    def apply_assignment(self, action: Tell) -> None:
        message = action.message
        assert isinstance(message, AssignStage)
        assert action.node_id in self.believed, "only the living are told anything"
        assert message.pipeline not in self.open, "closed before it changes"
        slot = StageSlot(PipelineId(message.pipeline), SlotIndex(message.slot))
        before = self.holders.get(slot)
        if before is not None and before != (action.node_id, message.lease_term):
            assert message.lease_term > before[1]
        self.holders[slot] = action.node_id, message.lease_term
        assert node(action.node_id, part=self.PARTS.get(action.node_id)).can_load_layers(self.roles.layers[slot.index])
        self.believed[action.node_id] = slot, message.lease_term, action.header.generation

    @rule(name=st.sampled_from(NAMES))
    def join(self, name: str) -> None:
        self.believed.setdefault(name, None)
        capacity_bytes = 1000 if name in self.SMALL else PLENTY
        self.carry_out(self.roles.join(node(name, capacity_bytes=capacity_bytes, part=self.PARTS.get(name))))

    @rule(name=st.sampled_from(NAMES))
    def lose(self, name: str) -> None:
        self.believed.pop(name, None)
        self.carry_out(self.roles.lose(NodeId(name)))

    @rule(number=st.integers(0, 50), is_complete=st.booleans())
    def mirror(self, number: int, is_complete: bool) -> None:
        if self.mirrors:
            name, role_number = self.mirrors[number % len(self.mirrors)]
            self.carry_out(self.roles.apply_mirror_report(NodeId(name), role_number, is_complete=is_complete))

    @rule(name=st.sampled_from(NAMES))
    def drain(self, name: str) -> None:
        if name in self.believed:
            self.carry_out(self.roles.drain(NodeId(name)))
            assert all(leaver in self.believed for leaver in self.roles.leaving)

    @rule(pipeline=st.integers(0, 3))
    def renew(self, pipeline: int) -> None:
        self.carry_out(self.roles.renew(PipelineId(pipeline)))

    @rule(name=st.sampled_from(NAMES), age=st.integers(0, 1))
    def get_ready(self, name: str, age: int) -> None:
        belief = self.believed.get(name)
        if belief is not None:
            slot, term, generation = belief
            if not age:
                self.reported.add((slot.pipeline, slot.index, generation))
            message = StageReady(slot.pipeline, slot.index, term)
            self.carry_out(self.roles.apply_ready(NodeId(name), message, generation - age))

    @rule(name=st.sampled_from(NAMES), repeats=st.integers(1, 2))
    def refuse(self, name: str, repeats: int) -> None:
        """It cannot do what it believes that it is to do, and its heartbeats say so again and again."""
        belief = self.believed.get(name)
        if belief is not None:
            for _ in range(repeats):
                self.carry_out(self.roles.apply_refusal(NodeId(name), belief[2]))

    @rule(number=st.integers(0, 50))
    def refuse_to_mirror(self, number: int) -> None:
        if self.mirrors:
            name, role_number = self.mirrors[number % len(self.mirrors)]
            self.carry_out(self.roles.apply_refusal(NodeId(name), role_number))

    @invariant()
    def nobody_holds_two_slots_and_no_slot_has_two_holders(self) -> None:
        holders = [holder for p in self.roles.pipelines.values() for holder in p.holders if holder is not None]
        assert len(holders) == len(set(holders))
        assert set(holders) <= set(self.believed)

    @invariant()
    def every_node_believes_what_the_router_believes_of_it(self) -> None:
        for name, belief in self.believed.items():
            assert (belief[0] if belief is not None else None) == self.roles.slot_of(NodeId(name))

    @invariant()
    def what_is_open_is_open_in_its_generation(self) -> None:
        pipelines = self.roles.pipelines.items()
        assert self.open == {number: pipeline.generation for number, pipeline in pipelines if pipeline.is_open}

    @invariant()
    def there_are_as_many_pipelines_as_nodes_suffice_for(self) -> None:
        count = len(self.believed.keys() - set(self.SMALL))
        assert len(self.roles.pipelines) >= max((count - 1) // 2, min(1, count // 2))

    def teardown(self) -> None:
        for name in list(self.believed):
            self.get_ready(name, 0)
        whole = [number for number, pipeline in self.roles.pipelines.items() if pipeline.is_whole]
        assert len(self.open) == len(whole), "all that are ready are open"
        assert self.PARTS or len(self.roles.pipelines) - len(whole) <= 1
        for name in self.believed:
            self.roles.drain(NodeId(name))
        assert set(self.roles.leaving) == self.believed.keys(), "who all leave wait for nobody"


FIRST, LAST = roles_of().layers


class StagesOfParts(Stages):
    """Most see one slot's layers; who sees everything may be too small."""

    PARTS: ClassVar[dict[str, CheckpointPart]] = {name: CheckpointPart(FIRST) for name in "abc"} | {
        name: CheckpointPart(LAST) for name in "defi"
    }

    @invariant()
    def there_are_as_many_pipelines_as_nodes_suffice_for(self) -> None:
        able = [self.PARTS.get(name, None) for name in self.believed if name not in self.SMALL]
        num_first, num_last = able.count(CheckpointPart(FIRST)), able.count(CheckpointPart(LAST))
        num_whole = min(num_first, num_last, (len(able) - 1) // 2)  # who is too small for all slots is no spare
        assert len(self.roles.pipelines) >= max(num_whole, min(1, num_first, num_last))
        if len(able) >= 2 and num_first < len(able) and num_last < len(able):
            assert any(pipeline.is_whole for pipeline in self.roles.pipelines.values())


TestStages = Stages.TestCase
TestStages.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestStagesOfParts = StagesOfParts.TestCase
TestStagesOfParts.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
