from __future__ import annotations

from tests.benchmarks.expert_loss import median_interval


def test_the_interval_of_a_median_is_that_of_the_binomial_table() -> None:
    assert median_interval(range(1, 21)) == (6, 15)  # n = 20: ranks 6 and 15 cover 95.9%
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
