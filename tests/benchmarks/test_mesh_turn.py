"""The benchmark of the mesh thread's turns measures each kind of them; how long they take is its figure alone."""

from __future__ import annotations

from tests.benchmarks.mesh_turn import PLACEMENT, measure


def test_each_kind_of_turn_is_measured() -> None:
    turns = measure(2, 8, 4, 2, losses=1)
    assert {
        "everybody joins",
        "start: new placement",
        "start: reports",
        "the turn after a loss",
        PLACEMENT,
    } <= turns.keys()
    assert all(seconds > 0 for seconds in turns.values())
