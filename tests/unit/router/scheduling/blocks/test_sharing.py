"""Requests that begin alike: what is computed once, and what is never found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from common.errors import ExecutionError
from common.ids import Generation, SequenceId
from services.router.engine import GenerationRequest, Token
from services.router.scheduling.blocks.block_allocator import BlockAllocator
from services.router.scheduling.blocks.sharing import PrefixSharing
from services.router.scheduling.request import Blame, Request
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.step_plan import ComputedBy, StepPlan
from tests.support.router.scheduling import P0, P1, make_scheduler, open_pipeline
from tests.support.router.simulated_pipeline import build_request

CLASS = ComputedBy(7)


def alike(name: str, length: int = 9, max_tokens: int = 4, **changes: object) -> GenerationRequest:
    """Its tokens are 0, 1, 2 ...; a block holds 4."""
    request = build_request(name, 1, max_tokens, seed=0)
    return replace(request, prompt_token_ids=tuple(range(length)), **changes)  # type: ignore[arg-type]


def caching(**changes: object) -> Scheduler:
    return make_scheduler(caches_prefixes=True, **changes)  # type: ignore[arg-type]


def go_on(scheduler: Scheduler, computed_by: ComputedBy = CLASS) -> list[tuple[StepPlan, list[Token]]]:
    """Answers what can be planned now. A token is 50."""
    answered = []
    for plan in scheduler.schedule(0.0):
        sampled = {chunk.sequence_id: (Token(50),) for chunk in plan.chunks if chunk.samples}
        outputs = scheduler.complete(plan.step, sampled, 0.0, computed_by=computed_by)
        scheduler.check_invariants()
        answered.append((plan, [output.token for output in outputs]))
    return answered


def finish(scheduler: Scheduler, computed_by: ComputedBy = CLASS) -> tuple[list[tuple[int, int]], int]:
    """Runs until nothing runs. Returns (start, tokens) of all chunks, and how many tokens were said to be found."""
    chunks, found = [], 0
    for _ in range(50):
        for plan, tokens in go_on(scheduler, computed_by):
            chunks += [(chunk.start_position, len(chunk.token_ids)) for chunk in plan.chunks]
            found += sum(token.num_cached_tokens for token in tokens)
        if not scheduler.snapshot().num_running + scheduler.snapshot().num_waiting:
            return chunks, found
    raise AssertionError("it does not end")


def run(scheduler: Scheduler, *requests: GenerationRequest) -> tuple[list[tuple[int, int]], int]:
    for request in requests:
        scheduler.add(request, 0.0)
    return finish(scheduler)


def test_a_prompt_that_comes_again_is_computed_from_its_last_token_on() -> None:
    scheduler = caching()
    assert run(scheduler, alike("a")) == ([(0, 9), (9, 1), (10, 1), (11, 1)], 0)
    assert run(scheduler, alike("b")) == ([(8, 1), (9, 1), (10, 1), (11, 1)], 8)
    assert run(scheduler, alike("c", length=8))[0][0] == (4, 4), "the last token is computed"
    longer = (*range(9), 50, 50, 50, 1)
    assert run(scheduler, replace(alike("d"), prompt_token_ids=longer))[0][0] == (12, 1), "with its answer"
    counters = scheduler.snapshot().counters.prefixes
    assert (counters.tokens_asked, counters.tokens_found) == (9 + 9 + 8 + 13, 8 + 4 + 12)


def test_nothing_is_found_where_the_cache_is_off_or_the_request_wants_none_or_has_another_salt() -> None:
    for scheduler, first, second in (
        (make_scheduler(), alike("a"), alike("b")),
        (caching(), alike("a"), alike("b", uses_cache=False)),
        (caching(), alike("a", uses_cache=False), alike("b")),
        (caching(), alike("a", cache_salt="x"), alike("b")),
    ):
        run(scheduler, first)
        assert run(scheduler, second) == ([(0, 9), (9, 1), (10, 1), (11, 1)], 0)


@pytest.mark.parametrize("by", [ComputedBy(0), ComputedBy(7, frozenset({SequenceId(1)}))])
def test_what_is_degraded_or_of_several_classes_is_never_found(by: ComputedBy) -> None:
    scheduler = caching()
    scheduler.add(alike("a"), 0.0)
    go_on(scheduler, by)
    finish(scheduler)
    assert run(scheduler, alike("b"))[0][0] == (0, 9)


def test_what_another_class_has_computed_is_not_found_and_comes_back_with_it() -> None:
    scheduler = caching()
    run(scheduler, alike("a"))
    scheduler.add(replace(alike("x"), prompt_token_ids=(9, 9)), 0.0)
    finish(scheduler, ComputedBy(8))
    assert run(scheduler, alike("b"))[0][0] == (0, 9), "the newest step was of class 8"
    assert run(scheduler, alike("c"))[0][0] == (8, 1)


def answer_canary(scheduler: Scheduler, computed_by: ComputedBy, now_s: float = 1000.0) -> None:
    (canary,) = scheduler.plan_canaries(now_s)
    scheduler.complete(canary.step, {}, now_s, computed_by=computed_by)


def test_a_canary_too_says_of_which_class_what_is_found_must_be() -> None:
    scheduler = caching()
    run(scheduler, alike("a"))
    answer_canary(scheduler, ComputedBy(8))
    assert run(scheduler, alike("b"))[0][0] == (0, 9)


def test_after_a_reopening_nothing_is_found_until_an_answer_says_which_class_it_is() -> None:
    scheduler = caching(num_slots=2)
    run(scheduler, alike("a", max_tokens=1))
    lose(scheduler, (9, 9))
    answer_canary(scheduler, ComputedBy(0))
    assert run(scheduler, alike("b", max_tokens=1))[0] == [(0, 9)]
    assert run(scheduler, alike("c", max_tokens=1))[0] == [(8, 1)]


@pytest.mark.parametrize("length", [9, 17])
def test_who_has_found_what_another_class_has_computed_starts_over_before_its_first_token(length: int) -> None:
    """Of 17 tokens it has two chunks in flight, of 9 a step that is planned ahead."""
    scheduler = caching(num_slots=2, prefill_chunk_tokens=4, plans_ahead=True)
    run(scheduler, alike("a", max_tokens=1))
    scheduler.add(alike("b", length), 0.0)
    plans = scheduler.schedule(0.0)
    assert [plan.chunks[0].start_position for plan in plans[:2]] == ([8, 9] if length == 9 else [8, 12])
    for plan in plans:
        assert not scheduler.schedule(0.0), "it goes on no further"
        sampled = {chunk.sequence_id: (Token(50),) for chunk in plan.chunks if chunk.samples}
        assert not scheduler.complete(plan.step, sampled, 0.0, computed_by=ComputedBy(8))
        scheduler.check_invariants()
    chunks, found = finish(scheduler, CLASS)
    assert chunks[:3] == [(0, 4), (4, 4), (8, min(length - 8, 4))], "what it found anew might mislead it, too"
    assert found == 0


def test_steps_of_mixed_classes_and_tokens_that_are_out_let_nobody_start_over() -> None:
    scheduler = caching()
    run(scheduler, alike("a"))
    scheduler.add(alike("b", max_tokens=2), 0.0)
    assert [len(tokens) for by in (0, 8) for _, tokens in go_on(scheduler, ComputedBy(by))] == [1, 1]


def test_requests_that_come_together_compute_a_block_once_the_oldest_first() -> None:
    scheduler = caching(prefill_chunk_tokens=4, max_batch_tokens=16)
    chunks, found = run(scheduler, alike("a", max_tokens=1), alike("b", max_tokens=1), alike("c", 12, max_tokens=1))
    assert chunks == [(0, 4), (4, 4), (8, 1), (8, 1), (8, 4)]
    assert found == 16


def test_nobody_waits_for_one_whose_steps_break() -> None:
    scheduler = caching(prefill_chunk_tokens=4)
    scheduler.add(alike("a"), 0.0)
    scheduler.add(alike("b"), 0.0)
    schedule = scheduler._schedules.all[P0]
    plan = scheduler.schedule(0.0)[0]
    first, second = schedule.running
    assert schedule.prefixes.without_followers(schedule.running) == [first]
    scheduler.fail_step(plan.step, ExecutionError("simulated"), 0.0)
    assert schedule.prefixes.without_followers(schedule.running) == [first, second]


def test_nobody_waits_for_one_of_whose_blocks_the_class_is_not_known() -> None:
    scheduler = caching(prefill_chunk_tokens=4)
    scheduler.add(alike("a"), 0.0)
    scheduler.add(alike("b"), 0.0)
    scheduler.schedule(0.0)
    schedule = scheduler._schedules.all[P0]
    adopted, second = schedule.running
    adopted.numeric_class = 0
    assert schedule.prefixes.without_followers(schedule.running) == [adopted, second]


def test_nobody_waits_where_the_steps_are_of_several_classes() -> None:
    scheduler = caching(prefill_chunk_tokens=4)
    for name in "abcd":
        scheduler.add(alike(name, 40), 0.0)
    go_on(scheduler, ComputedBy(0))
    plan, _ = go_on(scheduler, ComputedBy(0))[0]
    assert len(plan.chunks) == 4


def test_who_is_awaited_since_a_failed_step_waits_for_no_other_and_does_not_seem_stalled() -> None:
    scheduler = caching(prefill_chunk_tokens=4, max_stalled_s=10.0)
    open_pipeline(scheduler, P1, Generation(1), 100, 1, 0.0)
    scheduler.add(alike("older", 180), 0.0)
    scheduler.add(alike("younger", 180), 0.0)
    of_older, *_, of_younger = scheduler.schedule(0.0)
    assert (of_older.pipeline, of_younger.pipeline) == (P0, P1)
    scheduler.fail_step(of_younger.step, ExecutionError("simulated"), 0.0)
    scheduler.close_pipeline(P1, 0.0)
    for now_s in range(15):
        scheduler.schedule(float(now_s))
        scheduler.complete(scheduler.steps_in_flight[0].plan.step, {}, float(now_s), computed_by=CLASS)
    assert scheduler.pop_failures() == []
    assert scheduler.snapshot().num_running == 2


def lose(scheduler: Scheduler, marks: Sequence[int]) -> None:
    scheduler.suspend_pipeline(P0, 0.0)
    open_pipeline(scheduler, P0, Generation(2), 100, 2, 0.0, kv_marks=marks)
    scheduler.check_invariants()


def test_a_new_holder_makes_the_table_empty_and_a_mirror_keeps_what_its_mark_says() -> None:
    for marks, start in (((9, 9), 8), ((9, 0), 0)):
        scheduler = caching(num_slots=2)
        run(scheduler, alike("a", max_tokens=1))
        lose(scheduler, marks)
        answer_canary(scheduler, CLASS)
        assert run(scheduler, alike("b", max_tokens=1))[0] == [(start, 9 - start)]


def test_a_block_that_two_hold_is_replayed_once_and_found_again() -> None:
    scheduler = caching(num_slots=2)
    scheduler.add(alike("a", max_tokens=9), 0.0)
    go_on(scheduler)
    scheduler.add(alike("b", max_tokens=9), 0.0)
    go_on(scheduler)
    go_on(scheduler)
    lose(scheduler, (99, 0))
    replays = []
    for _ in range(6):
        for plan, _ in go_on(scheduler):
            if plan.computing_slots:
                replays += [(chunk.sequence_id, chunk.start_position, len(chunk.token_ids)) for chunk in plan.chunks]
    assert [(sequence, start) for sequence, start, _ in replays] == [(1, 0), (2, 8)]
    scheduler.add(alike("c", max_tokens=1), 0.0)
    assert (8, 1) in [(c.start_position, len(c.token_ids)) for plan, _ in go_on(scheduler) for c in plan.chunks]


@pytest.mark.parametrize("end", ["answered", "cancelled", "failed"])
def test_what_one_replays_is_found_by_nobody_and_replayed_by_all_who_hold_it_if_that_one_ends(end: str) -> None:
    """Step 1 has computed what `a` and `b` share, and the mark is 5; but `a` does not remember how far it was then."""
    scheduler = caching(num_slots=2)
    scheduler.add(alike("a", max_tokens=90), 0.0)
    for _ in range(75):
        go_on(scheduler)
    scheduler.add(alike("b", max_tokens=90), 0.0)
    go_on(scheduler)
    first, second = scheduler._schedules.all[P0].running
    assert (first.covered_by(5), second.covered_by(5)) == (0, 8)
    lose(scheduler, (999, 5))
    assert not scheduler.snapshot().num_cached_blocks
    answer_canary(scheduler, CLASS)
    replay = scheduler.schedule(0.0)[0]
    assert first.sequence_id is not None
    assert [(chunk.sequence_id, chunk.start_position) for chunk in replay.chunks] == [(first.sequence_id, 0)]
    if end == "failed":
        scheduler.fail_step(replay.step, ExecutionError("simulated"), 0.0)
    if end != "answered":
        scheduler.cancel(first.request_id)
    scheduler.complete(replay.step, {}, 0.0, computed_by=ComputedBy(7, frozenset([first.sequence_id])))
    scheduler.check_invariants()
    scheduler.add(alike("c", max_tokens=1), 0.0)
    plans = scheduler.schedule(0.0)
    third = scheduler._schedules.all[P0].running[-1]
    assert third.request_id == "c"
    assert not third.num_found_tokens
    again = [chunk for plan in plans if plan.computing_slots for chunk in plan.chunks]
    start = 8 if end == "answered" else 0
    assert [(chunk.sequence_id, chunk.start_position) for chunk in again] == [(second.sequence_id, start)]


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    scheduler = caching(num_blocks=100)
    scheduler.add(alike("a", max_tokens=9), 0.0)
    go_on(scheduler)
    scheduler._schedules.all[P0].withdraw(request := scheduler._schedules.all[P0].running[0])
    scheduler._waiting.requeue(request, 0.0)
    ((plan, _),) = go_on(scheduler)
    assert [(chunk.start_position, len(chunk.token_ids)) for chunk in plan.chunks] == [(8, 2)]
    assert request.num_found_tokens == 0, "it had computed them itself"


class LookedUp(int):
    """A block id that counts how often a set or a table looks one up."""

    count = 0

    def __hash__(self) -> int:
        LookedUp.count += 1
        return super().__hash__()


def test_a_claim_of_shared_blocks_looks_at_each_of_them_a_few_times() -> None:
    num_blocks = 100
    allocator = BlockAllocator(num_blocks)
    first, second = (Request(alike(name, 401), place, 0.0, block_tokens=4) for place, name in enumerate("ab"))
    first.block_table, first.num_computed_tokens = list(allocator.allocate(num_blocks) or ()), 400
    block_ids = [LookedUp(block_id) for block_id in range(num_blocks)]
    assert PrefixSharing(allocator, 4, Blame(), is_on=True).claim(second, block_ids, 400, [first])
    assert LookedUp.count <= 4 * num_blocks


def test_a_prompt_counts_as_asked_once_if_its_pipeline_closes_before_its_first_answer() -> None:
    scheduler = caching()
    scheduler.add(alike("a"), 0.0)
    scheduler.schedule(0.0)
    scheduler.close_pipeline(P0, 0.0)
    open_pipeline(scheduler, P0, Generation(2), 100, 1, 0.0)
    finish(scheduler)
    assert scheduler.snapshot().counters.prefixes.tokens_asked == 9


def test_the_pipeline_with_the_prefix_is_chosen_unless_it_is_much_busier() -> None:
    scheduler = caching(num_blocks=300, max_batch_tokens=600)
    run(scheduler, alike("a", 400, max_tokens=1))
    open_pipeline(scheduler, P1, Generation(2), 300, 1, 0.0)
    scheduler.add(alike("b", 400, max_tokens=9), 0.0)
    assert [plan.pipeline for plan, _ in go_on(scheduler)] == [P0]
    for name in "cdef":
        scheduler.add(alike(name, 399, max_tokens=9), 0.0)
    go_on(scheduler)
    running = {pipeline: len(schedule.running) for pipeline, schedule in scheduler._schedules.all.items()}
    assert running == {P0: 3, P1: 2}


def test_choices_that_share_a_prompt_need_room_for_it_once() -> None:
    scheduler = caching(num_blocks=20)
    run(scheduler, alike("a", 40, max_tokens=1))
    for number in range(4):
        scheduler.add(alike(f"b{number}", 40, max_tokens=4, group="b"), 0.0)
    go_on(scheduler)
    assert scheduler.snapshot().num_running == 4, "10 blocks, and one or two for each"
