"""How the cost of a feature is told."""

from __future__ import annotations

from tests.benchmarks.safety_cost import SHIPPED, table


def test_ratios_are_taken_within_a_round() -> None:
    rows = table({SHIPPED: [100.0, 200.0, 300.0], "other": [110.0, 180.0, 300.0]}).splitlines()
    assert rows[2] == "| as shipped | 200 | 1.00 | 1.00 | 1.00 |"
    assert rows[3] == "| other | 180 | 1.00 | 0.90 | 1.10 |"
