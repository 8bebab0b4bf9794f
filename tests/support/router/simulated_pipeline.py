"""Stages without tensors: what they keep of each step plan, and a "model" whose next token depends on every cached one.

Two stages a pipeline, each of which gets steps and is done with them in whatever order, but for chunks of one sequence:
a stage takes these in turn, and each needs all positions before its own. A step that was planned ahead waits in the
first stage's own `EarlySteps` until it is told what the last one has sampled, some time after that. A block that is
given out while an old step may still write to it, or a chunk that skips a position, shows as a wrong token. A stage may
be lost and replaced by an empty one or by its mirror, which joined at any time and is some messages behind; the other
one goes on with what it has. Marks are kept by the stages' own `StepWatermark`.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from common.ids import Generation, PipelineId, RequestId, SequenceId, StepId
from common.messages import Header, StepResult
from common.topology import LayerRange
from common.wire.array import array_to_frame, frame_to_array
from services.router.control.adoption import HeldCache, HeldSequence, HeldSlot, combine
from services.router.engine import GenerationRequest, SamplingParameters, Token
from services.router.mesh.step_message import step_message
from services.router.scheduling.request import count_tokens
from services.router.scheduling.step_plan import ScheduledChunk, StepPlan
from services.stage.model.logit_adjustments import KeptAdjustments, LogitAdjustments
from services.stage.slot.early_steps import EarlySteps
from services.stage.slot.step_watermark import StepWatermark

VOCABULARY_SIZE = 97


def next_token(token_ids: Sequence[int], seed: int) -> int:
    """The model: a checksum over all tokens so far."""
    return zlib.crc32(repr((tuple(token_ids), seed)).encode()) % VOCABULARY_SIZE


def reference_tokens(request: GenerationRequest) -> list[int]:
    """What the request must get."""
    tokens = list(request.prompt_token_ids)
    sampling = request.sampling
    while len(tokens) - len(request.prompt_token_ids) < sampling.max_tokens:
        tokens.append(next_token(tokens, sampling.seed))
        if tokens[-1] in sampling.stop_token_ids:
            break
    return tokens[len(request.prompt_token_ids) :]


def build_request(
    request_id: str, prompt_length: int, max_tokens: int, *, seed: int = 0, stop_token_ids: frozenset[int] = frozenset()
) -> GenerationRequest:
    """A request whose prompt is made from its seed. Every third one has penalties and biases, every fifth a bias."""
    prompt = tuple((seed * 31 + position * 7) % VOCABULARY_SIZE for position in range(prompt_length))
    sampling = SamplingParameters(
        max_tokens=max_tokens,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        seed=seed,
        num_top_logprobs=None,
        stop_token_ids=stop_token_ids,
        repetition_penalty=1.5 if seed % 3 == 1 else 1.0,
        frequency_penalty=0.25 if seed % 3 == 1 else 0.0,
        logit_bias=((seed % 90, 1.0), (95, -2.0)) if seed % 3 == 1 or seed % 5 == 2 else (),
        min_tokens=seed % 4 if seed % 3 == 1 else 0,
    )
    return GenerationRequest(RequestId(request_id), prompt, sampling, choice=0)


@dataclass
class SimulatedMirror:
    """What a holder has sent, in order, and what of it has been applied."""

    to_fill: list[int]
    """Places that were used when it joined and are not sent yet."""
    stream: deque[tuple[int, dict[int, int]]] = field(default_factory=deque)
    """Mark and rows of each message."""
    mark: int = 0
    cache: dict[int, int] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether it could take over."""
        return not self.to_fill and not self.stream

    def apply(self, count: int) -> None:
        """So many messages arrive."""
        for _ in range(min(count, len(self.stream))):
            self.mark, rows = self.stream.popleft()
            self.cache.update(rows)


