"""Steps of one slot in any order: the mark never covers one that is not finished, nor one that has not come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ProtocolError
from services.stage.slot.step_watermark import StepWatermark


def begun(*steps: int) -> StepWatermark:
    """Steps of one chain, all of which have come."""
    marks = StepWatermark()
    for previous, step in zip((0, *steps), steps, strict=False):
        marks.begin(step, previous)
    return marks


def test_the_mark_follows_the_chain_as_far_as_it_is_finished() -> None:
    marks = begun(3, 5, 9)
    marks.finish(5)
    assert marks.mark == 0
    marks.finish(3)
    assert marks.mark == 5
    marks.finish(9)
    assert marks.mark == 9


def test_a_step_that_has_not_come_is_not_covered_by_one_that_overtook_it() -> None:
    marks = StepWatermark()
    marks.begin(11, 10)
    marks.finish(11)
    assert marks.mark == 0
    marks.begin(12, 11)
    marks.finish(12)
    assert marks.mark == 0
    marks.begin(10, 0)
    assert marks.mark == 0
    marks.finish(10)
    assert marks.mark == 12


def test_what_a_new_generation_drops_is_not_waited_for() -> None:
    marks = begun(3, 4)
    marks.begin_generation()
    assert marks.mark == 4
    marks.finish(3)
    assert marks.mark == 4
    marks.begin(8, 6)
    marks.finish(8)
    assert marks.mark == 4, "6 is of this generation, and has not come"


@pytest.mark.parametrize(("step", "previous"), [(9, 9), (9, 10), (9, 0), (9, 3)], ids=["own", "later", "first", "old"])
def test_a_step_that_cannot_follow_the_one_that_it_names_is_refused(step: int, previous: int) -> None:
    marks = begun(3, 5)
    marks.finish(3)
    marks.finish(5)
    marks.begin(7, 5)
    with pytest.raises(ProtocolError, match="previous_step"):
        marks.begin(step, previous)


@given(
    gaps=st.lists(st.lists(st.integers(1, 5), max_size=12), min_size=1, max_size=4),
    random=st.randoms(use_true_random=False),
)
def test_every_step_up_to_the_mark_has_come_and_is_finished_in_whatever_order_they_do(
    gaps: list[list[int]], random: object
) -> None:
    marks, number = StepWatermark(), 0
    for generation in gaps:
        sent: list[int] = []
        for gap in generation:
            number += gap
            sent.append(number)
        to_come, running, unfinished = list(zip(sent, (0, *sent), strict=False)), list[int](), set(sent)
        before = marks.mark
        while (to_come or running) and random.random() < 0.95:  # type: ignore[attr-defined]
            if to_come and (not running or random.random() < 0.5):  # type: ignore[attr-defined]
                step, previous = to_come.pop(random.randrange(len(to_come)))  # type: ignore[attr-defined]
                marks.begin(step, previous)
                running.append(step)
            else:
                done = running.pop(random.randrange(len(running)))  # type: ignore[attr-defined]
                marks.finish(done)
                unfinished.remove(done)
            assert all(step > marks.mark for step in unfinished)
            reached = max((s for s in sent if all(t > s for t in unfinished)), default=before)
            assert marks.mark == max(before, reached), "no more, and no less"
        marks.begin_generation()
