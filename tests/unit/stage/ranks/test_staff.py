"""Processes of ranks: real ones, which sleep."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from common.errors import RankLostError
from services.stage.ranks.staff import RankStaff
from tests.support.waiting import wait_until


@pytest.fixture
def staff() -> Iterator[RankStaff]:
    log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
    made = RankStaff(2, lambda seat: subprocess.Popen(["sleep", "60"]), log)
    made.start()
    wait_until(lambda: all(made.process_of(seat) for seat in (1, 2)), 10, "both processes")
    yield made
    made.end()
    wait_until(lambda: not any(made.process_of(seat) for seat in (1, 2)), 10, "their end")


def test_a_killed_process_is_seen_at_once_and_started_again(staff: RankStaff) -> None:
    process = staff.process_of(1)
    staff.check(1, 0.0)
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: staff.process_of(1) != process, 1, "that it is gone")
    wait_until(lambda: staff.process_of(1) not in (0, process), 5, "another one")
    staff.check(1, 0.0)
    staff.check(2, 0.0)


def test_a_stopped_process_is_killed_and_started_again(staff: RankStaff) -> None:
    process = staff.process_of(2)
    os.kill(process, signal.SIGSTOP)
    wait_until(lambda: staff.process_of(2) not in (0, process), 5, "another one")


def test_one_that_sleeps_while_rank_0_waits_is_killed(staff: RankStaff) -> None:
    process = staff.process_of(1)
    waited_s = 0.0

    def wait() -> bool:
        nonlocal waited_s
        waited_s += 0.05
        try:
            staff.check(1, waited_s)
        except RankLostError:
            return True
        return staff.process_of(1) != process

    assert wait_until(wait, 5, "that it is lost") < 3


def test_what_is_killed_says_why(staff: RankStaff) -> None:
    staff.kill(1, "it does not hear")
    with pytest.raises(RankLostError, match="seat 1 is gone: it does not hear"):
        staff.check(1, 0.0)
