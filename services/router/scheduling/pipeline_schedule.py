"""One pipeline: its block pool, the requests that run on it, and its steps in flight.

When a slot is lost, the pipeline is suspended: steps in flight are void, requests keep their blocks. It is resumed in a
new generation, and what the new holder lacks is *replayed*: prefill in steps of their own, in which only its slot
computes.

Chunks of one prefill may be in flight together, each behind the one before it: stages compute them in their order,
layer by layer. They are answered in that order, and none counts before those ahead of it.

While the only step in flight decodes, the one after it is planned *ahead*: for the same sequences, with the tokens that
are not known yet referred to by that step. So the first stage has it when it knows them, and waits for no router.

A pipeline plans one step at a time. Oldest first: a request that needs a block takes it from the youngest, so that the
oldest always gets on, and admission has made sure that it fits the pool alone.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from common.ids import SequenceId, StepId
from services.router.control.actions import OpenPipeline
from services.router.control.adoption import HeldCache, HeldSequence
from services.router.scheduling.admission import num_blocks_for
from services.router.scheduling.blocks.block_allocator import BlockAllocator
from services.router.scheduling.blocks.prefix_cache import PrefixCounters
from services.router.scheduling.blocks.sharing import PrefixSharing
from services.router.scheduling.drafts.drafting import Drafter, PipelineDrafts
from services.router.scheduling.pace import UNANSWERED_S, PipelinePace
from services.router.scheduling.request import Blame, Request, RequestState, going_on_unseen, isolated, wait_for_others
from services.router.scheduling.settings import SchedulerSettings
from services.router.scheduling.step_plan import ComputedBy, ScheduledChunk, StepPlan

UNPLANNED_AHEAD_S = 30.0
"""How long nothing is planned ahead where a step that had waited for tokens was given up."""


@dataclass(slots=True)
class StepInFlight:
    """A step that was planned and has not been answered. `requests` go with the plan's chunks."""

    plan: StepPlan
    requests: tuple[Request, ...]
    planned_s: float
    """Of one planned ahead: when the step that it waits for was answered, once it was."""
    is_canary: bool = False
    """It carries nothing, and was planned to see whether it is answered."""
    is_alone: bool = False
    """None was in flight when it was planned, but for the one whose tokens it waits for."""
    sent_s: float | None = None
    """When the first stage took it; None: it has not taken it yet. The sender notes this here."""

    @property
    def overtaken(self) -> StepId | None:
        """Returns a step in flight that has tokens of one of its requests, ahead of its own: until that is answered it
        cannot be. None: there is none."""
        oldest = (next(iter(request.steps)) for request in self.requests)
        return next((step for step in oldest if step != self.plan.step), None)


