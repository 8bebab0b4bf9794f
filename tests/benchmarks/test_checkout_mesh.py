"""Meshes of other checkouts, with a shell script in place of their command."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.benchmarks.checkout_mesh import THIS_CHECKOUT, checkout_mesh, command_of, tree_cpu_s

BURN = "import sys, time; [None for _ in iter(lambda: time.process_time() < 0.3, False)]; print('done', flush=True)"


def test_the_command_is_that_of_the_checkout(tmp_path: Path) -> None:
    assert command_of(THIS_CHECKOUT).name == "moemesh"
    with pytest.raises(RuntimeError, match="make setup"):
        command_of(tmp_path)


def test_a_mesh_that_cannot_start_says_why(tmp_path: Path) -> None:
    command = tmp_path / ".venv" / "bin" / "moemesh"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\necho "no $1 with $MODEL in $(pwd)"\nexit 3\n')
    command.chmod(0o755)
    with pytest.raises(RuntimeError, match=rf"status 3.*\n.*no up with tiny in {tmp_path}"):
        with checkout_mesh(tmp_path, {"MODEL": "tiny"}):
            pass


def test_cpu_time_of_children_counts_while_they_live_and_after() -> None:
    # The child burns, and its parent waits for a word.
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURN!r}]); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        while_it_lives_or_just_after_s = tree_cpu_s(process.pid)
        time.sleep(0.2)
        assert 0.29 <= while_it_lives_or_just_after_s <= tree_cpu_s(process.pid) + 0.02
        process.stdin.close()
    assert tree_cpu_s(process.pid) == 0
