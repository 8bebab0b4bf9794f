"""What stage and expert processes do alike, as far as it needs no socket."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.node_process import StopFlag, machine_label


@pytest.fixture
def restored_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("restored_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_and_interrupts_nothing(number: signal.Signals) -> None:
    should_stop = StopFlag()
    assert not should_stop()
    signal.raise_signal(number)
    assert should_stop()
    signal.raise_signal(number)
    assert should_stop()


def test_all_processes_of_one_machine_have_one_label(tmp_path: Path) -> None:
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0\n")
    assert machine_label(boot_id) == "0f1e2d3c-4b5a"
    assert machine_label() == machine_label()


def test_where_the_kernel_says_nothing_the_host_name_is_the_label(tmp_path: Path) -> None:
    assert machine_label(tmp_path / "none")
