"""The drafter that mesh and tests run: guesses of a source, as many as acceptance and bandwidth make worth their rows.

Each guess is held against the tokens that come, drafted or not. So it is known what drafts would be worth while none
are made, and they come back by themselves when a text begins to repeat itself. Pure.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from operator import eq

from common.ids import PipelineId, RequestId
from services.router.scheduling.drafts.acceptance import Acceptance
from services.router.scheduling.drafts.drafting import DraftWish
from services.router.scheduling.drafts.row_choice import choose_rows
from services.router.scheduling.drafts.source import DraftSource, Guess
from services.router.scheduling.drafts.step_times import Manner, StepShape, StepTimes

FIRST_DRAFTS = 3
"""So many drafts a step has that is the first for a while, or as many as it has rows: what they really cost is not known
yet."""


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

    def draft(self, pipeline: PipelineId, wishes: Sequence[DraftWish], num_rows: int, most: int) -> list[Sequence[int]]:
        """See `Drafter`."""
        counts = self._choose(pipeline, wishes, num_rows, most, num_unseen=0)
        return [self._guess(wish).token_ids[: counts.get(wish.request, 0)] for wish in wishes]

    def would_draft(self, pipeline: PipelineId, wishes: Sequence[DraftWish], num_rows: int, most: int) -> bool:
        """See `Drafter`."""
        return bool(self._choose(pipeline, wishes, num_rows, most, num_unseen=1))

    def note_tokens(self, request: RequestId, num_before: int, token_ids: Sequence[int]) -> None:
        """See `Drafter`."""
        position, guess = self._guesses.pop(request, (-1, Guess()))
        if position == num_before and guess.token_ids:
            is_right = map(eq, guess.token_ids, token_ids)
            num_right = sum(1 for _ in itertools.takewhile(bool, is_right))
            has_wrong = num_right < min(len(guess.token_ids), len(token_ids))
            self._acceptance.note(request, guess.grade, num_right, has_wrong=has_wrong)

    def note_step(self, pipeline: PipelineId, manner: Manner, num_rows: int, seconds: float) -> None:
        """See `Drafter`."""
        self._times_of(pipeline).note(manner, num_rows, seconds)

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
        """Returns what is guessed to come next, made once: it is asked for with the step that is planned, and with the
        one after it."""
        num_generated = len(wish.generated)
        position, guess = self._guesses.get(wish.request, (-1, Guess()))
        if position != num_generated:
            guess = self._source.propose(wish.request, wish.prompt, wish.generated, self._most_per_sequence)
            self._guesses[wish.request] = (num_generated, guess)
        return guess

    def _choose(
        self, pipeline: PipelineId, wishes: Sequence[DraftWish], num_rows: int, most: int, num_unseen: int
    ) -> Mapping[RequestId, int]:
        """Returns how many drafts are worth it, of those that have any, behind so many tokens of each that are about to
        be known."""
        times = self._times_of(pipeline)
        undrafted_s = times.undrafted_s(num_rows)
        guesses = {wish.request: guess for wish in wishes if (guess := self._guess(wish)).token_ids}
        if undrafted_s is None or not guesses:
            return {}
        most_of = {wish.request: wish.most for wish in wishes}
        gains: list[list[float]] = []
        for request, guess in guesses.items():
            num_tokens = min(len(guess.token_ids), num_unseen + most_of[request])
            rates = self._acceptance.rates(request, guess.grade, num_tokens)
            gains.append(list(itertools.accumulate(rates, operator.mul))[num_unseen:])
        if not times.knows_drafts:
            most = min(most, max(FIRST_DRAFTS, num_rows))
        others: list[list[float]] = [[]] * (num_rows - len(gains))
        counts = choose_rows(gains + others, most, undrafted_s, times.drafted_s)
        return {request: count for request, count in zip(guesses, counts, strict=False) if count}
