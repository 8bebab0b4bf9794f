"""Slots, lease terms and generations of all pipelines as nodes come and go. Pure: returns actions, sends nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.checkpoint.model_config import ModelConfig
from common.ids import Generation, LeaseTerm, NodeId, PipelineId, SlotIndex
from common.messages import StageReady
from common.topology import NodeDescription, StageSlot
from services.router.control.actions import Action, ClosePipeline, OpenPipeline, RoleMessages, SuspendPipeline
from services.router.control.adoption import Adoption, HeldCache, HeldSlot
from services.router.control.mirror_roles import MirroredSlot, MirrorRoles
from services.router.control.roles import RolePlan, RolePlanning, describe_unfilled
from services.router.control.sizes import MeshShape, StageSizes, plan_layers

GIVE_UP_S = 20.0
"""A process that was killed is back by then; one that was taken away on purpose is not."""


@dataclass(slots=True)
class Pipeline:
    """One pipeline's holders in one generation."""

    generation: Generation
    holders: tuple[NodeId | None, ...]
    """None: a hole."""
    num_blocks: int
    num_tier_slots: int = 0
    """Blocks that each holder's session tier is to have room for, and has, of those that are ready."""
    marks: dict[int, int] = field(default_factory=dict)
    """Up to which step paged memory is good, by slot that is ready in this generation."""
    tier_since: int = 0
    """All of these have in their session tier what steps behind this one have saved."""
    is_open: bool = False
    has_pool: bool = False
    """The scheduler keeps its requests' blocks, also while it is not open."""
    held: HeldCache | None = None
    """What stages hold from a router before this one, until it opens."""

    @property
    def is_whole(self) -> bool:
        """Every slot has a holder."""
        return None not in self.holders

    @property
    def has_cache(self) -> bool:
        """Requests have cache here, or had some under a router before this one."""
        return self.has_pool or self.held is not None

    def has_all_of(self, sequence_id: int) -> bool:
        """Returns whether it goes on with a sequence once it opens: those that reported it still hold all slots."""
        held = self.held
        if held is None or not self.is_whole:
            return False
        return sequence_id in held.sequences and len(held.last_steps) == len(self.holders)


