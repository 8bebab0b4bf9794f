"""A turn of the mesh thread stays short, however large the model and the mesh."""

from __future__ import annotations

from tests.benchmarks.mesh_turn import PLACEMENT, measure

LONGEST_TURN_S = 0.005


def test_no_turn_of_the_loop_takes_five_milliseconds_with_60_layers_of_256_experts_on_64_nodes() -> None:
    """In CPU time of the thread, and of each kind of turn the best of some runs: other processes share the caches."""
    best: dict[str, float] = {}
    for _ in range(5):
        turns = measure(60, 256, 64, 8, losses=1)
        best = {name: min(seconds, best.get(name, seconds)) for name, seconds in turns.items() if name != PLACEMENT}
        if max(best.values()) <= LONGEST_TURN_S:
            return
    assert max(best.values()) <= LONGEST_TURN_S, best
