"""Stages without tensors: what they keep of each step plan, and a "model" whose next token depends on every cached one.

Two stages a pipeline. The first writes its cache when a step is sent, the last when it is answered, in whatever order
that is. A block that is given out while an old step may still write to it, or a chunk that skips a position, shows as a
wrong token. A stage may be lost and replaced by an empty one or by a mirror that is some steps behind; the other one
goes on with what it has.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from common.ids import Generation, PipelineId, RequestId, SequenceId
from common.topology import LayerRange
from services.router.control.adoption import HeldCache, HeldSequence, HeldSlot, combine
from services.router.engine import GenerationRequest
from services.router.scheduling.sampling_parameters import SamplingParameters
from services.router.scheduling.step_plan import SampledToken, ScheduledChunk, StepPlan

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
    """A request whose prompt is made from its seed."""
    prompt = tuple((seed * 31 + position * 7) % VOCABULARY_SIZE for position in range(prompt_length))
    sampling = SamplingParameters(
        max_tokens=max_tokens,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        seed=seed,
        num_top_logprobs=None,
        stop_token_ids=stop_token_ids,
    )
    return GenerationRequest(RequestId(request_id), prompt, sampling, choice=0)


class SimulatedPipeline:
    """The stages of one pipeline in one generation."""

    def __init__(self, pipeline: PipelineId, generation: Generation, num_blocks: int, block_tokens: int) -> None:
        self.pipeline, self.generation = pipeline, generation
        self._num_blocks, self._block_tokens = num_blocks, block_tokens
        self._block_tables: dict[SequenceId, list[int]] = {}
        self._seen: set[SequenceId] = set()
        self._released: set[SequenceId] = set()
        self._caches: tuple[dict[int, int], dict[int, int]] = ({}, {})
        """By stage: place -> token."""
        self._marks = [0, 0]
        self._computed: tuple[dict[SequenceId, int], dict[SequenceId, int]] = ({}, {})
        """By stage: positions that it says it has of each sequence."""
        self._mirrors: list[tuple[int, dict[int, int]]] = [(0, {}), (0, {})]
        """By stage: up to which step, and what the cache was then."""

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
        return self._marks[0], self._marks[1]

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
                self._marks[slot],
                {
                    sequence_id: HeldSequence(tuple(table), self._computed[slot].get(sequence_id, 0))
                    for sequence_id, table in self._block_tables.items()
                },
            )
            for slot in (0, 1)
        ]
        return combine(reports, self._block_tokens)

    def mirror(self, stage: int) -> None:
        """A stage's mirror is up to date now."""
        self._mirrors[stage] = self._marks[stage], dict(self._caches[stage])

    def resume(self, generation: Generation, lost: Sequence[int], mirrored: bool) -> None:
        """A new generation, in which other nodes hold the lost slots."""
        self.generation = generation
        for stage in lost:
            self._marks[stage], cache = self._mirrors[stage] if mirrored else (0, {})
            self._caches[stage].clear()
            self._caches[stage].update(cache)
            self._mirrors[stage] = (0, {})

    def send(self, plan: StepPlan) -> None:
        """The first stage takes the step."""
        assert (plan.pipeline, plan.generation) == (self.pipeline, self.generation)
        for sequence_id in plan.released:
            self._block_tables.pop(sequence_id, None)
            self._released.add(sequence_id)
            for computed in self._computed:
                computed.pop(sequence_id, None)
        sequence_ids = [chunk.sequence_id for chunk in plan.chunks]
        assert len(sequence_ids) == len(set(sequence_ids)), "a sequence is in a step twice"
        for chunk in plan.chunks:
            assert chunk.sequence_id not in self._released, f"sequence {chunk.sequence_id} was released"
            table = self._block_tables.setdefault(chunk.sequence_id, [])
            if chunk.block_offset == 0:
                table.clear()
            assert chunk.block_offset == len(table), "the stages know another number of blocks"
            assert all(0 <= block_id < self._num_blocks for block_id in chunk.new_block_ids)
            table.extend(chunk.new_block_ids)
            assert chunk.token_ids, "a chunk is empty"
            end = chunk.start_position + len(chunk.token_ids)
            assert end <= len(table) * self._block_tokens, "blocks do not match"
        self._compute(0, plan)

    def answer(self, plan: StepPlan) -> dict[SequenceId, SampledToken]:
        """The last stage is done with the step."""
        if 1 in plan.computing_slots and 0 not in plan.computing_slots:
            for chunk in plan.chunks:
                slots = self._slots(chunk, chunk.start_position, chunk.sampling_position)
                assert [self._caches[0][slot] for slot in slots] == list(chunk.token_ids), "the log says something else"
        self._compute(1, plan)
        return {
            chunk.sequence_id: SampledToken(self._sample(chunk), None, ()) for chunk in plan.chunks if chunk.samples
        }

    def _compute(self, stage: int, plan: StepPlan) -> None:
        if not plan.computing_slots or stage in plan.computing_slots:
            for chunk in plan.chunks:
                self._write(self._caches[stage], chunk)
                computed = self._computed[stage]
                computed[chunk.sequence_id] = max(computed.get(chunk.sequence_id, 0), chunk.sampling_position)
        self._marks[stage] = max(self._marks[stage], plan.step)

    def _slots(self, chunk: ScheduledChunk, start: int, stop: int) -> list[int]:
        table = self._block_tables[chunk.sequence_id]
        size = self._block_tokens
        return [table[position // size] * size + position % size for position in range(start, stop)]

    def _write(self, cache: dict[int, int], chunk: ScheduledChunk) -> None:
        slots = self._slots(chunk, chunk.start_position, chunk.sampling_position)
        cache.update(zip(slots, chunk.token_ids, strict=True))

    def _sample(self, chunk: ScheduledChunk) -> int:
        slots = self._slots(chunk, 0, chunk.sampling_position)
        tokens = [self._caches[1][slot] for slot in slots]
        assert tokens == [self._caches[0][slot] for slot in slots], "the stages' caches differ"
        return next_token(tokens, chunk.sampling.seed)
