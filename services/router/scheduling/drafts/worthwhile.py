"""The drafter of a mesh: guesses of a source, as many as acceptance and bandwidth make worth their rows. Pure.

Each guess is held against the tokens that come, drafted or not. So it is known what drafts would be worth while none
are made, and they come back by themselves when a text begins to repeat itself.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

from common.ids import PipelineId, RequestId
from services.router.scheduling.drafts.acceptance import Acceptance
from services.router.scheduling.drafts.drafting import DraftWish
from services.router.scheduling.drafts.row_choice import choose_rows
from services.router.scheduling.drafts.source import DraftSource, Guess
from services.router.scheduling.drafts.step_times import Manner, StepShape, StepTimes
from services.router.scheduling.step_plan import StepPlan

FIRST_DRAFTS = 3
"""So many drafts, or as many as it has rows, has a step that is the first for a while: what they cost is not known."""


class WorthwhileDrafter:
    """See the module; it is a `Drafter`. It drafts nothing where that would lose, and as long as no step without drafts
    was measured lately. Texts are alike in all pipelines, so one knows what the other has seen; times are not."""

    def __init__(self, source: DraftSource, shape: StepShape, most_per_sequence: int) -> None:
        """`most_per_sequence`: as many tokens as one request may draft in a step, 1 or more."""
        self._source = source
        self._shape = shape
        self._most_per_sequence = most_per_sequence
        self._acceptance = Acceptance()
        self._times: dict[PipelineId, StepTimes] = {}
        self._guesses: dict[RequestId, tuple[int, Guess]] = {}
        """By request its newest, with how many generated tokens it is behind."""

    def has_guess(self, wish: DraftWish) -> bool:
        """See `Drafter`. There is one guess for each place in a text: it is asked about with the step that is planned,
        and with the one after it."""
        num_generated = len(wish.generated)
        position, guess = self._guesses.get(wish.request, (-1, Guess()))
        if position != num_generated:
            guess = self._source.propose(wish.request, wish.prompt, wish.generated, self._most_per_sequence)
            self._guesses[wish.request] = (num_generated, guess)
        return bool(guess.token_ids)

    def draft(
        self, pipeline: PipelineId, wishes: Sequence[DraftWish], num_rows: int, most: int
    ) -> Sequence[Sequence[int]]:
        """See `Drafter`."""
        counts = self._choose(pipeline, wishes, num_rows, most, num_unseen=0)
        return [self._guess(wish).token_ids[:count] for wish, count in zip(wishes, counts, strict=True)]

    def would_draft(self, pipeline: PipelineId, wishes: Sequence[DraftWish], num_rows: int, most: int) -> bool:
        """See `Drafter`."""
        return any(self._choose(pipeline, wishes, num_rows, most, num_unseen=1))

    def note_tokens(self, request: RequestId, num_before: int, token_ids: Sequence[int]) -> None:
        """See `Drafter`."""
        position, guess = self._guesses.pop(request, (-1, Guess()))
        if position == num_before and guess.token_ids:
            is_right = map(operator.eq, guess.token_ids, token_ids)
            num_right = sum(1 for _ in itertools.takewhile(bool, is_right))
            has_wrong = num_right < min(len(guess.token_ids), len(token_ids))
            self._acceptance.note(request, guess.grade, num_right, has_wrong=has_wrong)

    def note_step(self, plan: StepPlan, seconds: float) -> None:
        """See `Drafter`."""
        manner = Manner.AHEAD if plan.awaited_step else Manner.PLAIN
        self._times_of(plan.pipeline).note(Manner.DRAFTED if plan.num_drafts else manner, plan.num_tokens, seconds)

    def forget(self, request: RequestId) -> None:
        """See `Drafter`."""
        self._source.forget(request)
        self._acceptance.forget(request)
        self._guesses.pop(request, None)

    def _times_of(self, pipeline: PipelineId) -> StepTimes:
        if (times := self._times.get(pipeline)) is None:
            times = self._times[pipeline] = StepTimes(self._shape)
        return times

    def _guess(self, wish: DraftWish) -> Guess:
        return self._guesses[wish.request][1]

    def _choose(
        self, pipeline: PipelineId, wishes: Sequence[DraftWish], num_rows: int, most: int, num_unseen: int
    ) -> Sequence[int]:
        """Returns for each how many drafts are worth it, behind so many tokens that are about to be known."""
        times = self._times_of(pipeline)
        undrafted_s = times.undrafted_s(num_rows)
        if undrafted_s is None:
            return [0] * len(wishes)
        if not times.knows_drafts:
            most = min(most, max(FIRST_DRAFTS, num_rows))
        gains = [self._gains(wish, num_unseen, most) for wish in wishes]
        return choose_rows(num_rows, gains, most, undrafted_s, times.drafted_s)

    def _gains(self, wish: DraftWish, num_unseen: int, most: int) -> list[float]:
        """Returns for each draft, of `most` at most, how likely it and all before it are right."""
        guess = self._guess(wish)
        num_tokens = min(len(guess.token_ids), num_unseen + min(wish.most, most))
        rates = self._acceptance.rates(wish.request, guess.grade, num_tokens)
        return list(itertools.accumulate(rates, operator.mul))[num_unseen:]
