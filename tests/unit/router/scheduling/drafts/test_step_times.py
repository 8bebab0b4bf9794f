"""How long steps take: from bytes, and corrected by what was measured."""

from __future__ import annotations

import itertools

import pytest

from services.router.scheduling.drafts.step_times import (
    AHEAD_SAVES,
    FORGOTTEN_AFTER_MEASURES,
    MEASURES_KEPT,
    STEPS_A_MEASURE,
    Manner,
    StepShape,
    StepTimes,
    step_shape,
)
from tests.benchmarks.limits import step_weight_bytes
from tests.benchmarks.make_bench_model import SIZES
from tests.support.router.mesh_shapes import small_model
from tests.unit.router.scheduling.drafts.shapes import BENCH


def times(**measured: float) -> StepTimes:
    """One measure of a step of one row in each manner that is named."""
    found = StepTimes(BENCH)
    for manner, seconds in measured.items():
        found.note(Manner(manner), 1, seconds)
    return found


@pytest.mark.parametrize("num_rows", [1, 2, 4, 16, 64])
def test_the_weights_of_a_step_are_those_by_which_benchmarks_are_judged(num_rows: int) -> None:
    assert 2 * BENCH.weights(num_rows) == pytest.approx(step_weight_bytes(SIZES["bench"], num_rows))


def test_four_rows_of_the_bench_model_read_2_3_times_what_one_reads() -> None:
    assert BENCH.weights(4) / BENCH.weights(1) == pytest.approx(2.3, abs=0.03)


def test_the_shape_of_a_model_counts_what_stages_and_experts_hold() -> None:
    config = small_model()
    shape = step_shape(config)
    moe_layers = len(config.moe_layer_indices)
    experts = moe_layers * config.num_experts * config.expert_parameters()
    stages = sum(config.layer_parameters_on_stage(layer) for layer in range(config.num_layers))
    assert shape.weights(10_000) == pytest.approx(experts + stages + config.embedding_parameters())


def test_rows_never_make_a_step_shorter_and_never_longer_than_steps_of_their_own() -> None:
    relative = [BENCH.relative_time(num_rows) for num_rows in range(1, 100)]
    assert relative == sorted(relative)
    assert all(both < relative[0] + one for one, both in itertools.pairwise(relative))


def test_nothing_is_known_before_an_undrafted_step_of_about_that_size_was_measured() -> None:
    assert StepTimes(BENCH).undrafted_s(1) is None
    assert times(drafted=0.01).undrafted_s(1) is None
    assert times(plain=0.01).undrafted_s(1) == pytest.approx(0.01 * (1 - AHEAD_SAVES))
    assert times(plain=0.01).undrafted_s(2) is not None
    assert times(plain=0.01).undrafted_s(3) is None


def test_what_was_planned_ahead_is_what_drafts_are_held_against() -> None:
    assert times(plain=0.01, ahead=0.009).undrafted_s(1) == pytest.approx(0.009)
    assert times(ahead=0.009).drafted_s(1) == pytest.approx(0.009 / (1 - AHEAD_SAVES))


def test_the_shape_stands_for_sizes_that_were_not_measured_and_a_measure_for_its_neighbours() -> None:
    found = times(plain=0.01)
    ratio = BENCH.relative_time(4) / BENCH.relative_time(1)
    assert found.drafted_s(4) == pytest.approx(0.01 * ratio)
    found.note(Manner.DRAFTED, 4, 0.05)
    assert found.drafted_s(4) == pytest.approx(0.05)
    assert found.drafted_s(6) == pytest.approx(0.05 * BENCH.relative_time(6) / BENCH.relative_time(4))
    found.note(Manner.DRAFTED, 8, 0.02)
    assert found.drafted_s(7) == pytest.approx(0.02 * BENCH.relative_time(7) / BENCH.relative_time(8))


def test_a_stall_moves_no_time() -> None:
    found = StepTimes(BENCH)
    for seconds in (0.01, 0.01, 3.0, 0.01):
        found.note(Manner.PLAIN, 1, seconds)
    assert found.drafted_s(1) == pytest.approx(0.01)


def test_steps_that_are_answered_together_seem_to_take_no_time_and_twice_their_own() -> None:
    found = StepTimes(BENCH)
    for _ in range(4):
        found.note(Manner.AHEAD, 1, 0.02)
        found.note(Manner.AHEAD, 1, 0.0)
    undrafted_s = found.undrafted_s(1)
    assert undrafted_s is not None
    assert 0.005 < undrafted_s < 0.01
    for _ in range(MEASURES_KEPT):
        found.note(Manner.AHEAD, 1, 0.0)
    undrafted_s = found.undrafted_s(1)
    assert undrafted_s is not None
    assert undrafted_s > 0, "others are divided by it"


@pytest.mark.parametrize(("manner", "other"), [(Manner.AHEAD, Manner.DRAFTED), (Manner.DRAFTED, Manner.PLAIN)])
@pytest.mark.parametrize("num_measures", [1, 3, MEASURES_KEPT, 2 * MEASURES_KEPT])
def test_a_measure_holds_for_so_many_steps_and_several_for_as_many_times_that(
    manner: Manner, other: Manner, num_measures: int
) -> None:
    found = StepTimes(BENCH)

    def is_known() -> bool:
        return found.knows_drafts if manner is Manner.DRAFTED else found.undrafted_s(1) is not None

    for _ in range(num_measures):
        found.note(manner, 1, 0.01)
    for _ in range(STEPS_A_MEASURE[manner] * min(num_measures, MEASURES_KEPT)):
        found.note(other, 4, 0.02)
    assert is_known()
    found.note(other, 4, 0.02)
    assert not is_known()


def test_what_was_long_ago_is_forgotten_where_something_new_is_measured() -> None:
    found = times(plain=5.0)
    for _ in range(FORGOTTEN_AFTER_MEASURES * STEPS_A_MEASURE[Manner.PLAIN]):
        found.note(Manner.DRAFTED, 4, 0.02)
    found.note(Manner.PLAIN, 1, 0.01)
    assert found.undrafted_s(1) == pytest.approx(0.01 * (1 - AHEAD_SAVES))


def test_sizes_are_told_apart_as_long_as_they_differ_by_much() -> None:
    found = times(plain=1.0)
    for num_rows in (2, 8, 16, 64):
        found.note(Manner.DRAFTED, num_rows, float(num_rows))
    assert [found.drafted_s(num_rows) for num_rows in (2, 8, 16, 64)] == pytest.approx([2.0, 8.0, 16.0, 64.0])
    found.note(Manner.DRAFTED, 66, 10.0)  # as good as 64
    assert found.drafted_s(64) < 64


def test_a_model_all_of_whose_experts_are_read_by_one_row_has_rows_for_nothing() -> None:
    shape = StepShape(4, 4, 1000, 500)
    assert shape.weights(1) == shape.weights(100) == 4500
