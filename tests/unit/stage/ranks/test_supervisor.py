"""Processes of ranks: real ones, which sleep."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from common.errors import RankLostError
from services.stage.ranks.supervisor import RankSupervisor
from tests.support.processes.waiting import wait_until


@pytest.fixture
def supervisor() -> Iterator[RankSupervisor]:
    log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
    made = RankSupervisor(2, lambda seat: subprocess.Popen(["sleep", "60"]), log)
    made.start()
    wait_until(lambda: all(made.process_of(seat) for seat in (1, 2)), 10, "both processes")
    yield made
    made.end()
    wait_until(lambda: not any(made.process_of(seat) for seat in (1, 2)), 10, "their end")


def test_a_killed_process_is_seen_at_once_and_started_again(supervisor: RankSupervisor) -> None:
    process = supervisor.process_of(1)
    supervisor.check(1, process, 0.0)
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: supervisor.process_of(1) != process, 1, "that it is gone")
    wait_until(lambda: supervisor.process_of(1) not in (0, process), 5, "another one")
    supervisor.check(1, supervisor.process_of(1), 0.0)
    supervisor.check(2, supervisor.process_of(2), 0.0)
    with pytest.raises(RankLostError):
        supervisor.check(1, process, 0.0)


def test_a_stopped_process_is_killed_and_started_again(supervisor: RankSupervisor) -> None:
    process = supervisor.process_of(2)
    os.kill(process, signal.SIGSTOP)
    wait_until(lambda: supervisor.process_of(2) not in (0, process), 5, "another one")


def test_one_that_sleeps_while_rank_0_waits_is_killed(supervisor: RankSupervisor) -> None:
    process = supervisor.process_of(1)
    waited_s = 0.0

    def wait() -> bool:
        nonlocal waited_s
        waited_s += 0.05
        try:
            supervisor.check(1, process, waited_s)
        except RankLostError:
            return True
        return supervisor.process_of(1) != process

    assert wait_until(wait, 5, "that it is lost") < 3


def test_what_is_killed_says_why(supervisor: RankSupervisor) -> None:
    process = supervisor.process_of(1)
    supervisor.kill(1, "it does not hear")
    with pytest.raises(RankLostError, match="seat 1 is gone: it does not hear"):
        supervisor.check(1, process, 0.0)


class Undying:
    """Hangs in the kernel: a signal changes nothing."""

    pid = 4711
    returncode = None

    def poll(self) -> None:
        return None

    def wait(self, timeout: float | None = None) -> int:
        time.sleep(timeout or 60)
        raise subprocess.TimeoutExpired("undying", timeout or 60)

    def send_signal(self, sig: int) -> None:
        return

    def kill(self) -> None:
        return


def test_one_that_does_not_go_away_when_it_is_killed_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.stage.ranks.supervisor.KILLED_S", 1.0)
    log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
    stand_in: Any = Undying()
    supervisor = RankSupervisor(2, lambda seat: stand_in, log)
    supervisor.start()
    wait_until(lambda: supervisor.process_of(1) == Undying.pid, 10, "the process")
    killer = threading.Thread(target=supervisor.kill, args=(1, "it does not hear"))
    began_s = time.monotonic()
    killer.start()
    wait_until(lambda: not supervisor.process_of(1), 1, "that it is of no use")
    with pytest.raises(RankLostError, match="it does not hear"):
        supervisor.check(1, Undying.pid, 0.0)
    assert time.monotonic() - began_s < 0.5
    killer.join()
    supervisor.end()


def test_an_error_over_one_process_does_not_end_the_thread_that_all_are_children_of() -> None:
    log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
    tries: list[int] = []

    def spawn(seat: int) -> subprocess.Popen[bytes]:
        tries.append(seat)
        if seat == 1 and tries.count(1) < 3:
            raise KeyError("something unforeseen")
        return subprocess.Popen(["sleep", "60"])

    supervisor = RankSupervisor(2, spawn, log)
    supervisor.start()
    wait_until(lambda: all(supervisor.process_of(seat) for seat in (1, 2)), 10, "both processes")
    assert tries.count(1) == 3
    supervisor.end()
