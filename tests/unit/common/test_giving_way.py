from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from common.giving_way import MOST_REST_S, REST_S, RUN_S, giving_way, num_runnable


def compute(seconds: float) -> None:
    until_s = time.process_time() + seconds
    while time.process_time() < until_s:
        pass


@pytest.mark.parametrize(("runnable", "rests_at_all"), [(1, False), (2, True), (9, True)])
def test_it_rests_where_everything_that_runs_leaves_no_processor_idle(runnable: int, rests_at_all: bool) -> None:
    rests: list[float] = []
    with giving_way(count=lambda: runnable, num_processors=2, rest=rests.append):
        compute(20 * RUN_S)
    assert bool(rests) is rests_at_all
    assert len(rests) <= 21
    assert set(rests) <= {REST_S}


def test_it_ends_with_the_start_and_leaves_no_trace() -> None:
    before, rests = signal.getsignal(signal.SIGPROF), list[float]()
    with pytest.raises(ValueError, match="broken"), giving_way(count=lambda: 99, num_processors=1, rest=rests.append):
        raise ValueError("broken")
    num_rests = len(rests)
    compute(4 * RUN_S)
    assert len(rests) == num_rests
    assert signal.getsignal(signal.SIGPROF) is before
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_a_machine_that_is_always_full_does_not_keep_it_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.giving_way.MOST_REST_S", 3 * REST_S)
    rests: list[float] = []
    with giving_way(count=lambda: 99, num_processors=1, rest=rests.append):
        compute(12 * RUN_S)
    assert len(rests) == 3
    assert MOST_REST_S > REST_S


def test_threads_that_want_to_run_are_counted_over_the_whole_machine(tmp_path: Path) -> None:
    load_average = tmp_path / "loadavg"
    load_average.write_text("1.02 0.80 0.70 3/412 99117\n")
    assert num_runnable(load_average) == 3
    assert num_runnable() >= 1, "this thread"
    load_average.write_text("of another system\n")
    assert num_runnable(load_average) == 0
    assert num_runnable(tmp_path / "none") == 0
