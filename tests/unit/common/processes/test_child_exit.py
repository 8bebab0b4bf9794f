"""A child's end is told as what it was: a signal is no log line."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.processes.cgroup import MemoryGroup
from common.processes.child_exit import describe_exit

LIMITS = [MemoryGroup(Path("/cg/outer"), 4 << 30, 0), MemoryGroup(Path("/cg/inner"), 3 << 29, 0)]
SAID = "moemesh expert: the checkpoint is damaged"


def test_who_has_ended_by_itself_has_said_why() -> None:
    assert describe_exit(1, SAID, 0, LIMITS) == SAID
    assert describe_exit(3, SAID, 0, LIMITS) == f"{SAID} (exit status 3)"
    assert describe_exit(0, SAID, 0, LIMITS).startswith("it ended by itself")


def test_a_kill_names_the_signal_and_the_tightest_limit_and_not_the_log() -> None:
    sentence = describe_exit(-9, SAID, 0, LIMITS)
    assert "signal 9 (SIGKILL)" in sentence
    assert "likely for want of memory" in sentence
    assert "the limit is 1.50 GiB (/cg/inner)" in sentence
    assert SAID not in sentence


def test_a_kill_that_the_kernel_has_counted_is_no_guess() -> None:
    sentence = describe_exit(-9, SAID, 2, LIMITS)
    assert "signal 9 (SIGKILL) for want of memory" in sentence
    assert "likely" not in sentence
    assert "CAPACITY_BYTES" in sentence


def test_without_a_limit_none_is_named() -> None:
    assert "limit" not in describe_exit(-9, SAID, 0, [])


@pytest.mark.parametrize(("status", "name"), [(-11, "11 (SIGSEGV)"), (-7, "7 (SIGBUS)"), (-250, "250 (unknown")])
def test_other_signals_are_named_with_the_last_line(status: int, name: str) -> None:
    sentence = describe_exit(status, SAID, 0, LIMITS)
    assert f"signal {name}" in sentence
    assert SAID in sentence
