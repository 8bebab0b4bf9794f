"""A drafter that knows how requests go on, and errs now and then; by numbers alone, so that a run can be repeated."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

from common.ids import PipelineId, RequestId
from services.router.scheduling.drafts.drafting import DraftWish
from services.router.scheduling.step_plan import StepPlan


class ErringDrafter:
    """A `Drafter`."""

    def __init__(self, expected: Mapping[RequestId, Sequence[int]], most_tokens: int, rate: float = 0.8) -> None:
        """`expected`: all tokens of each request, of which one is guessed right at this rate."""
        self._expected = expected
        self._most_tokens = most_tokens
        self._rate = rate
        self.is_on = True
        self.forgotten: set[RequestId] = set()
        self._asked: set[RequestId] = set()

    @property
    def num_remembered(self) -> int:
        """Requests that it was asked about and has not been told to forget."""
        return len(self._asked - self.forgotten)

    def has_guess(self, wish: DraftWish) -> bool:
        assert wish.most > 0
        assert wish.request not in self.forgotten, "it has ended"
        self._asked.add(wish.request)
        return bool(self._guess(wish))

    def draft(
        self, pipeline: PipelineId, wishes: Sequence[DraftWish], num_rows: int, most: int
    ) -> Sequence[Sequence[int]]:
        assert most > 0
        return [self._guess(wish) for wish in wishes]

    def would_draft(self, pipeline: PipelineId, wishes: Sequence[DraftWish], num_rows: int, most: int) -> bool:
        return any(len(self._guess(wish)) > 1 for wish in wishes)

    def note_tokens(self, request: RequestId, num_before: int, token_ids: Sequence[int]) -> None:
        expected = self._expected[request][num_before:]
        assert list(token_ids) == list(expected[: len(token_ids)]), "it hears of other tokens than there are"

    def note_step(self, plan: StepPlan, seconds: float) -> None:
        assert plan.chunks
        assert seconds >= 0

    def forget(self, request: RequestId) -> None:
        self.forgotten.add(request)

    def _guess(self, wish: DraftWish) -> list[int]:
        """More than there are tokens left, perhaps, and all wrong from some place on; nothing while it is off."""
        if not self.is_on:
            return []
        place = len(wish.generated)
        drawn = zlib.crc32(repr((tuple(wish.generated[-3:]), place)).encode())
        right = [*self._right(wish)][: drawn % (self._most_tokens + 1)]
        return [
            token if zlib.crc32(repr((drawn, number)).encode()) % 1000 < 1000 * self._rate else (token + 1) % 90
            for number, token in enumerate(right)
        ]

    def _right(self, wish: DraftWish) -> Sequence[int]:
        """What comes, and then something else."""
        return [*self._expected[wish.request][len(wish.generated) :], 0, 0, 0, 0]


class RecordedDrafter(ErringDrafter):
    """It knows answers by their prompts; of several to one prompt it means the first that has begun like that."""

    def __init__(self, answers: Sequence[tuple[Sequence[int], Sequence[int]]], most_tokens: int, rate: float) -> None:
        """`answers`: prompt and answer."""
        super().__init__({}, most_tokens, rate)
        self._answers: dict[tuple[int, ...], list[list[int]]] = {}
        for prompt, answer in answers:
            self._answers.setdefault(tuple(prompt), []).append(list(answer))

    def note_tokens(self, request: RequestId, num_before: int, token_ids: Sequence[int]) -> None:
        """It believes whatever comes: the test will see."""

    def _right(self, wish: DraftWish) -> Sequence[int]:
        generated = list(wish.generated)
        known = self._answers.get(tuple(wish.prompt), [])
        return next((own[len(generated) :] for own in known if own[: len(generated)] == generated), [])