class PipelineSchedule:
    """See the module."""

    def __init__(
        self,
        opening: OpenPipeline,
        settings: SchedulerSettings,
        blame: Blame,
        prefix_counters: PrefixCounters | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.pipeline = opening.pipeline
        self.generation = opening.generation
        self.num_slots = opening.num_slots
        self.allocator = BlockAllocator(opening.num_blocks, prefix_counters, opening.num_tier_slots)
        self.prefixes = PrefixSharing(self.allocator, settings.block_tokens, blame, is_on=settings.caches_prefixes)
        self.drafts = PipelineDrafts(drafter, self.pipeline, self.allocator, settings.max_batch_tokens, blame)
        self.running: list[Request] = []
        """Requests by arrival."""
        self.in_flight: dict[StepId, StepInFlight] = {}
        self.held_releases: list[SequenceId] = []
        """They are told with the next step."""
        self.last_step = 0
        """The newest step that was answered."""
        self._last_planned = 0
        """The newest step in this generation; 0: none yet."""
        self.replay_slots: tuple[int, ...] = ()
        """Slots that lack cache of requests that are replaying."""
        self.suspended_s: float | None = None
        """When it stopped taking steps, and began to wait for a holder; None: it is open, and takes them."""
        self._has_just_replayed = False
        self._plans_ahead_from_s = -math.inf
        self.max_micro_batches = settings.micro_batches_per_pipeline or opening.num_slots
        self._max_prefilling = settings.micro_batches_per_pipeline or opening.num_slots + 1
        """Steps that may be in flight while nothing decodes: one more, for a stage to compute while the experts of
        another chunk do. Who decodes would wait for both."""
        # More could not be part of every round of micro-batches, and the young would starve.
        self.max_running = self.max_micro_batches * min(settings.max_batch_sequences, settings.max_batch_tokens)
        self._settings = settings
        self._blame = blame
        self.pace = PipelinePace()

    # Taking requests in

    def can_ever_hold(self, request: Request) -> bool:
        """Returns whether the whole pool would do."""
        return self.num_blocks_for(request.generation_request.max_num_tokens) <= self.allocator.num_blocks

    def admit(self, request: Request, sequence_id: SequenceId, now_s: float) -> None:
        """Lets it run here from now on, with the cached blocks that it finds."""
        self._start(request, sequence_id, now_s)
        self.prefixes.begin(request)

    def _start(self, request: Request, sequence_id: SequenceId, now_s: float) -> None:
        request.start(self.pipeline, sequence_id, now_s)
        insort(self.running, request, key=lambda other: other.arrival)

    # Planning

    def plan_step(
        self, step: StepId, now_s: float, *, may_plan_ahead: bool = True
    ) -> tuple[StepPlan | None, list[Request]]:
        """Plans the next micro-batch, if one may and need be sent. Returns it, and the requests preempted for it.

        `may_plan_ahead`: whether nobody waits for a place or for blocks, which those in flight do not give up.
        """
        plan, preempted = self._plan_known(step, now_s)
        if plan is None and not preempted and may_plan_ahead:
            plan = self._plan_ahead(step, now_s)
        return plan, preempted

    def _plan_known(self, step: StepId, now_s: float) -> tuple[StepPlan | None, list[Request]]:
        """Plans one of which all tokens are known."""
        preempted: list[Request] = []
        if self._num_under_way() >= self._max_in_flight():
            return None, preempted
        replays = self._replay_candidates()
        ordinary = [] if replays and not self._has_just_replayed else self._candidates()
        # Those that have all of their cache go on between the replays of the others.
        self._has_just_replayed = bool(replays) and not ordinary
        picked = ordinary or replays
        chunks = self._plan_chunks(step, isolated(picked), preempted, now_s)
        if not chunks:  # who goes alone has found no blocks: the others go on, and an older one may take its own
            others = [pick for pick in picked if not pick[0].num_failed_steps]
            chunks = self._plan_chunks(step, others, preempted, now_s)
        if not chunks and len(self.held_releases) <= self._settings.max_held_releases:
            return None, preempted
        if not self._has_just_replayed and not self.in_flight:
            self.drafts.add_to(step, chunks, self.allocator.num_free - len(self.running))
        computing_slots = self.replay_slots if chunks and self._has_just_replayed else ()
        return self._plan(step, now_s, chunks, computing_slots), preempted

    def _num_under_way(self) -> int:
        """Counts steps in flight without one that waits for another's tokens, and so keeps no stage busy."""
        return sum(other.plan.awaited_step not in self.in_flight for other in self.in_flight.values())

    def _plan_ahead(self, step: StepId, now_s: float) -> StepPlan | None:
        """Plans what follows the only step in flight, if that is certain: with tokens that are not known yet."""
        if not self._settings.plans_ahead or now_s < self._plans_ahead_from_s or len(self.in_flight) != 1:
            return None
        (under_way,) = self.in_flight.values()
        picked = going_on_unseen(under_way.plan, self.running)
        if not 0 < len(picked) <= min(self._decode_share(len(picked)), self._max_decodes()):
            return None
        wanted = [self.num_blocks_for(request.num_planned_tokens + 1) - len(request.block_table) for request in picked]
        lacks_blocks = sum(max(0, each) for each in wanted) > self.allocator.num_free  # spare ones help no other
        if lacks_blocks or self.drafts.are_worth_waiting_for(under_way.plan.step, picked):
            return None
        self._has_just_replayed = False
        chunks = self._plan_chunks(step, [(request, 1) for request in picked], None, now_s)
        return self._plan(step, now_s, chunks, awaited_step=under_way.plan.step) if chunks else None

    def _decode_share(self, num_decoding: int) -> int:
        """Returns how many of so many that decode go in one step."""
        return max(-(-num_decoding // self.max_micro_batches), self._settings.min_decode_share)

    def _max_decodes(self) -> int:
        return min(self._settings.max_batch_tokens, self._settings.max_batch_sequences)

    def _plan_chunks(
        self, step: StepId, picked: Sequence[tuple[Request, int]], preempted: list[Request] | None, now_s: float
    ) -> dict[Request, ScheduledChunk]:
        """Returns the chunks of a step, of whoever finds blocks for one; those requests are in it from now on. To
        `preempted` come those that give up theirs, to be put back in line; None: nobody does."""
        chunks: dict[Request, ScheduledChunk] = {}
        for request, num_tokens in picked:
            if request in (preempted or ()) or self._blame.has(request):
                continue  # it gave its blocks to an older one a moment ago; its owner has not put it back in line yet
            with self._blame.handling(request):
                if self._has_just_replayed:
                    chunk: ScheduledChunk | None = self._chunk(request, request.replay_position, num_tokens)
                elif num_tokens:
                    chunk = self._plan_chunk(request, num_tokens, preempted)
                else:
                    num_restored = sum(len(other.tier_slots) for other in chunks.values())
                    chunk = self._plan_restoring(step, request, preempted, num_restored)
                if chunk is not None:
                    chunks[request] = chunk
                    request.steps[step] = len(chunk.token_ids)
                    request.pace.planned(now_s)
        return chunks

    def _max_in_flight(self) -> int:
        return self.max_micro_batches if any(other.is_decoding for other in self.running) else self._max_prefilling

    def is_canary_due(self, now_s: float) -> bool:
        """Returns whether nothing is in flight, and nothing was answered for a while or since the pipeline opened."""
        return not self.in_flight and self.pace.is_quiet(now_s, self._settings.canary_interval_s)

    def plan_canary(self, step: StepId, now_s: float) -> StepPlan:
        """Plans a step that carries nothing: its answer shows that every stage still passes steps on."""
        return self._plan(step, now_s, {}, is_canary=True)

    def _plan(
        self,
        step: StepId,
        now_s: float,
        chunks: Mapping[Request, ScheduledChunk],
        computing_slots: tuple[int, ...] = (),
        *,
        awaited_step: int = 0,
        is_canary: bool = False,
    ) -> StepPlan:
        """Makes a step, which is in flight from now on: behind the one before it, with all that is to be told."""
        plan = StepPlan(
            step,
            self.pipeline,
            self.generation,
            tuple(chunks.values()),
            tuple(self.held_releases),
            computing_slots,
            self._last_planned,
            awaited_step,
            self.prefixes.begin_step(step, chunks.values()),
        )
        self._last_planned = step
        self.held_releases.clear()
        is_alone = all(other == awaited_step for other in self.in_flight)
        self.in_flight[step] = StepInFlight(plan, tuple(chunks), now_s, is_canary, is_alone)
        return plan

    def _candidates(self) -> list[tuple[Request, int]]:
        """Returns the requests of the next step with how many tokens each, by arrival.

        Decoding and prefilling requests are both dealt out evenly over the micro-batches that may be in flight: a step
        that took them all would leave the other stages idle. Few decoding ones stay together, though: those that are
        ready before the others are back wait for them. If all that prefill are in flight, they go on with their next
        chunks: a lone prompt, too, keeps several stages at work.
        """
        settings = self._settings
        decoding: list[Request] = []
        prefilling: list[Request] = []
        for request in self.running:
            if request.is_replaying:
                continue
            if request.is_decoding:
                decoding.append(request)
                continue
            with self._blame.handling(request):
                self.prefixes.take(request)
                prefilling.append(request)
        prefilling = self.prefixes.without_followers(prefilling)
        prefill_share = -(-len(prefilling) // self.max_micro_batches)
        ready_decodes = [request for request in decoding if not request.steps]
        ready_prefills = [request for request in prefilling if not request.steps]
        ready_prefills = ready_prefills or [request for request in prefilling if request.may_run_ahead]
        ready_prefills = ready_prefills[:prefill_share]
        # If the oldest of all is to be prefilled, the younger that decode leave it a place and a token.
        oldest = min((*ready_decodes, *ready_prefills), key=lambda request: request.arrival, default=None)
        kept_back = 0 if oldest is None or oldest.is_decoding else 1
        num_decodes = min(self._decode_share(len(decoding)), self._max_decodes() - kept_back)
        if wait_for_others(decoding, ready_decodes, num_decodes):
            ready_decodes = []
        picked = [(request, 1) for request in ready_decodes[:num_decodes]]
        num_tokens_left = settings.max_batch_tokens - len(picked)
        for request in ready_prefills[: settings.max_batch_sequences - len(picked)]:
            with self._blame.handling(request):
                is_copied = bool(self.prefixes.find_kept(request))
                chunk_tokens = min(request.num_unplanned_tokens, settings.prefill_chunk_tokens)
                num_tokens = 0 if is_copied else min(chunk_tokens, num_tokens_left)
                if is_copied or num_tokens > 0:
                    picked.append((request, num_tokens))
                    num_tokens_left -= num_tokens
        return sorted(picked, key=lambda pick: pick[0].arrival)

    def _plan_chunk(self, request: Request, num_tokens: int, preempted: list[Request] | None) -> ScheduledChunk | None:
        """Plans a chunk, with blocks for it; a shorter one, or none, if blocks are short and no younger one yields."""
        start = request.num_planned_tokens
        num_known_blocks = len(request.block_table)
        if start + num_tokens <= num_known_blocks * self._settings.block_tokens:
            return self._chunk(request, start, num_tokens, samples=start + num_tokens >= request.num_tokens)
        num_blocks = self._make_room(request, self.num_blocks_for(start + num_tokens) - num_known_blocks, preempted)
        num_covered_tokens = (num_known_blocks + num_blocks) * self._settings.block_tokens
        num_tokens = min(num_tokens, num_covered_tokens - start)
        if num_tokens < 1:
            return None
        new_block_ids = self.allocator.allocate(max(0, self.num_blocks_for(start + num_tokens) - num_known_blocks))
        assert new_block_ids is not None, "the chunk was cut to what is free"
        request.block_table.extend(new_block_ids)
        return self._chunk(request, start, num_tokens, samples=start + num_tokens >= request.num_tokens)

    def _plan_restoring(
        self, step: StepId, request: Request, preempted: list[Request] | None, num_restored: int
    ) -> ScheduledChunk | None:
        """Plans that blocks come back from the session tier, as many as find room. `num_restored`: in the same step
        already, of others."""
        slots = self.prefixes.find_kept(request, num_restored)
        self.prefixes.begin_restoring(request, slots)
        block_ids = self.allocator.allocate(self._make_room(request, len(slots), preempted))
        if not block_ids:
            return None
        request.begin_restoring(step, block_ids, self.prefixes.numeric_class)
        chunk = self._chunk(request, request.num_computed_tokens, len(block_ids) * self._settings.block_tokens)
        return replace(chunk, block_offset=0, new_block_ids=block_ids, tier_slots=tuple(slots[: len(block_ids)]))

    def _make_room(self, request: Request, count: int, preempted: list[Request] | None) -> int:
        """Returns how many of so many blocks are free, once the younger ones that can have given theirs up."""
        while preempted is not None and count > self.allocator.num_free and (victim := self._youngest_after(request)):
            with self._blame.handling(victim):
                self.withdraw(victim)
                preempted.append(victim)
        return max(0, min(count, self.allocator.num_free))

    def _replay_candidates(self) -> list[tuple[Request, int]]:
        """Returns which requests replay how many tokens next, by arrival; in all as many tokens as a step may have."""
        num_tokens_left = self._settings.max_batch_tokens
        picked: list[tuple[Request, int]] = []
        replays = [step for step in self.in_flight.values() if step.plan.computing_slots]
        ended = [other for step in replays for other in step.requests if other.state is not RequestState.RUNNING]
        of_others = {block_id for other in ended for block_id in other.block_table}
        for request in self.running:
            if not request.is_replaying:
                continue
            with self._blame.handling(request):
                self.prefixes.skip_replayed(request, self.last_step)
                if not request.is_replaying:
                    continue
                num_tokens = min(self.prefixes.num_to_replay(request, of_others), num_tokens_left)
                if num_tokens and not request.steps:
                    picked.append((request, num_tokens))
                    num_tokens_left -= num_tokens
        return picked

    def _chunk(self, request: Request, start: int, num_tokens: int, *, samples: bool = False) -> ScheduledChunk:
        """Makes a chunk of the tokens from `start` on, with the part of the block table that the stages do not know
        yet."""
        assert request.sequence_id is not None, "a running request has a sequence id"
        num_told, request.num_told_blocks = request.num_told_blocks, len(request.block_table)
        num_generated = len(request.generated_token_ids) + max(0, start + num_tokens - request.num_tokens)
        tells_adjustments = samples and request.tells_adjustments(num_generated)
        return ScheduledChunk(
            sequence_id=request.sequence_id,
            token_ids=request.token_ids(start, start + num_tokens),
            start_position=start,
            block_offset=num_told,
            new_block_ids=tuple(request.block_table[num_told:]),
            samples=samples,
            sampling=request.generation_request.sampling,
            choice=request.generation_request.choice,
            num_generated=num_generated,
            tells_adjustments=tells_adjustments,
            token_counts=request.token_counts() if tells_adjustments else b"",
        )

    def _youngest_after(self, request: Request) -> Request | None:
        """Returns which one gives its blocks up: the youngest that holds any and is in no step, if it is younger."""
        for other in reversed(self.running):
            if other.arrival <= request.arrival:
                return None
            if not other.steps and other.block_table and not self._blame.has(other):
                return other
        return None

    # Coming back

    def land(self, step: StepId, now_s: float, *, has_failed: bool = False) -> StepInFlight:
        """Ends a step that is in flight here: its requests are free for another."""
        in_flight = self.in_flight[step]
        if has_failed:
            self._note_given_up([in_flight], now_s)
        del self.in_flight[step]
        self.allocator.cache.tier.end_step(step, is_done=not has_failed)
        for other in self.in_flight.values():
            if other.plan.awaited_step == step:
                other.planned_s = now_s
        self.last_step = max(self.last_step, step)
        self.pace.answered(now_s, has_failed=has_failed, is_canary=in_flight.is_canary)
        for request in in_flight.requests:
            request.pace.is_disturbed |= has_failed
            self._set_down(request, step, has_failed=has_failed)
        if in_flight.plan.chunks and not has_failed:
            self.pace.last_success_s = now_s
        if in_flight.plan.num_tokens and not has_failed:  # others say nothing of how long work takes
            self.pace.measured(in_flight.plan.num_tokens, in_flight.planned_s, now_s)
            if in_flight.is_alone and all(other.plan.awaited_step == step for other in self.in_flight.values()):
                self.drafts.note_step(in_flight.plan, now_s - in_flight.planned_s)
        return in_flight

    def note_computed(
        self,
        request: Request,
        chunk: ScheduledChunk,
        step: StepId,
        computed_by: ComputedBy,
        now_s: float,
        *,
        is_replay: bool,
        num_rejected: int,
    ) -> None:
        """Notes that a chunk of a step that has landed is in the cache, but for drafts that were wrong, its last
        `num_rejected` tokens: of every slot; or, of a replay, there again."""
        if chunk.tier_slots:
            self.prefixes.note_restored(request, chunk, step, now_s)
            return
        if is_replay:
            request.note_replayed(step, len(chunk.token_ids), now_s)
            self.prefixes.note_replayed(request, chunk.start_position)
        else:
            assert chunk.start_position == request.num_computed_tokens, "chunks are answered in their order"
            num_tokens = len(chunk.token_ids) - num_rejected
            request.note_computed(step, num_tokens, now_s, is_decode=chunk.is_decode)
        self.prefixes.note_computed(request, chunk, step, computed_by)

    def _note_given_up(self, steps: Iterable[StepInFlight], now_s: float) -> None:
        """Plans nothing ahead for a while where a step had waited for tokens that were long there, or others had waited
        behind it: the link from the last stage to the first may be cut, over which nothing else goes."""
        given_up = list(steps)
        waited = any(step.plan.awaited_step and step.plan.awaited_step not in self.in_flight for step in given_up)
        if self.num_slots > 1 and waited and any(now_s - step.planned_s > UNANSWERED_S for step in given_up):
            self._plans_ahead_from_s = now_s + UNPLANNED_AHEAD_S

    def _set_down(self, request: Request, step: StepId, *, has_failed: bool) -> None:
        """Takes the request out of a step. If it has ended meanwhile, nothing can write to its blocks after its last
        one. Blocks that a failed step was to bring back are given back: they are looked for again."""
        del request.steps[step]
        if request.restoring == step:
            request.restoring = None
            if has_failed:
                kept = self.num_blocks_for(request.num_computed_tokens)
                self.allocator.free(reversed(request.block_table[kept:]))
                del request.block_table[kept:]
                if not request.num_computed_tokens:
                    request.numeric_class = None  # it may be computed by another
        if not request.steps and request.state is not RequestState.RUNNING:
            with self._blame.handling(request):
                self._give_back(request)

    def withdraw(self, request: Request) -> None:
        """Lets it run here no longer. Its blocks are free at once, or when the last step that it is part of lands."""
        self.running.remove(request)
        if not request.steps:
            self._give_back(request)

    def _give_back(self, request: Request) -> None:
        assert request.sequence_id is not None, "it has run here"
        if request.block_table:  # else no stage has heard of it
            self.held_releases.append(request.sequence_id)
            self.allocator.free(reversed(request.block_table))  # what a longer chain ends with is evicted first
            request.block_table = []

    def suspend(self, now_s: float) -> None:
        """Ends the generation: what is in flight is void, since every stage drops it before it takes a new step."""
        self.suspended_s = now_s
        self._note_given_up(self.in_flight.values(), now_s)
        self.void_steps()
        for request in self.running:
            request.num_recoveries += 1
            request.pace.is_disturbed = True

    def resume(self, opening: OpenPipeline, kv_marks: Sequence[int], now_s: float) -> None:
        """Begins a new generation. `kv_marks` says by slot up to which step its holder's cache is good.

        A request whose cache is not whole on every slot is replayed from where the worst of them ends.
        """
        covered: dict[Request, list[int]] = {}
        lacking: set[int] = set()
        for request in self.running:
            with self._blame.handling(request):
                by_slot = [self._covered(request, slot, mark) for slot, mark in enumerate(kv_marks)]
                lacking.update(slot for slot, end in enumerate(by_slot) if end < request.num_computed_tokens)
                covered[request] = by_slot
        for request, by_slot in covered.items():
            request.replay_from(min((by_slot[slot] for slot in lacking), default=request.num_computed_tokens))
        self.prefixes.resume(self.running, kv_marks)
        self.allocator.cache.resume_tier(opening.num_tier_slots, opening.tier_since, kv_marks)
        self.generation, self.replay_slots, self.suspended_s = opening.generation, tuple(sorted(lacking)), None
        self._last_planned = 0
        self.pace.opened(now_s)

    def _covered(self, request: Request, slot: int, mark: int) -> int:
        """Counts positions of a request that a slot's holder has."""
        if request.is_replaying and slot in self.replay_slots:
            # Interrupted again: a holder that has all that was answered has what was replayed so far.
            return request.replay_position if mark >= self.last_step else 0
        return min(request.covered_by(mark), request.num_computed_tokens)

    def adopt(self, held: HeldCache, waiting: Sequence[Request], step: StepId, now_s: float) -> list[Request]:
        """Lets requests of the line run here with the cache that a router before this one has left them, and returns
        them. What no request claims is released on the stages.

        What is adopted counts as computed by `step`, which is never sent. It comes after all steps of routers before
        and ahead of all of this one, so that no mark of former times stands for it.
        """
        owners = {request.held_sequence_id: request for request in waiting if request.held_sequence_id is not None}
        self.held_releases.extend(SequenceId(number) for number in held.released)
        adopted: list[Request] = []
        for number, sequence in held.sequences.items():
            sequence_id = SequenceId(number)
            request = owners.get(sequence_id)
            if request is not None and self._adopt_one(request, sequence, sequence_id, step, now_s):
                adopted.append(request)
            else:
                self.held_releases.append(sequence_id)
        return adopted

    def _adopt_one(
        self, request: Request, held: HeldSequence, sequence_id: SequenceId, step: StepId, now_s: float
    ) -> bool:
        """Returns False if it does not fit here, its blocks are not free, or its handling raised."""
        with self._blame.handling(request):
            num_computed = min(held.num_computed, request.num_tokens - 1)
            if num_computed < 1 or not self.can_ever_hold(request):
                return False
            if not self.prefixes.claim(request, held.block_ids, num_computed, self.running):
                return False
            self._start(request, sequence_id, now_s)
            request.block_table = list(held.block_ids)
            request.num_computed_tokens = num_computed
            request.numeric_class = 0  # whether a row of it went on without an expert, say, nobody knows any more
            request.kv_history = [(step, num_computed)]
            return True
        return False

    def abandon(self) -> list[Request]:
        """Ends the generation, of which nothing comes back. Returns what ran here, without cache, by arrival.

        `held_releases` then has all that stages may still keep.
        """
        self.void_steps()
        running, self.running = self.running, []
        for request in running:
            with self._blame.handling(request):
                self._give_back(request)
                request.num_recoveries += self.suspended_s is None
                request.num_replayed_tokens += request.num_computed_tokens
        return running

    def void_steps(self) -> None:
        """Drops what is in flight, of which nothing is known and nothing comes back."""
        in_flight, self.in_flight = list(self.in_flight.values()), {}
        for step in in_flight:
            self.held_releases.extend(step.plan.released)  # not every stage may have been told
            self.allocator.cache.tier.end_step(step.plan.step, is_done=False)
            for request in step.requests:
                request.tell_anew()
                request.pace.is_disturbed = True
                self._set_down(request, step.plan.step, has_failed=True)

    # Being observed

    def num_blocks_alone(self, request: Request) -> int:
        """Returns how many blocks would be free if it gave up its own."""
        return sum(self.allocator.reference_count(block_id) == 1 for block_id in request.block_table)

    @property
    def num_queued_tokens(self) -> int:
        """Counts tokens of its requests that are still to be prefilled."""
        return sum(other.num_remaining_tokens for other in self.running if not other.is_decoding)

    def check_invariants(self) -> None:
        """Raises AssertionError if a block is leaked or held twice, or a request is in steps that do not say so."""
        self.allocator.check_invariants()
        holders = {id(request): request for request in self.running}
        num_guessed: Counter[int] = Counter()
        for step, in_flight in self.in_flight.items():
            for chunk, request in zip(in_flight.plan.chunks, in_flight.requests, strict=True):
                assert request.steps.get(step) == len(chunk.token_ids), f"{request.request_id} is not in step {step}"
                holders[id(request)] = request
                num_guessed[id(request)] += chunk.num_drafts
                if not in_flight.plan.computing_slots:
                    self.prefixes.check_is_its_own(request, chunk)
        held = Counter(block_id for request in holders.values() for block_id in request.block_table)
        for block_id in range(self.allocator.num_blocks):
            references = self.allocator.reference_count(block_id)
            assert references == held[block_id], f"{held[block_id]} hold block {block_id}, {references} are counted"
        assert self._num_under_way() <= self._max_prefilling, "too many micro-batches in flight"
        assert len(self.in_flight) <= self._max_prefilling + 1, "more than one step is planned ahead"
        arrivals = [request.arrival for request in self.running]
        assert arrivals == sorted(set(arrivals)), "running requests are out of order"
        for request in self.running:
            request.check_invariants(self.in_flight.keys(), num_guessed[id(request)])

    def num_blocks_for(self, num_tokens: int) -> int:
        """Returns how many blocks hold this many tokens."""
        return num_blocks_for(num_tokens, self._settings.block_tokens)
