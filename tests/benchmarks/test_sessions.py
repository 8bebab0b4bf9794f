from __future__ import annotations

import pytest

from tests.benchmarks.sessions import mean_gaps_s
from tests.benchmarks.streaming_client import StreamTimes


def test_gaps_are_counted_over_the_tokens_around_the_window() -> None:
    stream = StreamTimes(0.0, tuple((at_s, 1) for at_s in (1.0, 2.0, 3.0, 5.0, 8.0, 9.0)))
    assert mean_gaps_s(stream, 3.5, 6.0) == pytest.approx((1.0, 2.5))
