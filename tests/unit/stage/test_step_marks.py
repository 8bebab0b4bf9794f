from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.stage.step_marks import StepMarks


def test_the_mark_stands_before_the_oldest_unfinished_step() -> None:
    marks = StepMarks()
    for step in (3, 5, 9):
        marks.begin(step)
    marks.finish(5)
    assert marks.mark == 2
    marks.finish(3)
    assert marks.mark == 8
    marks.finish(9)
    assert marks.mark == 9


def test_what_a_new_generation_drops_is_not_waited_for() -> None:
    marks = StepMarks()
    marks.begin(3)
    marks.begin(4)
    marks.drop_unfinished()
    assert marks.mark == 4
    marks.finish(3)
    assert marks.mark == 4


@given(st.lists(st.integers(1, 5), max_size=30), st.randoms(use_true_random=False))
def test_no_step_at_or_before_the_mark_is_unfinished(gaps: list[int], random: object) -> None:
    marks, unfinished, step = StepMarks(), set[int](), 0
    for gap in gaps:
        step += gap
        marks.begin(step)
        unfinished.add(step)
        while unfinished and random.random() < 0.5:  # type: ignore[attr-defined]
            done = random.choice(sorted(unfinished))  # type: ignore[attr-defined]
            marks.finish(done)
            unfinished.remove(done)
        assert all(number > marks.mark for number in unfinished)
    for number in sorted(unfinished):
        marks.finish(number)
    assert marks.mark == step
