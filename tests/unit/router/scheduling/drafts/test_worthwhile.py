"""The drafter on a simulated machine: it drafts where that is faster, and nowhere else."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from common.ids import Generation, PipelineId, RequestId, SequenceId, StepId
from services.router.engine import Token
from services.router.scheduling.drafts.drafting import DraftWish
from services.router.scheduling.drafts.prompt_lookup import PromptLookup
from services.router.scheduling.drafts.source import Guess
from services.router.scheduling.drafts.step_times import AHEAD_SAVES
from services.router.scheduling.drafts.worthwhile import FIRST_DRAFTS, WorthwhileDrafter
from services.router.scheduling.step_plan import ScheduledChunk, StepPlan
from tests.support.router.scheduling import add, make_scheduler
from tests.support.router.simulated_pipeline import build_request
from tests.unit.router.scheduling.drafts.shapes import BENCH

P0, P1 = PipelineId(0), PipelineId(1)
SAMPLING = build_request("a", 1, 1).sampling
A, B = RequestId("a"), RequestId("b")
MOST = 15
RIGHT, WRONG = 1, 0
"""The text is RIGHT everywhere."""


def draft(drafter: WorthwhileDrafter, wishes: list[DraftWish], most: int = 100) -> list[tuple[int, ...]]:
    assert all(map(drafter.has_guess, wishes))
    return [tuple(drafts) for drafts in drafter.draft(P0, wishes, len(wishes), most)]


class RatedSource:
    """Each token that it guesses is right with a probability that depends on its position."""

    def __init__(self, rate_at: Callable[[int], float], seed: int = 0) -> None:
        self._rate_at = rate_at
        self._random = random.Random(seed)
        self.forgotten: list[RequestId] = []
        self.num_asked = 0

    def propose(self, request: RequestId, prompt: Sequence[int], generated: Sequence[int], most: int) -> Guess:
        self.num_asked += 1
        rates = [self._rate_at(len(generated) + place) for place in range(most)]
        return Guess(tuple(RIGHT if self._random.random() < rate else WRONG for rate in rates))

    def forget(self, request: RequestId) -> None:
        self.forgotten.append(request)


@dataclass
class Machine:
    """What steps take there: `row_factor` times what the drafter believes at first that a row more takes."""

    row_factor: float = 1.0
    ahead_saves: float = AHEAD_SAVES
    noise: float = 0.05
    stalls: float = 0.005
    """The share of steps that take twenty times as long."""

    def seconds(self, num_sequences: int, num_drafts: int, is_ahead: bool) -> float:
        undrafted = BENCH.relative_time(num_sequences)
        more = self.row_factor * (BENCH.relative_time(num_sequences + num_drafts) - undrafted)
        return 0.006 * (undrafted + more) * (1 - self.ahead_saves * is_ahead)

    def measured(self, seconds: float, source: random.Random) -> float:
        return seconds * source.lognormvariate(0, self.noise) * (20 if source.random() < self.stalls else 1)


@dataclass
class Run:
    """What came of a simulation."""

    seconds: float = 0.0
    """By what steps take there without noise."""
    num_tokens: int = 0
    drafts_by_step: list[int] = field(default_factory=list)
    start_of_step: list[int] = field(default_factory=list)
    """Tokens of the first sequence before it."""

    def speedup(self, machine: Machine, num_sequences: int) -> float:
        """To a run that always plans ahead."""
        undrafted_s = self.num_tokens / num_sequences * machine.seconds(num_sequences, 0, is_ahead=True)
        return undrafted_s / self.seconds

    def share_drafted(self, start: int = 0, stop: int = 1 << 30) -> float:
        inside = [
            drafts > 0 for drafts, at in zip(self.drafts_by_step, self.start_of_step, strict=True) if start <= at < stop
        ]
        return sum(inside) / len(inside)


def step(num_sequences: int, num_drafts: int = 0, pipeline: PipelineId = P0, *, is_ahead: bool = False) -> StepPlan:
    """Its numbers alone count."""
    chunk = ScheduledChunk(
        SequenceId(1), (RIGHT,) * (num_sequences + num_drafts), 0, 0, (), True, SAMPLING, 0, 0, num_drafts=num_drafts
    )
    return StepPlan(StepId(2), pipeline, Generation(1), (chunk,), (), awaited_step=int(is_ahead))


def simulate(
    rate_at: Callable[[int], float] | Sequence[Callable[[int], float]],
    machine: Machine,
    num_tokens: int = 4000,
) -> Run:
    """Sequences side by side until the first one has so many tokens, a rate for each."""
    rates = [rate_at] if callable(rate_at) else list(rate_at)
    noise, run, is_ahead = random.Random(1), Run(), False
    names = [RequestId(str(number)) for number in range(len(rates))]
    sources = dict(zip(names, [RatedSource(rate, number) for number, rate in enumerate(rates)], strict=True))
    generated: dict[RequestId, list[int]] = {name: [RIGHT] for name in names}

    class OneForEach(RatedSource):
        def propose(self, request: RequestId, prompt: Sequence[int], generated: Sequence[int], most: int) -> Guess:
            return sources[request].propose(request, prompt, generated, most)

    drafter = WorthwhileDrafter(OneForEach(lambda position: 0.0), BENCH, MOST)
    while len(generated[names[0]]) < num_tokens:
        wishes = [DraftWish(name, (5,), generated[name], MOST) for name in names]
        drafts: list[Sequence[int]] = [()] * len(wishes)
        assert all(map(drafter.has_guess, wishes))
        if not is_ahead:
            drafts = list(drafter.draft(P0, wishes, len(wishes), 500))
        num_drafts = sum(map(len, drafts))
        goes_ahead = not num_drafts and not drafter.would_draft(P0, wishes, len(wishes), 500)
        seconds = machine.seconds(len(wishes), num_drafts, is_ahead)
        drafter.note_step(step(len(wishes), num_drafts, is_ahead=is_ahead), machine.measured(seconds, noise))
        run.seconds += seconds
        run.drafts_by_step.append(num_drafts)
        run.start_of_step.append(len(generated[names[0]]))
        for name, guessed in zip(names, drafts, strict=True):
            num_right = next((place for place, token in enumerate(guessed) if token != RIGHT), len(guessed))
            drafter.note_tokens(name, len(generated[name]), [RIGHT] * (num_right + 1))
            generated[name] += [RIGHT] * (num_right + 1)
            run.num_tokens += num_right + 1
        is_ahead = goes_ahead
    return run


def test_guesses_that_are_nearly_always_right_are_drafted_many_at_a_time() -> None:
    run = simulate(lambda position: 0.95, Machine())
    assert run.share_drafted() > 0.95
    assert sorted(run.drafts_by_step)[len(run.drafts_by_step) // 2] >= 8
    assert run.speedup(Machine(), 1) > 2.0


def test_guesses_that_are_mostly_wrong_are_not_drafted() -> None:
    run = simulate(lambda position: 0.2, Machine())
    assert run.share_drafted() < 0.005
    assert run.speedup(Machine(), 1) > 0.995


def test_drafts_end_and_come_back_with_what_the_text_is_like() -> None:
    run = simulate(lambda position: 0.95 if position % 2000 < 1000 else 0.1, Machine(), 6000)
    for start in (2000, 4000):
        assert run.share_drafted(start + 100, start + 900) > 0.95
        assert run.share_drafted(start + 1100, start + 1900) < 0.05
    assert run.speedup(Machine(), 1) > 1.3


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.65, 0.8, 0.95])
@pytest.mark.parametrize("row_factor", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("ahead_saves", [0.0, 0.15])
def test_it_is_never_slower_than_without_drafts_whatever_rows_really_cost(
    rate: float, row_factor: float, ahead_saves: float
) -> None:
    machine = Machine(row_factor, ahead_saves)
    assert simulate(lambda position: rate, machine).speedup(machine, 1) > 0.99


@pytest.mark.parametrize(("rate", "least"), [(0.5, 0.99), (0.8, 1.15), (0.95, 2.0)])
def test_it_makes_nearly_all_of_the_tokens_a_second_that_the_best_constant_number_makes(
    rate: float, least: float
) -> None:
    machine = Machine()

    def speed(num_drafts: int) -> float:
        expected = sum(rate**place for place in range(num_drafts + 1))
        return expected / machine.seconds(1, num_drafts, is_ahead=num_drafts == 0)

    best = max(map(speed, range(MOST + 1))) / speed(0)
    found = simulate(lambda position: rate, machine).speedup(machine, 1)
    assert found > least
    assert found > 0.95 * best


def test_of_several_sequences_those_draft_whose_guesses_are_right() -> None:
    machine = Machine()
    run = simulate([lambda position: 0.97, lambda position: 0.1, lambda position: 0.1], machine)
    assert run.share_drafted() > 0.8
    assert statistics.median(run.drafts_by_step) <= MOST + 4
    assert run.speedup(machine, 3) > 1.1


def test_nothing_is_drafted_before_a_step_without_drafts_was_measured() -> None:
    drafter = WorthwhileDrafter(RatedSource(lambda position: 1.0), BENCH, 4)
    wishes = [DraftWish(A, (5,), [RIGHT], 4)]
    assert draft(drafter, wishes) == [()]
    assert not drafter.would_draft(P0, wishes, 1, 100)
    drafter.note_step(step(1, pipeline=P1), 0.006)
    assert draft(drafter, wishes) == [()], "times of another pipeline say nothing"
    drafter.note_step(step(1), 0.006)
    for position in range(30):
        draft(drafter, [DraftWish(A, (5,), [RIGHT] * position, 4)])
        drafter.note_tokens(A, position, [RIGHT])
    assert draft(drafter, wishes) == [(RIGHT,) * FIRST_DRAFTS], "what they cost is not known yet"
    drafter.note_step(step(1, FIRST_DRAFTS), 0.012)
    assert draft(drafter, wishes) == [(RIGHT,) * 4]


def test_no_more_is_drafted_than_each_wants_and_the_step_has_room_for() -> None:
    drafter = WorthwhileDrafter(RatedSource(lambda position: 1.0), BENCH, MOST)
    drafter.note_step(step(2), 0.006)
    drafter.note_step(step(2, 1), 0.006)
    for position in range(200):
        draft(drafter, [DraftWish(A, (5,), [RIGHT] * position, 4)])
        drafter.note_tokens(A, position, [RIGHT] * MOST)
    wishes = [DraftWish(A, (5,), [RIGHT], 3), DraftWish(B, (5,), [RIGHT], MOST)]
    assert [len(drafts) for drafts in draft(drafter, wishes)] == [3, MOST]
    assert sum(map(len, draft(drafter, wishes, 5))) == 5
    assert draft(drafter, wishes, 0) == [(), ()]


def test_the_source_is_asked_once_for_each_place_and_told_who_has_ended() -> None:
    source = RatedSource(lambda position: 0.5)
    drafter = WorthwhileDrafter(source, BENCH, 4)
    wishes = [DraftWish(A, (5,), [RIGHT], 4)]
    draft(drafter, wishes)
    drafter.would_draft(P0, wishes, 1, 100)
    draft(drafter, wishes)
    assert source.num_asked == 1
    drafter.note_tokens(A, 1, [RIGHT])
    assert drafter.has_guess(DraftWish(A, (5,), [RIGHT, RIGHT], 4))
    assert source.num_asked == 2
    drafter.forget(A)
    drafter.forget(RequestId("never seen"))
    assert A in source.forgotten


def test_a_guess_for_another_place_is_no_measure() -> None:
    drafter = WorthwhileDrafter(RatedSource(lambda position: 1.0), BENCH, 4)
    drafter.note_step(step(1), 0.006)
    for position in range(0, 200, 2):
        draft(drafter, [DraftWish(A, (5,), [RIGHT] * position, 4)])
        drafter.note_tokens(A, position + 1, [RIGHT] * 5)
    assert draft(drafter, [DraftWish(A, (5,), [RIGHT], 4)]) == [()]


@pytest.mark.parametrize("step_s", [0.0, 0.01])
def test_a_scheduler_with_it_drafts_a_text_that_repeats_itself_whatever_its_clock_says(step_s: float) -> None:
    drafter = WorthwhileDrafter(PromptLookup(), BENCH, MOST)
    scheduler = make_scheduler(drafter=drafter, plans_ahead=True)
    add(scheduler, "a", "b", max_tokens=100)
    now_s, plans = 0.0, []
    while scheduler.snapshot().num_running or scheduler.snapshot().num_waiting:
        plans += scheduler.schedule(now_s)
        now_s += step_s
        plan = plans.pop(0)
        sampled = {chunk.sequence_id: (Token(RIGHT),) * chunk.num_sampling_rows for chunk in plan.chunks}
        scheduler.complete(plan.step, sampled, now_s)
        scheduler.check_invariants()
    counters = scheduler.snapshot().counters
    assert not scheduler.pop_failures()
    assert not scheduler.pop_renewals()
    assert counters.requests_finished == 2
    assert counters.drafts_rejected == 0
    assert counters.drafts_accepted > 50
