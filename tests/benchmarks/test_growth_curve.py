"""What counts as growing faster than linear."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.growth_curve import Curve, Point, exponents, steps_worse_than_linear, verdict


def curve(*pairs: tuple[float, float]) -> Curve:
    return Curve("TTFT", "prompt tokens", "s", tuple(Point(size, cost) for size, cost in pairs))


@given(st.floats(-1, 3), st.floats(1e-6, 1e6))
def test_a_power_law_has_its_power_as_exponent_everywhere(power: float, factor: float) -> None:
    points = [Point(size, factor * size**power) for size in (1, 2, 8, 64)]
    assert exponents(points) == pytest.approx([power] * 3, abs=1e-6)


def test_a_linear_cost_is_not_worse_than_linear_and_noise_makes_it_no_worse() -> None:
    assert steps_worse_than_linear(curve((1, 2), (2, 4), (4, 8.4)).points) == []


def test_the_steps_that_are_worse_than_linear_are_named() -> None:
    found = curve((128, 1), (512, 3), (2048, 15), (8192, 100))
    assert [(before.size, after.size) for before, after in steps_worse_than_linear(found.points)] == [
        (512, 2048),
        (2048, 8192),
    ]
    assert verdict(found) == "WORSE THAN LINEAR from 512 to 2048, 2048 to 8192"


def test_a_verdict_names_the_steepest_step() -> None:
    assert verdict(curve((1, 1), (2, 1), (4, 2))) == "never worse than linear; the steepest step is of power 1.00"


def test_a_single_point_has_no_verdict() -> None:
    assert verdict(curve((1, 1))) == "a single point says nothing"
