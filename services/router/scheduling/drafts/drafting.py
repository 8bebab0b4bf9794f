"""Drafts in the steps of a pipeline: who may have how many, in which rows and blocks.

A draft is a token that is guessed to come next. It is computed behind the last known token, in the same step, and
counts if the last stage samples just that: then the step has given one token more. If not, nothing comes of its row.
So drafts cost rows, and change no token. What is guessed, and how much of it is worth its rows, a `Drafter` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from common.ids import PipelineId, RequestId, StepId
from services.router.scheduling.admission import num_blocks_for
from services.router.scheduling.blocks.block_allocator import BlockAllocator
from services.router.scheduling.request import Blame, Request
from services.router.scheduling.step_plan import ScheduledChunk, StepPlan


@dataclass(frozen=True, slots=True)
class DraftWish:
    """A request that decodes, and may draft."""

    request: RequestId
    prompt: Sequence[int]
    generated: Sequence[int]
    """What is known of it."""
    most: int
    """So many drafts may it have, 1 or more."""


class Drafter(Protocol):
    """Guesses how requests go on, and says which guesses are worth their rows; for all pipelines."""

    def has_guess(self, wish: DraftWish) -> bool:
        """Looks at a request, and returns whether it has a guess at how it goes on. What follows is asked about those
        of which it has just said so."""

    def draft(
        self, pipeline: PipelineId, wishes: Sequence[DraftWish], num_rows: int, most: int
    ) -> Sequence[Sequence[int]]:
        """Returns the drafts of each, none or more, in a step that has `num_rows` rows without them: at most `most` in
        all."""

    def would_draft(self, pipeline: PipelineId, wishes: Sequence[DraftWish], num_rows: int, most: int) -> bool:
        """Returns whether it is worth while that one of these, each of which gets one more token first, drafts in the
        step after that: then this is not planned before these tokens are known. It changes nothing, and is asked once a
        step."""

    def note_tokens(self, request: RequestId, num_before: int, token_ids: Sequence[int]) -> None:
        """Notes which tokens a step has given a request, behind so many generated ones."""

    def note_step(self, plan: StepPlan, seconds: float) -> None:
        """Notes how long a step took, from the answer to the one before it: one that did nothing but decode, and had
        the pipeline to itself. 0: both answers were read together; then the one before seemed to take its time too."""

    def forget(self, request: RequestId) -> None:
        """Forgets a request that has ended; it may never have heard of that."""


class PipelineDrafts:
    """The drafts of one pipeline. An exception of its drafter's ends them, and costs nothing else, but one over a
    request's own guess or tokens, which ends that request."""

    def __init__(
        self, drafter: Drafter | None, pipeline: PipelineId, allocator: BlockAllocator, max_rows: int, blame: Blame
    ) -> None:
        """Without a drafter there are none. `max_rows`: of a step."""
        self._drafter = drafter
        self._error: Exception | None = None
        self._asked_of: StepId | None = None
        self._was_worth_waiting = False
        self._pipeline = pipeline
        self._allocator = allocator
        self._max_rows = max_rows
        self._blame = blame

    def add_to(self, step: StepId, chunks: dict[Request, ScheduledChunk], num_spare_blocks: int) -> None:
        """Lets those that decode draft, in what is left of a step that is being planned, and of so many blocks: nobody
        gives up any for drafts. In a step that does more than decode nobody drafts: what that costs is not known."""
        if self._drafter is None or not all(chunk.is_decode for chunk in chunks.values()):
            return
        decoding = {request.request_id: request for request in chunks if request.generated_token_ids}
        wishes = self._wishes(self._drafter, decoding.values(), 0)
        num_rows = len(chunks)
        most = self._max_rows - num_rows
        if not wishes or most < 1:
            return
        guesses: list[tuple[DraftWish, Sequence[int]]] = []
        with self._ending_drafts():
            drafts_of = self._drafter.draft(self._pipeline, wishes, num_rows, most)
            guesses = list(zip(wishes, drafts_of, strict=True))
        for wish, guessed in guesses:
            request = decoding[wish.request]
            with self._blame.handling(request):
                drafts = _until_stop(request, guessed)[: min(wish.most, most)]
                chunk = self._with_drafts(request, chunks[request], drafts, num_spare_blocks)
                num_spare_blocks -= len(chunk.new_block_ids) - len(chunks[request].new_block_ids)
                most -= chunk.num_drafts
                chunks[request], request.steps[step] = chunk, len(chunk.token_ids)

    def are_worth_waiting_for(self, under_way: StepId, going_on: Sequence[Request]) -> bool:
        """Returns whether the step in which these go on had better be planned once the tokens that are under way are
        known: then it has drafts. Until then that is asked for many times, and looked at once."""
        if self._asked_of != under_way:
            self._asked_of, self._was_worth_waiting = under_way, self._would_draft(going_on)
        return self._was_worth_waiting

    def _would_draft(self, going_on: Sequence[Request]) -> bool:
        if self._drafter is None:
            return False
        wishes = self._wishes(self._drafter, going_on, 1)
        most = self._max_rows - len(going_on)
        if not wishes or most < 1:
            return False
        with self._ending_drafts():
            return self._drafter.would_draft(self._pipeline, wishes, len(going_on), most)
        return False

    def note_step(self, plan: StepPlan, seconds: float) -> None:
        """Notes how long a step took, from the answer to the one before it, that had the pipeline to itself."""
        if self._drafter is not None and all(chunk.is_decode for chunk in plan.chunks):
            with self._ending_drafts():
                self._drafter.note_step(plan, seconds)

    def pop_error(self) -> Exception | None:
        """Returns what has ended the drafts since the last call; None: nothing has."""
        error, self._error = self._error, None
        return error

    @contextmanager
    def _ending_drafts(self) -> Iterator[None]:
        """Ends the drafts if what is done in it raises: nobody needs them."""
        try:
            yield
        except Exception as error:
            self._drafter, self._error = None, error

    def _wishes(self, drafter: Drafter, requests: Iterable[Request], num_unseen: int) -> list[DraftWish]:
        """Returns who may draft, and what, behind so many tokens that are not known yet."""
        wishes: list[DraftWish] = []
        for request in requests:
            with self._blame.handling(request):
                asked, most = request.generation_request, request.max_drafts(num_unseen)
                wish = DraftWish(request.request_id, asked.prompt_token_ids, request.generated_token_ids, most)
                if asked.uses_drafts and most > 0 and drafter.has_guess(wish):
                    wishes.append(wish)
        return wishes

    def _with_drafts(
        self, request: Request, chunk: ScheduledChunk, drafts: tuple[int, ...], num_spare_blocks: int
    ) -> ScheduledChunk:
        """Returns a chunk with as many of these drafts as there are blocks for."""
        num_own, stop = len(request.block_table), chunk.start_position + 1
        drafts = drafts[: (num_own + max(0, num_spare_blocks)) * request.block_tokens - stop]
        num_wanted = num_blocks_for(stop + len(drafts), request.block_tokens) - num_own
        new_block_ids = self._allocator.allocate(max(0, num_wanted))
        assert new_block_ids is not None, "spare blocks are free"
        request.block_table.extend(new_block_ids)
        request.num_told_blocks = len(request.block_table)
        return replace(
            chunk,
            token_ids=chunk.token_ids + drafts,
            new_block_ids=chunk.new_block_ids + new_block_ids,
            num_drafts=len(drafts),
        )


def _until_stop(request: Request, guessed: Sequence[int]) -> tuple[int, ...]:
    """Returns what is guessed before the request ends: nothing would come of what is behind that."""
    stops = request.generation_request.sampling.stop_token_ids
    return tuple(guessed[: next((place for place, token in enumerate(guessed) if token in stops), len(guessed))])
