"""Simulated stages that remember of each row what it was really computed from: that is held against what is found."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from common.ids import Generation, PipelineId, SequenceId, StepId
from services.router.engine import GenerationRequest
from services.router.scheduling.step_plan import ComputedBy, ScheduledChunk, StepPlan
from tests.support.router.simulated_pipeline import SimulatedPipeline, end_of, reference_tokens


class Row(int):
    """A token in paged memory, which stands for its K and V, and what these were made from."""

    position: int
    prefix: int
    """A checksum of all tokens up to this one."""
    salt: str
    made_by: tuple[int, int]
    """The classes of the stage and of its experts."""
    is_clean: bool
    """No row that it was made from went on without an expert, or was made by other classes."""


@cache
def prefixes(request: GenerationRequest) -> list[int]:
    """By position, a checksum over the request's tokens up to there."""
    tokens = [*request.prompt_token_ids, *reference_tokens(request)]
    return list(accumulate(tokens, _prefix_with, initial=0))[1:]


def _prefix_with(before: int, token: int) -> int:
    return zlib.crc32(repr((before, int(token))).encode())


class WrittenRows(SimulatedPipeline):
    """A pipeline whose rows are `Row`. A request is told by its seed, which is its place in `requests`."""

    def __init__(
        self,
        pipeline: PipelineId,
        generation: Generation,
        num_blocks: int,
        block_tokens: int,
        requests: Sequence[GenerationRequest],
        *,
        degrades: bool = False,
    ) -> None:
        super().__init__(pipeline, generation, num_blocks, block_tokens)
        self._requests = requests
        self._degrades = degrades
        self.classes = [1, 1]
        """By slot."""
        self.expert_class = 1
        self.num_found = 0
        """Positions that no step of their sequence has computed."""
        self._experts_of: dict[StepId, set[int]] = {}
        self._advancing: StepPlan | None = None
        self._planned: dict[SequenceId, int] = {}

    def computed_by(self, plan: StepPlan) -> ComputedBy:
        """What the last stage says with its answer."""
        experts = self._experts_of.pop(plan.step, {self.expert_class})
        number = zlib.crc32(repr((self.classes, experts)).encode()) + 1 if len(experts) == 1 else 0
        degraded = (chunk.sequence_id for chunk in plan.computed if self._is_degraded(plan, chunk))
        return ComputedBy(number, frozenset(degraded))

    def _is_degraded(self, plan: StepPlan, chunk: ScheduledChunk) -> bool:
        return self._degrades and zlib.crc32(repr((plan.step, chunk.sequence_id)).encode()) % 6 == 0

    def drop_steps(self) -> None:
        for plan in reversed(self._under_way.values()):
            if not plan.computing_slots:  # what is before its first chunk that is void was found, and looked at
                self._planned.update((chunk.sequence_id, chunk.start_position) for chunk in plan.computed)
        super().drop_steps()

    def _begin(self, plan: StepPlan) -> None:
        super()._begin(plan)
        for chunk in plan.computed:
            if not plan.computing_slots:
                # A restarted router may count less than the one before it.
                before = min(self._planned.get(chunk.sequence_id, 0), chunk.start_position)
                self._check_found(chunk, before)
                self._planned[chunk.sequence_id] = end_of(chunk)

    def _check_found(self, chunk: ScheduledChunk, before: int) -> None:
        """What was found is what this request would have computed, on both slots."""
        experts = set()
        for stage in (0, 1):
            slots = self._slots(chunk, before, chunk.start_position)
            for position, slot in enumerate(slots, before):
                found = self._check_row(chunk, self._stages[stage].cache, position, slot)
                assert self._requests[chunk.sampling.seed].uses_cache, "it was not to find anything"
                assert found.is_clean, "what was found is degraded, or of mixed classes"
                assert found.made_by[0] == self.classes[stage], "a stage of another class has computed it"
                experts.add(found.made_by[1])
            self.num_found += len(slots)
        assert len(experts) < 2, "mixed classes of experts have computed what was found"

    def _check_row(self, chunk: ScheduledChunk, cache: dict[int, int], position: int, slot: int) -> Row:
        request, found = self._requests[chunk.sampling.seed], cache.get(slot)
        assert isinstance(found, Row), "a place was never written to"
        assert found.position == position, "what is there stood elsewhere"
        assert found.prefix == prefixes(request)[position], "what is there is of another text"
        assert found.salt == request.cache_salt, "what is there is of another salt"
        return found

    def advance(self, plan: StepPlan) -> bool:
        self._advancing = plan
        return super().advance(plan)

    def _write(self, cache: dict[int, int], chunk: ScheduledChunk) -> dict[int, int]:
        assert self._advancing is not None
        stage = 0 if cache is self._stages[0].cache else 1
        made_by = (self.classes[stage], self.expert_class)
        self._experts_of.setdefault(self._advancing.step, set()).add(self.expert_class)
        slots = self._slots(chunk, 0, chunk.start_position)
        earlier = [self._check_row(chunk, cache, position, slot) for position, slot in enumerate(slots)]
        prefix = earlier[-1].prefix if earlier else 0
        is_clean = all(row.is_clean and row.made_by == made_by for row in earlier)
        is_clean = is_clean and not self._is_degraded(self._advancing, chunk)
        request = self._requests[chunk.sampling.seed]
        rows: dict[int, int] = {}
        for slot, position in zip(
            self._slots(chunk, chunk.start_position, end_of(chunk)),
            range(chunk.start_position, end_of(chunk)),
            strict=True,
        ):
            made = Row(chunk.token_ids[position - chunk.start_position])
            prefix = _prefix_with(prefix, made)
            made.position, made.prefix, made.salt = position, prefix, request.cache_salt
            made.made_by, made.is_clean = made_by, is_clean
            rows[slot] = made
        cache.update(rows)
        return rows