@dataclass
class SimulatedStage:
    """A slot's holder: place -> token, and up to which step everything is there."""

    cache: dict[int, int] = field(default_factory=dict)
    marks: StepWatermark = field(default_factory=lambda: StepWatermark())  # looked up late: a test plants another
    computed: dict[SequenceId, int] = field(default_factory=dict)
    """Positions that it says it has of each sequence."""
    tier: dict[int, list[int]] = field(default_factory=dict)
    """By tier slot: what stood in a block."""
    tier_since: int = 0
    """The step at which that was empty."""
    mirror: SimulatedMirror | None = None
    has_been_complete: bool = False
    """Its mirror: from then on it may take over, however far it lags."""

    def note_computed(self, chunk: ScheduledChunk) -> None:
        """As block tables do: what stands behind a gap does not count, and the router counts on what is before a chunk
        whose blocks it tells anew."""
        computed = self.computed.get(chunk.sequence_id, 0)
        if chunk.block_offset == 0:
            computed = max(computed, chunk.start_position)
        if chunk.start_position <= computed:
            computed = max(computed, end_of(chunk))
        self.computed[chunk.sequence_id] = computed

    def send_to_mirror(self, rows: dict[int, int]) -> None:
        """With the mark, as it is now."""
        if self.mirror is not None:
            self.mirror.stream.append((self.marks.mark, rows))


def end_of(chunk: ScheduledChunk) -> int:
    """The position after its last token, where a token that is sampled stands."""
    return chunk.start_position + len(chunk.token_ids)


