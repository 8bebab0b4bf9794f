"""A turn of the mesh thread stays short, however large the model and the mesh."""

from __future__ import annotations

from tests.benchmarks.mesh_turn import PLACEMENT, measure

LONGEST_TURN_S = 0.005


def test_no_turn_of_the_loop_takes_five_milliseconds_with_60_layers_of_256_experts_on_64_nodes() -> None:
    """In CPU time of the thread; the best of three, since others use the processor's caches and its clock, too."""
    for _ in range(3):
        turns = measure(60, 256, 64, 8, losses=1)
        del turns[PLACEMENT]
        if max(turns.values()) <= LONGEST_TURN_S:
            return
    assert max(turns.values()) <= LONGEST_TURN_S, turns
