"""Which files of a mesh's state folder are removed, and that the kill comes when it should."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.faults.lose_files import OWN_FILES, LoseFiles, Lost, remove
from chaos.target import Node
from tests.support.chaos.target import ListedTarget
from tests.support.processes.waiting import wait_until


@pytest.fixture
def state() -> Iterator[Path]:
    """Short: a socket's path has an end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "ipc").mkdir()
        for name in ("control", "stage-1-data"):
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(str(path / "ipc" / name))
        for name in (*OWN_FILES, "journal.sqlite3", "ipc/notes"):
            (path / name).touch()
        yield path


@pytest.fixture
def victim(state: Path) -> Iterator[Node]:
    """A process whose STATE_DIR that is."""
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    with subprocess.Popen(command, env=os.environ | {"STATE_DIR": str(state)}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield Node("stage-0", "stage", process.pid)
        process.kill()


def left(state: Path) -> set[str]:
    return {str(path.relative_to(state)) for path in state.rglob("*")}


@pytest.mark.parametrize(
    ("what", "is_left"),
    [
        ("sockets", {"ipc", "ipc/notes", "journal.sqlite3", *OWN_FILES}),
        ("folder", {"journal.sqlite3", *OWN_FILES}),
        ("all", {"journal.sqlite3"}),
    ],
)
def test_what_is_named_is_removed_and_the_journal_never(what: Lost, is_left: set[str], state: Path) -> None:
    for _ in range(2):  # for a second victim there may be nothing left
        remove(state / "ipc", state, what)
        assert left(state) == is_left


def test_files_go_at_once_and_victims_are_killed_after_their_time(state: Path, victim: Node) -> None:
    target, fault = ListedTarget(), LoseFiles(kill_after_s=0.2)
    target.running = {victim.name: victim}
    assert fault.unavailable(target) == ""
    fault.apply(target, [victim])
    assert "ipc/control" not in left(state)
    assert target.done == []
    wait_until(lambda: target.done == [("signal", "stage-0", signal.SIGKILL)], 5, "the kill")
    fault.heal(target)
    fault.heal(target)
    assert len(target.done) == 1
    assert "no socket files" in fault.unavailable(target)


def test_nobody_is_killed_where_the_time_is_0(state: Path, victim: Node) -> None:
    target, fault = ListedTarget(), LoseFiles(kill_after_s=0)
    fault.apply(target, [victim])
    fault.heal(target)
    assert target.done == []