class SimulatedPipeline:
    """The stages of one pipeline in one generation."""

    def __init__(self, pipeline: PipelineId, generation: Generation, num_blocks: int, block_tokens: int) -> None:
        self.pipeline, self.generation = pipeline, generation
        self._num_blocks, self._block_tokens = num_blocks, block_tokens
        self._block_tables: dict[SequenceId, list[int]] = {}
        self._seen: set[SequenceId] = set()
        self._released: set[SequenceId] = set()
        self._adjustments = KeptAdjustments()
        """As the last stage keeps them in one generation."""
        self._stages = (SimulatedStage(), SimulatedStage())
        self._has_left: dict[StepId, int] = {}
        """How many stages have finished each step that is under way."""
        self._under_way: dict[StepId, StepPlan] = {}
        """With all tokens."""
        self._early_steps = EarlySteps()
        self._not_begun: dict[int, StepPlan] = {}
        self._sampled: dict[StepId, dict[SequenceId, tuple[Token, ...]]] = {}
        """What the last stage has sampled in steps that are not answered."""
        self._untold: deque[tuple[StepId, StepResult]] = deque()
        """What of that is on its way to the first stage."""

    def keep_tables_of(self, former: SimulatedPipeline) -> None:
        """The stages were there before this pipeline was closed and opened again."""
        self._block_tables, self._released = former._block_tables, former._released

    @property
    def num_known_sequences(self) -> int:
        """Sequences that the stages still keep something of."""
        return len(self._block_tables)

    @property
    def marks(self) -> tuple[int, int]:
        """What the holders of both slots say of their caches."""
        return self._stages[0].marks.mark, self._stages[1].marks.mark

    @property
    def tier_since(self) -> int:
        """Behind which step both have all that was saved."""
        return max(holder.tier_since for holder in self._stages)

    def join_mirror(self, stage: int) -> None:
        """A stage's mirror is connected, whatever is under way; a former one is given up."""
        holder = self._stages[stage]
        holder.mirror, holder.has_been_complete = SimulatedMirror(sorted(holder.cache)), False

    def fill_mirror(self, stage: int, num_places: int, num_messages: int) -> None:
        """The back-fill goes on with so many places; so many messages reach the mirror."""
        holder = self._stages[stage]
        if (mirror := holder.mirror) is not None:
            places, mirror.to_fill = mirror.to_fill[:num_places], mirror.to_fill[num_places:]
            if places:
                holder.send_to_mirror({place: holder.cache[place] for place in places})
            mirror.apply(num_messages)
            holder.has_been_complete |= mirror.is_complete

    def held(self) -> HeldCache:
        """What both stages tell a router that has been restarted, put together."""
        layers = LayerRange(0, 1)
        reports = [
            HeldSlot(
                self.pipeline,
                slot,
                2,
                layers,
                1,
                self._num_blocks,
                self._stages[slot].marks.newest,
                {
                    sequence_id: HeldSequence(tuple(table), self._stages[slot].computed.get(sequence_id, 0))
                    for sequence_id, table in self._block_tables.items()
                },
            )
            for slot in (0, 1)
        ]
        return combine(reports, self._block_tokens)

    def mirror(self, stage: int) -> None:
        """A stage's mirror is up to date now."""
        self.join_mirror(stage)
        self._stages[stage].send_to_mirror({})
        self.fill_mirror(stage, len(self._stages[stage].cache), 2)

    def resume(self, generation: Generation, lost: Sequence[int], mirrored: bool) -> None:
        """A new generation, in which other nodes hold the lost slots."""
        self.generation = generation
        self.drop_steps()
        self._adjustments = KeptAdjustments()
        for stage in lost:
            holder = self._stages[stage]
            mirror = holder.mirror if mirrored and holder.has_been_complete else None
            holder.cache = {} if mirror is None else mirror.cache
            holder.marks = StepWatermark(0 if mirror is None else mirror.mark)
            holder.mirror, holder.has_been_complete = None, False
            holder.computed.clear()
            holder.tier, holder.tier_since = {}, holder.marks.mark
        for holder in self._stages:
            holder.marks.begin_generation()

    def drop_steps(self) -> None:
        """What is under way is void."""
        self._has_left.clear()
        self._under_way.clear()
        self._early_steps = EarlySteps()
        self._not_begun.clear()
        self._sampled.clear()
        self._untold.clear()

    def before(self, plan: StepPlan) -> list[StepPlan]:
        """Steps with chunks of its sequences that come before its own, oldest first: under way, or waiting as it is."""
        own = {chunk.sequence_id for chunk in plan.chunks}
        others = [other for step, other in (self._under_way | self._not_begun).items() if step < plan.step]
        return [other for other in others if not own.isdisjoint(chunk.sequence_id for chunk in other.chunks)]

    def due(self, plan: StepPlan, in_flight: Sequence[StepPlan]) -> StepPlan:
        """Which of those in flight, in the order in which they were sent, must be answered first so that this one can
        be: with earlier chunks, or ahead of it in line while it waits, or itself."""
        own = [other for other in in_flight if other.pipeline == self.pipeline]
        if plan.step in self._not_begun:
            return own[0]
        before = [other.step for other in self.before(plan)]
        first = next((other for other in own if other.step in before), None)
        return plan if first is None else self.due(first, in_flight)  # it may wait for others of its own

    def send(self, plan: StepPlan) -> None:
        """The first stage gets the step, and is done with it at once."""
        self.deliver(plan)
        self.advance(plan)

    def deliver(self, plan: StepPlan) -> None:
        """The first stage gets the step, and begins it once it knows its tokens."""
        assert (plan.pipeline, plan.generation) == (self.pipeline, self.generation)
        self._not_begun[plan.step] = plan
        self._early_steps.add(step_message(plan), Header(step=plan.step), 0.0)
        self._begin_steps()

    def tell_samples(self) -> None:
        """What the last stage has sampled reaches the first one."""
        while self._untold:
            self._early_steps.note_samples(*self._untold.popleft())
            self._begin_steps()

    def _begin_steps(self) -> None:
        while (arrived := self._early_steps.pop()) is not None:
            plan = self._not_begun.pop(arrived.header.step)
            hidden = self._early_steps.with_tokens(arrived.step).hidden
            tokens = deque(frame_to_array(hidden, "int32", (None,), "Step.hidden").tolist())
            chunks = [
                replace(chunk, token_ids=tuple(tokens.popleft() for _ in chunk.token_ids))
                if not chunk.tier_slots
                else chunk
                for chunk in plan.chunks
            ]
            self._begin(replace(plan, chunks=tuple(chunks)))

    def _begin(self, plan: StepPlan) -> None:
        for sequence_id in plan.released:
            self._block_tables.pop(sequence_id, None)
            self._released.add(sequence_id)
            for holder in self._stages:
                holder.computed.pop(sequence_id, None)
        sequence_ids = [chunk.sequence_id for chunk in plan.chunks]
        assert len(sequence_ids) == len(set(sequence_ids)), "a sequence is in a step twice"
        for chunk in plan.chunks:
            assert chunk.sequence_id not in self._released, f"sequence {chunk.sequence_id} was released"
            if chunk.tier_slots:
                self._check_restored(plan, chunk)
                continue
            table = self._block_tables.setdefault(chunk.sequence_id, [])
            if chunk.block_offset == 0:
                table.clear()
            assert chunk.block_offset == len(table), "the stages know another number of blocks"
            assert all(0 <= block_id < self._num_blocks for block_id in chunk.new_block_ids)
            table.extend(chunk.new_block_ids)
            assert chunk.token_ids, "a chunk is empty"
            ahead = [own for other in self.before(plan) for own in other.chunks if own.sequence_id == chunk.sequence_id]
            assert not ahead or chunk.start_position == end_of(ahead[-1]), "chunks do not follow each other"
            end = chunk.start_position + len(chunk.token_ids)
            assert end <= len(table) * self._block_tokens, "blocks do not match"
        self._under_way[plan.step] = plan
        self._arrive(0, plan)

    def _check_restored(self, plan: StepPlan, chunk: ScheduledChunk) -> None:
        assert not chunk.samples
        assert chunk.start_position % self._block_tokens == 0
        assert len(chunk.token_ids) == len(chunk.new_block_ids) * self._block_tokens
        assert not plan.computing_slots
        assert not self.before(plan), "stages do not order it behind others of its sequence"

    def _copy(self, holder: SimulatedStage, plan: StepPlan) -> None:
        """As a stage does before it begins a step."""
        size = self._block_tokens
        for block_id, slot in plan.saves:
            holder.tier[slot] = [holder.cache[block_id * size + offset] for offset in range(size)]
        for slot, block_id in plan.restores:
            holder.cache |= {block_id * size + offset: holder.tier[slot][offset] for offset in range(size)}

    def advance(self, plan: StepPlan) -> bool:
        """The stage that has the step is done with it, and the next one gets it. False: the last stage is done. Nothing
        happens while the stage has one that comes before it."""
        if plan.step in self._not_begun:
            return True
        plan, stage = self._under_way[plan.step], self._has_left[plan.step]
        if stage == 2:
            return False
        if any(self._has_left[other.step] == stage for other in self.before(plan)):
            return True
        self._has_left[plan.step] += 1
        rows: dict[int, int] = {}
        if not plan.computing_slots or stage in plan.computing_slots:
            for chunk in plan.computed:
                rows |= self._write(self._stages[stage].cache, chunk)
                self._stages[stage].note_computed(chunk)
        for _, block_id in plan.restores:
            places = range(block_id * self._block_tokens, (block_id + 1) * self._block_tokens)
            rows |= {place: self._stages[stage].cache[place] for place in places}
        self._stages[stage].marks.finish(plan.step)
        if not plan.computing_slots or stage in plan.computing_slots:
            self._stages[stage].send_to_mirror(rows)
        if stage == 0:
            if plan.computing_slots == (1,):
                for chunk in plan.chunks:
                    slots = self._slots(chunk, chunk.start_position, end_of(chunk))
                    logged = [self._stages[0].cache[slot] for slot in slots]
                    assert logged == list(chunk.token_ids), "the log says something else"
            self._arrive(1, plan)
        else:
            self._sample_all(plan)
        return True

    def _sample_all(self, plan: StepPlan) -> None:
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        sampled = {chunk.sequence_id: self._sample(chunk) for chunk in sampling}
        self._check_adjustments(plan, sampling)
        drawn = [(sequence_id, token.token_id) for sequence_id, tokens in sampled.items() for token in tokens]
        self._adjustments.count([sequence_id for sequence_id, _ in drawn], [token_id for _, token_id in drawn])
        self._sampled[plan.step] = sampled
        self._untold.append((plan.step, _result_of(drawn)))

    def answer(self, plan: StepPlan) -> dict[SequenceId, tuple[Token, ...]]:
        """The last stage is done with the step."""
        assert not self.before(plan), "it cannot overtake them"
        if plan.step in self._not_begun:
            self.tell_samples()
        assert plan.step not in self._not_begun, "it waits for what nobody samples"
        while self.advance(plan):
            pass
        del self._has_left[plan.step], self._under_way[plan.step]
        return self._sampled.pop(plan.step)

    def _check_adjustments(self, plan: StepPlan, sampling: Sequence[ScheduledChunk]) -> None:
        """What the last stage keeps is what somebody who is told the whole past would have, drafts among it."""
        drafts = [np.array(chunk.draft_token_ids, dtype=np.int32) for chunk in sampling]
        sequence_ids = np.array([chunk.sequence_id for chunk in sampling])
        told = self._adjustments.apply(step_message(plan), sequence_ids, drafts)
        rows = [(chunk, number) for chunk in sampling for number in range(chunk.num_sampling_rows)]
        for row, (chunk, number) in enumerate(rows):
            self._check_row_of(told, row, chunk, number)

    def _check_row_of(self, told: LogitAdjustments | None, row: int, chunk: ScheduledChunk, num_before: int) -> None:
        """Of the row behind so many drafts of the chunk."""
        stop, num_generated = end_of(chunk) - chunk.num_drafts + num_before, chunk.num_generated + num_before
        tokens = [self._stages[1].cache[slot] for slot in self._slots(chunk, 0, stop)]
        prompt, generated = np.split(np.array(tokens), [len(tokens) - num_generated])
        wanted = chunk.sampling
        counted = prompt.tolist() if wanted.counts_prompt else []
        rows = np.frombuffer(count_tokens(counted, generated.tolist()), dtype=np.int32).reshape(-1, 3).tolist()
        biases = dict(wanted.logit_bias)
        if wanted.is_early(num_generated):
            biases |= dict.fromkeys(wanted.stop_token_ids, -np.inf)
        has = told is not None and bool(wanted.adjusts(num_generated))
        if told is None or not has:
            assert not has
            assert not biases
            return
        own = told.bias_places[:, 0] == row
        assert dict(zip(told.bias_places[own, 1].tolist(), told.biases[own].tolist(), strict=True)) == biases
        assert told.repetition_penalties[row] == wanted.repetition_penalty
        assert told.frequency_penalties[row] == wanted.frequency_penalty
        kept = sorted(told.token_counts[told.token_counts[:, 0] == row, 1:].tolist())
        assert kept == (rows if wanted.counts_tokens else []), "the last stage counts otherwise"

    def _arrive(self, stage: int, plan: StepPlan) -> None:
        self._stages[stage].marks.begin(plan.step, plan.previous_step)
        self._copy(self._stages[stage], plan)
        self._has_left[plan.step] = stage

    def _slots(self, chunk: ScheduledChunk, start: int, stop: int) -> list[int]:
        table = self._block_tables[chunk.sequence_id]
        size = self._block_tokens
        return [table[position // size] * size + position % size for position in range(start, stop)]

    def _write(self, cache: dict[int, int], chunk: ScheduledChunk) -> dict[int, int]:
        slots = self._slots(chunk, chunk.start_position, end_of(chunk))
        rows = dict(zip(slots, chunk.token_ids, strict=True))
        assert all(slot in cache for slot in self._slots(chunk, 0, chunk.start_position)), "a chunk skips positions"
        cache.update(rows)
        return rows

    def _sample(self, chunk: ScheduledChunk) -> tuple[Token, ...]:
        """The tokens after the drafts that are right, and the one after these."""
        slots = self._slots(chunk, 0, end_of(chunk))
        tokens = [self._stages[1].cache.get(slot) for slot in slots]
        assert tokens == [self._stages[0].cache.get(slot) for slot in slots], "the stages' caches differ"
        known = [token for token in tokens if token is not None]
        assert len(known) == len(tokens), "a place was never written to"
        sampled: list[Token] = []
        for stop in range(len(known) - chunk.num_drafts, len(known) + 1):
            sampled.append(Token(next_token(known[:stop], chunk.sampling.seed)))
            if known[stop : stop + 1] != [sampled[-1].token_id]:
                break
        return tuple(sampled)


def _result_of(sampled: Sequence[tuple[SequenceId, int]]) -> StepResult:
    count = len(sampled)
    return StepResult(
        array_to_frame(np.array([sequence_id for sequence_id, _ in sampled], dtype=np.int64)),
        array_to_frame(np.array([token_id for _, token_id in sampled], dtype=np.int32)),
        array_to_frame(np.zeros(count, dtype=np.float32)),
        array_to_frame(np.zeros((count, 0), dtype=np.int32)),
        array_to_frame(np.zeros((count, 0), dtype=np.float32)),
    )
