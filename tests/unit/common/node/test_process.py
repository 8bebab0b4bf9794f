"""What stage and expert processes do alike, as far as it needs no socket."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from common.errors import CheckpointError, MoemeshError, NodeLostError
from common.node.process import StopFlag, machine_label, run_lives


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


@pytest.mark.parametrize("status", [0, 1])
def test_a_process_ends_with_its_status_while_a_load_hangs(status: int) -> None:
    ends = (
        "import sys, threading; from common.node.loader_thread import LoaderThread\n"
        "from common.node.process import end_process\n"
        "loader = LoaderThread(); loader.submit(threading.Event().wait); loader.close()\n"
        f"print('said', end=''); end_process({status})"
    )
    ended = subprocess.run([sys.executable, "-c", ends], timeout=60, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (status, "said")


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", ">&-"])
def test_a_process_without_standard_streams_says_nothing_and_gives_their_numbers_to_nobody(
    streams: str, tmp_path: Path
) -> None:
    script = (
        "import os, sys; from common.node.process import end_process, run_process\n"
        "opened = lambda log: os.write(int(sys.argv[1]), b'%d' % os.open('/', os.O_RDONLY))\n"
        "end_process(run_process('node', 'info', opened))"
    )
    (tmp_path / "node.py").write_text(script)
    with (tmp_path / "said").open("w") as said:
        command = f"exec {sys.executable} {tmp_path}/node.py {said.fileno()} {streams}"
        ended = subprocess.run(["sh", "-c", command], timeout=60, pass_fds=[said.fileno()], stdin=subprocess.DEVNULL)
    assert ended.returncode == 0
    assert int((tmp_path / "said").read_text()) > 2


def test_an_error_that_nobody_expected_ends_a_process_while_a_load_hangs() -> None:
    ends = (
        "import threading; from common.node.loader_thread import LoaderThread\n"
        "loader = LoaderThread(); loader.submit(threading.Event().wait); raise KeyError('unexpected')"
    )
    ended = subprocess.run([sys.executable, "-c", ends], timeout=60, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "unexpected" in ended.stderr


@pytest.mark.parametrize("service", ["stage", "expert"])
def test_a_node_ends_without_waiting_for_its_threads(service: str) -> None:
    runs = (
        "import os, runpy; os._exit = lambda status: print('ended with', status)\n"
        f"runpy.run_module('services.{service}', run_name='__main__')"
    )
    environment = {**os.environ, "MODEL": "/nowhere/at/all"}
    ended = subprocess.run([sys.executable, "-c", runs], timeout=120, capture_output=True, text=True, env=environment)
    assert ended.stdout == "ended with 1\n"
    assert "/nowhere/at/all" in ended.stderr


def test_a_node_that_was_taken_for_dead_lives_again_and_any_other_error_ends_it() -> None:
    ends: list[MoemeshError | None] = [NodeLostError("declared dead"), NodeLostError("again"), None]

    def live() -> None:
        if (error := ends.pop(0)) is not None:
            raise error

    log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
    run_lives(live, log)
    assert ends == []
    ends[:] = [NodeLostError("declared dead"), CheckpointError("another model"), None]
    with pytest.raises(CheckpointError):
        run_lives(live, log)
    assert ends == [None]


def test_what_a_life_held_is_freed_before_the_next_one_begins() -> None:
    class Service:
        def __init__(self) -> None:
            self.link = lambda: self  # a circle, as services and their links are

    held: list[weakref.ref[Service]] = []
    log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])

    def live() -> None:
        assert all(reference() is None for reference in held)
        service = Service()
        held.append(weakref.ref(service))
        if len(held) < 3:
            raise NodeLostError("declared dead")

    gc.disable()
    try:
        run_lives(live, log)
    finally:
        gc.enable()
    assert len(held) == 3
