"""Drafts in steps: who may have how many, what comes of right ones, and what is left of wrong ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ExecutionError
from common.ids import Generation, PipelineId, RequestId
from services.router.engine import FinishReason, Token
from services.router.scheduling.drafts.drafting import DraftWish
from services.router.scheduling.drafts.prompt_lookup import PromptLookup
from services.router.scheduling.drafts.worthwhile import WorthwhileDrafter
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.step_plan import ComputedBy, StepPlan, TokenOutput
from tests.support.router.scheduling import (
    P0,
    P1,
    add,
    complete,
    is_idle,
    lengths_in,
    make_scheduler,
    only_plan,
    open_pipeline,
)
from tests.support.router.simulated_pipeline import build_request
from tests.unit.router.scheduling.drafts.shapes import BENCH

STOP = 7


@dataclass
class ScriptedDrafter:
    """It guesses what it is told to, by request, and keeps what it hears."""

    guesses: Mapping[str, Sequence[int]] = field(default_factory=dict)
    would: bool = False
    breaks_at: str = ""
    breaks_in: str = ""
    """The method that raises."""
    num_asked_ahead: int = 0
    heard: list[tuple[str, int, list[int]]] = field(default_factory=list)
    steps: list[tuple[int, float]] = field(default_factory=list)
    wishes: list[DraftWish] = field(default_factory=list)
    """Of the last step."""
    forgotten: list[str] = field(default_factory=list)

    def has_guess(self, wish: DraftWish) -> bool:
        if wish.request == self.breaks_at:
            raise ValueError("no guess")
        return bool(self.guesses.get(wish.request))

    def draft(
        self, pipeline: PipelineId, wishes: Sequence[DraftWish], num_rows: int, most: int
    ) -> Sequence[Sequence[int]]:
        self._break("draft")
        self.wishes = list(wishes)
        return [self.guesses[wish.request] for wish in wishes]

    def would_draft(self, pipeline: PipelineId, wishes: Sequence[DraftWish], num_rows: int, most: int) -> bool:
        self.num_asked_ahead += 1
        self._break("would_draft")
        return self.would

    def note_tokens(self, request: RequestId, num_before: int, token_ids: Sequence[int]) -> None:
        self.heard.append((request, num_before, list(token_ids)))

    def note_step(self, plan: StepPlan, seconds: float) -> None:
        self._break("note_step")
        self.steps.append((plan.num_drafts, seconds))

    def forget(self, request: RequestId) -> None:
        self.forgotten.append(request)

    def _break(self, method: str) -> None:
        if method == self.breaks_in:
            raise ValueError(method)


def drafting(guesses: Mapping[str, Sequence[int]], num_blocks: int = 100, **changes: Any) -> Scheduler:
    """A scheduler that drafts like that."""
    return make_scheduler(num_blocks, drafter=ScriptedDrafter(guesses), **changes)


def answer(scheduler: Scheduler, plan: StepPlan, *tokens: Sequence[int], now_s: float = 0.0) -> list[TokenOutput]:
    """Answers a step with these tokens of each of its sequences."""
    sampled = {
        chunk.sequence_id: tuple(Token(token_id) for token_id in own)
        for chunk, own in zip(plan.chunks, tokens, strict=True)
    }
    outputs = scheduler.complete(plan.step, sampled, now_s, computed_by=ComputedBy(7))
    scheduler.check_invariants()
    return outputs


def decoding(guesses: Mapping[str, Sequence[int]], *names: str, **changes: Any) -> Scheduler:
    """A scheduler whose requests, of 4 tokens each, have their first token, 1."""
    scheduler = drafting(guesses, **changes)
    add(scheduler, *names)
    plan = only_plan(scheduler)
    assert plan.num_drafts == 0, "the first token is not kept waiting by drafts"
    answer(scheduler, plan, *[[1] for _ in plan.chunks])
    return scheduler


@pytest.mark.parametrize("num_right", range(4))
def test_a_step_gives_as_many_tokens_as_drafts_were_right_and_one_more(num_right: int) -> None:
    scheduler = decoding({"a": (11, 12, 13)}, "a")
    plan = only_plan(scheduler)
    (chunk,) = plan.chunks
    assert (chunk.token_ids, chunk.start_position, chunk.num_drafts) == ((1, 11, 12, 13), 4, 3)
    assert (chunk.num_sampling_rows, chunk.num_generated) == (4, 1)
    tokens = [*[11, 12, 13][:num_right], 50]
    outputs = answer(scheduler, plan, tokens)
    assert [output.token.token_id for output in outputs] == tokens
    following = only_plan(scheduler)
    assert following.chunks[0].token_ids[0] == 50
    assert following.chunks[0].start_position == 5 + num_right
    counters = scheduler.snapshot().counters
    assert (counters.drafts_accepted, counters.drafts_rejected) == (num_right, 3 - num_right)
    assert counters.steps_with_drafts == 2


def test_a_drafter_hears_which_tokens_came_how_long_a_step_took_and_who_has_ended() -> None:
    drafter = ScriptedDrafter({"a": (11, 12)})
    scheduler = make_scheduler(drafter=drafter)
    add(scheduler, "a", max_tokens=4)
    complete(scheduler, only_plan(scheduler))
    answer(scheduler, only_plan(scheduler, 1.0), [11, 50], now_s=3.0)
    assert drafter.wishes[0].most == 2, "with one more it has its four tokens"
    answer(scheduler, only_plan(scheduler, 3.0), [51], now_s=3.5)
    assert drafter.heard == [("a", 0, [1]), ("a", 1, [11, 50]), ("a", 3, [51])]
    assert drafter.steps == [(2, 2.0), (0, 0.5)], "those that did nothing but decode"
    assert drafter.forgotten == ["a"]


def test_drafts_end_before_max_tokens_and_before_a_stop_token() -> None:
    scheduler = drafting({"a": (11, 12, 13, 14), "b": (11, STOP, 13)})
    add(scheduler, "a", max_tokens=4)
    request = build_request("b", 4, 10, seed=ord("b"), stop_token_ids=frozenset([STOP]))
    scheduler.add(request, 0.0)
    complete(scheduler, only_plan(scheduler))
    plan = only_plan(scheduler)
    assert [chunk.draft_token_ids for chunk in plan.chunks] == [(11, 12), (11,)]
    outputs = answer(scheduler, plan, [11, 12, 50], [11, STOP])
    assert [output.token.finish_reason for output in outputs] == [
        *[None, None, FinishReason.LENGTH], None, FinishReason.STOP,
    ]  # fmt: skip
    assert scheduler.snapshot().num_free_blocks == 100


def test_no_draft_goes_beyond_where_the_last_stage_is_told_other_biases() -> None:
    scheduler = drafting({"a": (11, 12, 13, 14)})
    request = build_request("a", 4, 10, seed=ord("a"), stop_token_ids=frozenset([STOP]))
    scheduler.add(replace(request, sampling=replace(request.sampling, min_tokens=4)), 0.0)
    complete(scheduler, only_plan(scheduler))
    early = only_plan(scheduler)
    assert (early.chunks[0].num_drafts, early.chunks[0].tells_adjustments) == (2, False), "3 tokens are too few to end"
    answer(scheduler, early, [11, 12, 50])
    late = only_plan(scheduler)
    assert (late.chunks[0].num_drafts, late.chunks[0].tells_adjustments) == (4, True)


def test_drafts_have_what_the_rest_leaves_of_a_step_the_oldest_first() -> None:
    guesses = {"a": range(11, 18), "b": (11, 12, 13), "c": (11, 12, 13)}
    scheduler = decoding(guesses, "a", "b", "c", max_batch_tokens=12)
    assert lengths_in(only_plan(scheduler)) == [8, 3, 1]


def test_nobody_drafts_in_a_step_that_reads_a_prompt_too() -> None:
    scheduler = decoding({"a": (11, 12, 13)}, "a")
    add(scheduler, "b", prompt_length=5)
    plan = only_plan(scheduler)
    assert lengths_in(plan) == [1, 5]
    answer(scheduler, plan, [50], [60])
    assert only_plan(scheduler).num_drafts == 3


def test_nobody_drafts_beside_another_step_and_such_steps_are_no_measure() -> None:
    drafter = ScriptedDrafter({"a": (11,), "b": (11,)})
    scheduler = make_scheduler(num_slots=2, drafter=drafter)
    add(scheduler, "a", "b")
    while len(plans := scheduler.schedule(0.0)) < 2 or any(not chunk.is_decode for chunk in plans[-1].chunks):
        for plan in plans:
            complete(scheduler, plan)
    assert [plan.num_drafts for plan in plans] == [1, 0]
    drafter.steps.clear()
    for plan in plans:
        answer(scheduler, plan, [50])
    assert drafter.steps == []


def test_a_request_that_says_so_drafts_nothing() -> None:
    scheduler = drafting({"a": (11,), "b": (11,)})
    scheduler.add(replace(build_request("a", 4, 10, seed=3), uses_drafts=False), 0.0)
    add(scheduler, "b")
    complete(scheduler, only_plan(scheduler))
    assert [chunk.num_drafts for chunk in only_plan(scheduler).chunks] == [0, 1]


def test_tokens_tell_which_of_them_were_guessed_and_how_many_guesses_came_to_nothing() -> None:
    scheduler = decoding({"a": (11, 12, 13)}, "a")
    tokens = [output.token for output in answer(scheduler, only_plan(scheduler), [11, 12, 50])]
    assert [(token.is_draft, token.num_rejected_drafts) for token in tokens] == [(True, 0), (True, 0), (False, 1)]
    assert scheduler.snapshot().counters.drafts_planned == 3


def test_drafts_take_blocks_only_while_one_is_left_for_each_that_runs() -> None:
    """Each request has two blocks, with room for three drafts in the second, and wants eight."""
    guesses = {"a": range(11, 19), "b": range(11, 19)}
    for num_blocks, expected in ((6, [4, 4]), (7, [8, 4]), (8, [9, 4]), (9, [9, 8]), (10, [9, 9])):
        scheduler = decoding(guesses, "a", "b", num_blocks=num_blocks, max_batch_tokens=64)
        plan = only_plan(scheduler)
        assert lengths_in(plan) == expected, num_blocks
        scheduler.check_invariants()
        assert scheduler.snapshot().counters.preemptions == 0


def test_what_was_rejected_is_computed_again_and_no_block_with_it_is_findable() -> None:
    scheduler = decoding({"a": (11, 12, 13)}, "a", caches_prefixes=True)
    before = scheduler.snapshot().num_cached_blocks
    answer(scheduler, only_plan(scheduler), [50])  # positions 4 to 7 are written, and 5 to 7 are of other tokens
    assert scheduler.snapshot().num_cached_blocks == before
    plan = only_plan(scheduler)
    assert (plan.chunks[0].start_position, plan.chunks[0].token_ids) == (5, (50, 11, 12, 13))
    answer(scheduler, plan, [11, 12, 51])
    assert scheduler.snapshot().num_cached_blocks == before + 1, "positions 4 to 7 are of tokens that came"


def test_a_step_with_drafts_is_followed_by_none_before_it_is_answered() -> None:
    scheduler = decoding({"a": (11,)}, "a", plans_ahead=True)
    assert only_plan(scheduler).num_drafts == 1


@pytest.mark.parametrize("would", [False, True])
def test_a_step_is_not_planned_ahead_where_drafts_are_worth_more(would: bool) -> None:
    drafter = ScriptedDrafter(would=would)
    scheduler = make_scheduler(drafter=drafter, plans_ahead=True)
    add(scheduler, "a")
    complete(scheduler, only_plan(scheduler))
    now, _ = scheduler.schedule(0.0)
    drafter.guesses = {"a": (11, 12)}
    complete(scheduler, now)
    assert len(scheduler.schedule(0.0)) == (0 if would else 1)


def test_a_request_whose_last_step_failed_drafts_nothing() -> None:
    scheduler = decoding({"a": (11, 12)}, "a")
    plan = only_plan(scheduler)
    scheduler.fail_step(plan.step, ExecutionError("x"), 0.0)
    scheduler.check_invariants()
    again = only_plan(scheduler)
    assert (again.chunks[0].token_ids, again.chunks[0].start_position) == ((1,), 4)
    assert again.chunks[0].block_offset == 0
    answer(scheduler, again, [50])
    assert only_plan(scheduler).num_drafts == 2


def test_what_a_mark_covers_ends_with_the_drafts_that_were_right() -> None:
    scheduler = decoding({"a": (11, 12, 13)}, "a", num_slots=2)
    plan = only_plan(scheduler)
    answer(scheduler, plan, [11, 50])
    scheduler.suspend_pipeline(P0, 0.0)
    open_pipeline(scheduler, P0, Generation(2), 100, 2, 0.0, kv_marks=(plan.step, plan.step - 1))
    replay = only_plan(scheduler)
    assert replay.computing_slots == (1,)
    assert (replay.chunks[0].start_position, replay.chunks[0].token_ids) == (4, (1, 11)), "its drafts are not its own"


def test_a_request_that_is_cancelled_keeps_the_blocks_of_its_drafts_until_the_step_is_back() -> None:
    scheduler = decoding({"a": range(11, 19)}, "a")
    plan = only_plan(scheduler)
    assert scheduler.snapshot().num_free_blocks == 96
    scheduler.cancel(RequestId("a"))
    assert scheduler.snapshot().num_free_blocks == 96
    answer(scheduler, plan, [11, 12, 50])
    assert scheduler.snapshot().num_free_blocks == 100


@pytest.mark.parametrize("method", ["draft", "would_draft", "note_step"])
def test_a_drafter_that_raises_costs_its_pipeline_the_drafts_and_nothing_else(method: str) -> None:
    drafter = ScriptedDrafter({"a": (STOP,), "b": (STOP,)}, breaks_in=method)
    scheduler = make_scheduler(drafter=drafter, plans_ahead=True)
    open_pipeline(scheduler, P1, Generation(1), 100, 1, 0.0)
    for name in ("a", "b"):  # with a guess of which no draft is made, so that it asks about the step ahead too
        scheduler.add(build_request(name, 4, 10, seed=3, stop_token_ids=frozenset([STOP])), 0.0)
    now_s = 0.0
    errors: list[tuple[PipelineId, Exception]] = []
    while not is_idle(scheduler):
        now_s += 1.0
        scheduler.schedule(now_s)
        scheduler.check_invariants()
        complete(scheduler, scheduler.steps_in_flight[0].plan, now_s=now_s)
        errors += scheduler.pop_draft_errors()
    assert sorted((pipeline, str(error)) for pipeline, error in errors) == [(P0, method), (P1, method)]
    assert (scheduler.pop_failures(), scheduler.pop_renewals()) == ([], [])
    assert scheduler.snapshot().counters.requests_finished == 2
    drafter.breaks_in, drafter.guesses = "", {"c": (11,), "d": (11,)}
    scheduler.close_pipeline(P1, now_s)
    for name, num_drafts in (("c", 0), ("d", 1)):
        add(scheduler, name, max_tokens=3, now_s=now_s)
        complete(scheduler, only_plan(scheduler, now_s))
        assert scheduler.schedule(now_s)[0].num_drafts == num_drafts
        scheduler.close_pipeline(P0, now_s)
        open_pipeline(scheduler, P0, Generation(2), 100, 1, now_s)
        scheduler.cancel(RequestId(name))


def test_a_drafter_is_asked_once_a_step_whether_it_is_to_be_waited_for() -> None:
    drafter = ScriptedDrafter({"a": (11, 12)}, would=True)
    scheduler = make_scheduler(drafter=drafter, plans_ahead=True)
    add(scheduler, "a")
    complete(scheduler, only_plan(scheduler))
    drafter.guesses = {}
    scheduler.schedule(0.0)
    complete(scheduler, scheduler.steps_in_flight[0].plan)
    drafter.guesses = {"a": (11, 12)}
    num_before = drafter.num_asked_ahead
    for _ in range(5):
        assert scheduler.schedule(0.0) == []
    assert drafter.num_asked_ahead == num_before + 1


def test_answers_that_are_read_together_cost_nothing_but_drafts() -> None:
    """The router was late: the step ahead seems to have taken no time at all, and planning goes on."""
    repeating = replace(build_request("a", 8, 60, seed=3), prompt_token_ids=(5,) * 8)
    scheduler = make_scheduler(drafter=WorthwhileDrafter(PromptLookup(), BENCH, 8), plans_ahead=True)
    scheduler.add(repeating, 0.0)
    answer(scheduler, only_plan(scheduler, 1.0), [5], now_s=1.1)
    first, ahead = scheduler.schedule(1.2)
    answer(scheduler, first, [5], now_s=2.0)
    answer(scheduler, ahead, [5], now_s=2.0)
    now_s = 2.0
    while not is_idle(scheduler):
        scheduler.schedule(now_s)
        now_s += 1.0
        assert (scheduler.pop_failures(), scheduler.pop_renewals(), scheduler.pop_draft_errors()) == ([], [], [])
        plan = scheduler.steps_in_flight[0].plan
        answer(scheduler, plan, [*plan.chunks[0].draft_token_ids, 5], now_s=now_s)
    assert scheduler.snapshot().counters.drafts_accepted > 0, "they come back"


def test_a_guess_that_raises_costs_its_request_alone() -> None:
    drafter = ScriptedDrafter({"a": (11,), "b": (11,)}, breaks_at="a")
    scheduler = make_scheduler(drafter=drafter)
    add(scheduler, "a", "b")
    complete(scheduler, only_plan(scheduler))
    plans = scheduler.schedule(0.0)
    (failure,) = scheduler.pop_failures()
    assert failure.request_id == "a"
    assert isinstance(failure.cause, ValueError)
    assert not scheduler.pop_renewals()
    outputs = answer(scheduler, plans[0], [50], [11, 51])
    assert [output.request_id for output in outputs] == ["b", "b"]
    assert drafter.forgotten == ["a"]


def test_blocks_that_wrong_drafts_have_left_to_one_hide_no_others_that_find_none() -> None:
    """Planned ahead, a step preempts nobody: b and c wait for blocks of each other in the open."""
    drafter = ScriptedDrafter()
    scheduler = make_scheduler(13, drafter=drafter, plans_ahead=True)
    for name, prompt_length in (("a", 4), ("b", 6), ("c", 6)):
        add(scheduler, name, prompt_length=prompt_length, max_tokens=20)
    complete(scheduler, only_plan(scheduler))
    drafter.guesses, drafter.would = {"a": [60] * 16}, True
    complete(scheduler, only_plan(scheduler), 50)
    drafter.guesses = {}
    while not is_idle(scheduler):
        scheduler.schedule(0.0)
        scheduler.check_invariants()
        complete(scheduler, scheduler.steps_in_flight[0].plan, 50)
    counters = scheduler.snapshot().counters
    assert (counters.requests_finished, counters.preemptions) == (3, 1)


@settings(max_examples=300, deadline=None)
@given(
    num_blocks=st.integers(10, 16),
    prompt_lengths=st.lists(st.integers(1, 8), min_size=3, max_size=4),
    num_wrong=st.integers(8, 20),
    turns=st.lists(st.booleans(), min_size=1, max_size=8),
)
def test_wrong_drafts_that_come_and_go_in_a_small_pool_cost_nobody_its_place(
    num_blocks: int, prompt_lengths: list[int], num_wrong: int, turns: list[bool]
) -> None:
    drafter = ScriptedDrafter()
    scheduler = make_scheduler(num_blocks, drafter=drafter, plans_ahead=True, max_batch_tokens=32)
    for number, prompt_length in enumerate(prompt_lengths):
        scheduler.add(build_request(f"{number}", prompt_length, 20, seed=number), 0.0)
    turns = list(turns)
    for _ in range(1000):
        drafter.would = bool(turns) and turns.pop()
        drafter.guesses = {"0": [60] * num_wrong} if drafter.would else {}
        scheduler.schedule(0.0)
        scheduler.check_invariants()
        if is_idle(scheduler):
            break
        complete(scheduler, scheduler.steps_in_flight[0].plan, 50)
    assert scheduler.snapshot().counters.requests_finished == len(prompt_lengths)
