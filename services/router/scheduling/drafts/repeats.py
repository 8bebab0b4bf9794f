"""Guesses that a text goes on as it did where its last tokens stood before; all that is guessed is drafted."""

from __future__ import annotations

from collections.abc import Sequence

from common.ids import PipelineId, RequestId
from services.router.scheduling.drafts.drafting import DraftWish
from services.router.scheduling.step_plan import StepPlan

RUN_TOKENS = 3
"""So many last tokens are looked for."""


class RepeatDrafter:
    """A `Drafter` that learns nothing."""

    def __init__(self, most_tokens: int) -> None:
        """`most_tokens`: as many may one request draft in a step."""
        self._most_tokens = most_tokens
        self._guesses: dict[RequestId, tuple[int, ...]] = {}

    def has_guess(self, wish: DraftWish) -> bool:
        """See `Drafter`."""
        tokens = (*wish.prompt, *wish.generated)
        run = tokens[-RUN_TOKENS:]
        starts = range(len(tokens) - RUN_TOKENS - 1, -1, -1)
        place = next((start for start in starts if tokens[start : start + RUN_TOKENS] == run), len(tokens))
        self._guesses[wish.request] = tokens[place + RUN_TOKENS :][: self._most_tokens]
        return bool(self._guesses[wish.request])

    def draft(
        self, pipeline: PipelineId, wishes: Sequence[DraftWish], num_rows: int, most: int
    ) -> Sequence[Sequence[int]]:
        """See `Drafter`. The oldest come first."""
        return [self._guesses[wish.request] for wish in wishes]

    def would_draft(self, pipeline: PipelineId, wishes: Sequence[DraftWish], num_rows: int, most: int) -> bool:
        """See `Drafter`."""
        return any(len(self._guesses[wish.request]) > 1 for wish in wishes)

    def note_tokens(self, request: RequestId, num_before: int, token_ids: Sequence[int]) -> None:
        """See `Drafter`."""

    def note_step(self, plan: StepPlan, planned_s: float, now_s: float) -> None:
        """See `Drafter`."""

    def forget(self, request: RequestId) -> None:
        """See `Drafter`."""
        self._guesses.pop(request, None)