class StageRoles:
    """Assigns slots. `results_endpoints` is where last stages send their results."""

    def __init__(
        self,
        config: ModelConfig,
        shape: MeshShape,
        results_endpoints: tuple[str, ...],
        results_ipc_token: str,
        *,
        recovery: str = "auto",
        adopts: bool = False,
        first_generation: int = 0,
    ) -> None:
        """`recovery`: auto, mirror, replay or move. `adopts`: nodes may hold slots of a router before this one.

        Generations count up from `first_generation`: they ascend over routers, since a stage's report is fenced by its
        generation alone.
        """
        self.layers = plan_layers(config, shape.pp)
        self._sizes = StageSizes(config, shape, self.layers)
        self.messages = RoleMessages(self.layers, (results_endpoints, results_ipc_token), first_generation)
        self._recovery = recovery
        self._nodes: dict[NodeId, NodeDescription] = {}
        """Nodes in the order in which they joined."""
        self.pipelines: dict[PipelineId, Pipeline] = {}
        self._lease_terms: dict[StageSlot, LeaseTerm] = {}
        self.adoption = Adoption(self.layers, shape.block_tokens, adopts)
        self._draining: set[NodeId] = set()
        self._has_surplus = False
        """Whether there are more pipelines than floor((n - SPARES) / PP)."""
        self._surplus_since_s: float | None = None
        """None: `tick` has seen none yet."""
        self._planning = RolePlanning(shape, self.layers, self._sizes, self._nodes)
        self.mirrors = MirrorRoles(self.messages, self._sizes, shape.spares, self._nodes)
        self.detail = f"0 of {shape.pp} stage nodes"

    @property
    def num_open(self) -> int:
        """Counts pipelines that take steps."""
        return sum(pipeline.is_open for pipeline in self.pipelines.values())

    @property
    def num_suspended(self) -> int:
        """Counts pipelines that wait for a holder with their requests' blocks."""
        return sum(pipeline.has_pool and not pipeline.is_open for pipeline in self.pipelines.values())

    def slot_of(self, node_id: NodeId) -> StageSlot | None:
        """Returns the slot that a node holds, or None for a spare."""
        for pipeline_id, pipeline in self.pipelines.items():
            if node_id in pipeline.holders:
                return StageSlot(pipeline_id, SlotIndex(pipeline.holders.index(node_id)))
        return None

    # Nodes come and go

    def join(self, description: NodeDescription, now_s: float = 0.0, held: HeldSlot | None = None) -> list[Action]:
        """A stage node registered (again: a node that reconnects is told its slot anew)."""
        node_id = description.node_id
        slot = self.slot_of(node_id)
        self._nodes[node_id] = description
        self.adoption.claim(node_id, held, now_s, held is None or description.can_load_layers(held.layers))
        return self._settle(now_s) + (self.renew(slot.pipeline) if slot is not None else [])

    def tick(self, now_s: float) -> list[Action]:
        """Decides what depends on time alone: a restarted router does not give a slot away before its holder is back, a
        pipeline too many is given up once it is clear that its spares will not come back, a spare that could not load
        what it was to mirror is asked again, and a mirror that is not filled in time gives way to another spare."""
        if self.adoption.is_pending:
            return self._settle(now_s)
        if self.mirrors.is_due(now_s):
            return self._mirror()
        # One that is whole and not open recovers; one with a hole is the first to be given up.
        if self._surplus_has_lasted(now_s) and all(p.is_open for p in self.pipelines.values() if p.is_whole):
            return self._replan(keeps_surplus=False)
        return []

    def _surplus_has_lasted(self, now_s: float) -> bool:
        if self._has_surplus and self._surplus_since_s is None:
            self._surplus_since_s = now_s
        return self._surplus_since_s is not None and now_s - self._surplus_since_s >= GIVE_UP_S

    def _settle(self, now_s: float) -> list[Action]:
        actions = self._adopt(now_s) + self._forget_old_claims()
        return actions if self.adoption.is_pending else actions + self._replan()

    def _forget_old_claims(self) -> list[Action]:
        """A replaced holder is told before it gets another role: else it claims the slot at each router's restart."""
        actions: list[Action] = []
        for node_id, lease_term in self.adoption.pop_losers().items():
            if self.slot_of(node_id) is None:
                self.mirrors.release(node_id)
                actions.append(self.messages.unassign(node_id, lease_term))
        return actions

    @property
    def waits(self) -> bool:
        """Returns whether `tick` may have something to do."""
        return self.adoption.is_pending or self._has_surplus or self.mirrors.waits

    def lose(self, node_id: NodeId) -> list[Action]:
        """A stage node is gone or leaves."""
        self._draining.discard(node_id)
        self._planning.unable.forget(node_id)
        self.adoption.withdraw(node_id)
        return [] if self._nodes.pop(node_id, None) is None else self._replan()

    def drain(self, node_id: NodeId) -> list[Action]:
        """A node wants to leave. Ask `may_leave` from now on; until then it serves."""
        self._draining.add(node_id)
        return self._mirror()

    def may_leave(self, node_id: NodeId) -> bool:
        """Returns whether waiting gains nothing: no cache is lost with it, or no mirror is being filled."""
        if self._nodes.keys() <= self._draining:
            return True  # the whole mesh ends
        slot = self.slot_of(node_id)
        if slot is None:
            return not self.adoption.has_claim(node_id)
        if not self.pipelines[slot.pipeline].has_cache:
            return True
        if self.adoption.is_pending:
            return False  # which spare is free to be its mirror turns out then
        return self.mirrors.is_complete(slot) or slot not in self.mirrors.nodes

    def is_awaited(self, sequence_id: int, now_s: float) -> bool:
        """Returns whether a pipeline that has yet to open holds, or may hold, this sequence of an earlier router."""
        if self.adoption.may_know(sequence_id):
            return True
        is_held = any(pipeline.has_all_of(sequence_id) for pipeline in self.pipelines.values())
        return is_held and self.adoption.waits_for_opening(now_s)

    @property
    def leaving(self) -> list[NodeId]:
        """Returns nodes that wait for leave and may have it."""
        return sorted(node_id for node_id in self._draining if self.may_leave(node_id))

    # What nodes report

    def renew(self, pipeline_id: PipelineId) -> list[Action]:
        """Give a pipeline a new generation with the same holders: what it had in flight is void."""
        pipeline = self.pipelines.get(pipeline_id)
        if pipeline is None or not pipeline.is_whole:
            return []
        return self._assign(pipeline_id, pipeline.holders)

    def apply_ready(self, node_id: NodeId, message: StageReady, generation: int) -> list[Action]:
        """A stage is ready for a slot; the pipeline opens with the last of them. Stale reports change nothing."""
        pipeline = self.pipelines.get(PipelineId(message.pipeline))
        if pipeline is None or pipeline.generation != generation or pipeline.is_open or not pipeline.is_whole:
            return []  # one that has lost another slot meanwhile is assigned anew once that is filled
        if message.slot >= len(pipeline.holders) or pipeline.holders[message.slot] != node_id:
            return []
        pipeline.marks[message.slot] = message.kv_mark
        pipeline.tier_since = max(pipeline.tier_since, message.tier_since)
        pipeline.num_tier_slots = min(pipeline.num_tier_slots, message.num_tier_slots)
        first_stage = pipeline.holders[0]
        if len(pipeline.marks) < len(pipeline.holders) or first_stage is None:
            return []
        pipeline.is_open = pipeline.has_pool = True
        held, pipeline.held = pipeline.held, None
        opened = OpenPipeline(
            PipelineId(message.pipeline),
            pipeline.generation,
            first_stage,
            pipeline.num_blocks,
            len(pipeline.holders),
            tuple(mark for _, mark in sorted(pipeline.marks.items())),
            held,
            pipeline.num_tier_slots,
            pipeline.tier_since,
        )
        return [opened, *self._move_on(), *self._mirror()]

    def apply_mirror_report(
        self, node_id: NodeId, number: int, *, is_complete: bool, broken_stream: int = 0
    ) -> list[Action]:
        """A mirror is loaded, complete, or has to begin anew. Stale reports change nothing."""
        actions = self.mirrors.apply_report(node_id, number, is_complete=is_complete, broken_stream=broken_stream)
        return [] if actions is None else actions + self._mirror()

    def apply_refusal(self, node_id: NodeId, number: int) -> list[Action]:
        """A node could not take the role of this number. Another one that is free gets it; told again it is no news."""
        if self.mirrors.fail(node_id, number):
            return self._mirror()
        slot, pipeline_id = self.slot_of(node_id), self.waits_for(node_id, number)
        if slot is None or pipeline_id is None or not self._planning.unable.note(node_id, slot.index, number):
            return []
        return self._replan()

    def waits_for(self, node_id: NodeId, number: int) -> PipelineId | None:
        """Returns the pipeline that cannot open before this node has taken the role of this number, if there is one."""
        slot = self.slot_of(node_id)
        return slot.pipeline if slot is not None and self.pipelines[slot.pipeline].generation == number else None

    def assign(self, slot: StageSlot) -> Action:
        """Tell the holder of a slot of a whole pipeline its role."""
        pipeline = self.pipelines[slot.pipeline]
        holders = [self._nodes[node_id] for node_id in pipeline.holders if node_id is not None]
        return self.messages.assign(
            slot,
            holders,
            self._lease_terms[slot],
            pipeline.num_blocks,
            pipeline.num_tier_slots,
            pipeline.generation,
        )

    # Planning

    def _replan(self, *, keeps_surplus: bool = True) -> list[Action]:
        """Gives roles to all nodes."""
        current = self._holders()
        plan, misfits = self._planning.plan(
            current,
            self.mirrors.nodes,
            keeps_surplus=keeps_surplus,
            only_holders=self.adoption.is_pending,  # slots are kept for those that hold them
        )
        self._has_surplus = plan.num_surplus > 0
        self._surplus_since_s = self._surplus_since_s if self._has_surplus else None
        self.detail = plan.detail + describe_unfilled(plan.lacking, self.layers, self._nodes.values())
        if misfits:
            self.detail += f"; {', '.join(f'{node_id}: {reason}' for (node_id, _), reason in misfits.items())}"
        wanted = plan.pipelines
        actions: list[Action] = []
        for pipeline_id in [p for p in self.pipelines if p not in wanted]:
            pipeline = self.pipelines.pop(pipeline_id)
            actions += [ClosePipeline(pipeline_id)] if pipeline.has_pool else []
        actions += self._let_go(plan, current)
        for pipeline_id, holders in wanted.items():
            actions += self._give_slots(pipeline_id, holders)
        return actions + self._move_on() + self._mirror()

    def _holders(self) -> dict[StageSlot, NodeId]:
        return {
            StageSlot(pipeline_id, SlotIndex(index)): node_id
            for pipeline_id, pipeline in self.pipelines.items()
            for index, node_id in enumerate(pipeline.holders)
            if node_id is not None
        }

    def _let_go(self, plan: RolePlan, current: Mapping[StageSlot, NodeId]) -> list[Action]:
        return [
            self.messages.unassign(node_id, self._lease_terms[slot])
            for slot, node_id in current.items()
            if node_id in plan.spares
        ]

    def _give_slots(self, pipeline_id: PipelineId, holders: tuple[NodeId | None, ...]) -> list[Action]:
        """A pipeline's holders are these now."""
        before = self.pipelines.get(pipeline_id)
        if before is not None and before.holders == holders:
            return []
        if None not in holders:
            return self._assign(pipeline_id, holders)
        if before is None:
            return []
        was_open, before.is_open, before.holders = before.is_open, False, holders
        before.marks.clear()  # of holders, one of which is gone
        return [SuspendPipeline(pipeline_id)] if was_open else []

    def _assign(self, pipeline_id: PipelineId, holders: tuple[NodeId | None, ...]) -> list[Action]:
        """Begins a new generation. A slot that changes hands gets a new lease term."""
        before = self.pipelines.get(pipeline_id)
        nodes = [node_id for node_id in holders if node_id is not None]
        capacities = {slot: self._nodes[node_id].capacity_bytes for slot, node_id in enumerate(nodes)}
        num_blocks = self._sizes.pool_blocks(capacities)
        actions: list[Action] = []
        has_pool, held = False, None
        if before is not None:
            fits = before.num_blocks <= num_blocks
            has_pool = before.has_pool and fits and not self._should_move(pipeline_id, before, holders)
            held = before.held.kept_by(self._unbroken(pipeline_id, before, holders)) if before.held and fits else None
            num_blocks = before.num_blocks if has_pool or held is not None else num_blocks
            if before.has_pool and not has_pool:
                actions.append(ClosePipeline(pipeline_id))
            elif before.is_open:
                actions.append(SuspendPipeline(pipeline_id))
        num_tier_slots = self._sizes.tier_slots(capacities, num_blocks)
        generation = Generation(self.messages.draw_number())
        self.pipelines[pipeline_id] = Pipeline(
            generation, holders, num_blocks, num_tier_slots, has_pool=has_pool, held=held
        )
        for index, node_id in enumerate(nodes):
            slot = StageSlot(pipeline_id, SlotIndex(index))
            if before is None or index >= len(before.holders) or before.holders[index] != node_id:
                self._lease_terms[slot] = LeaseTerm(self._lease_terms.get(slot, 0) + 1)
            actions.append(self.assign(slot))
        return actions

    def _should_move(self, pipeline_id: PipelineId, before: Pipeline, holders: tuple[NodeId | None, ...]) -> bool:
        """Returns whether requests are better off elsewhere than waiting for a new holder that knows nothing."""
        if before.holders == holders or self._recovery == "replay":
            return False
        if self._recovery == "move":
            return True
        is_elsewhere_open = any(p.is_open for number, p in self.pipelines.items() if number != pipeline_id)
        return is_elsewhere_open and len(self._unbroken(pipeline_id, before, holders)) < len(holders)

    def _unbroken(self, pipeline_id: PipelineId, before: Pipeline, holders: tuple[NodeId | None, ...]) -> set[int]:
        """Returns slots that go on with all of their memory: their holder stays, or its complete mirror follows it."""
        return {
            index
            for index, node_id in enumerate(holders)
            if before.holders[index] == node_id
            or self.mirrors.node_of(StageSlot(pipeline_id, SlotIndex(index))) == node_id
        }

    def _move_on(self) -> list[Action]:
        """Requests of a pipeline with a hole go where another pipeline is open."""
        if self._recovery == "replay" or not (self.num_open or self._recovery == "move"):
            return []
        actions: list[Action] = []
        for pipeline_id, pipeline in self.pipelines.items():
            if pipeline.has_pool and not pipeline.is_whole:
                pipeline.has_pool = False
                actions.append(ClosePipeline(pipeline_id))
        return actions

    def _mirror(self) -> list[Action]:
        """Spares follow slots of open pipelines, if that is wanted, and slots with cache that their holder leaves."""
        mirrored = [
            MirroredSlot(
                slot,
                self._nodes[node_id],
                self._lease_terms[slot],
                self.pipelines[slot.pipeline].num_blocks,
                is_wanted=self._wants_mirror(node_id, self.pipelines[slot.pipeline]),
                is_leaving=node_id in self._draining,
            )
            for slot, node_id in self._holders().items()
            if node_id in self._nodes
        ]
        mirrored.sort(key=lambda held: held.slot)
        busy = self._draining.union(held.holder.node_id for held in mirrored)
        spares = [node for node_id, node in self._nodes.items() if node_id not in busy and not self.adoption.is_pending]
        return self.mirrors.replan(mirrored, spares)

    def _wants_mirror(self, holder: NodeId, pipeline: Pipeline) -> bool:
        """A stage has its memory also while its pipeline recovers: one that leaves can hand it over then too."""
        if holder in self._draining:
            return pipeline.has_cache and self._recovery != "move"
        return pipeline.is_open and self._recovery in ("auto", "mirror")

    def _adopt(self, now_s: float) -> list[Action]:
        """Slots go back to those that hold them, with their lease terms, and with the cache that all of them have."""
        actions: list[Action] = []
        for adopted in self.adoption.pop_complete(now_s):
            if self._planning.misfits(adopted.pipeline, adopted.holders, self._holders()):
                self.adoption.reject(adopted)  # they have another DTYPE than before, say
                continue  # they get roles like any others
            for index, lease_term in enumerate(adopted.lease_terms):
                self._lease_terms[StageSlot(adopted.pipeline, SlotIndex(index))] = LeaseTerm(lease_term)
            self.pipelines[adopted.pipeline] = Pipeline(
                Generation(0), adopted.holders, adopted.num_blocks, held=adopted.held
            )
            if None not in adopted.holders:
                actions += self._assign(adopted.pipeline, adopted.holders)
        return actions
