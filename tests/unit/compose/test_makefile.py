"""What `make run` says where the mesh cannot start: the sentence, and nothing of make's own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("status", "is_success"), [(0, True), (1, False), (130, False)])
def test_the_last_line_is_why_a_mesh_cannot_start_and_the_status_tells_it_too(
    status: int, is_success: bool, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "moemesh"
    command.write_text(f"#!/bin/sh\necho 'moemesh: the reason' >&2\nexit {status}\n")
    command.chmod(0o755)
    (tmp_path / "installed.stamp").touch()
    done = subprocess.run(
        ["make", "--no-print-directory", "run", f"VENV={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode == 0) == is_success
    assert done.stderr == "moemesh: the reason\n"
    assert done.stdout == ""
