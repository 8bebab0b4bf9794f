"""A machine that lacks something is told what to install, in one line."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "compose" / "setup-venv.sh"


def set_up(folder: Path, interpreter: str | None) -> subprocess.CompletedProcess[str]:
    """The script on a machine whose only python3 is this shell script."""
    tools = folder / "bin"
    tools.mkdir()
    if interpreter is not None:
        (tools / "python3").write_text(f"#!/bin/sh\n{interpreter}\n")
        (tools / "python3").chmod(0o755)
    shell = shutil.which("sh")
    assert shell is not None
    return subprocess.run(
        [shell, str(SCRIPT), str(folder / "venv")],
        env={"PATH": str(tools)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_no_python_is_said_in_one_line(tmp_path: Path) -> None:
    result = set_up(tmp_path, None)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "Python 3.11 or newer is missing" in line
    assert "apt-get install python3" in line


def test_an_old_python_is_not_taken(tmp_path: Path) -> None:
    result = set_up(tmp_path, "exit 1")
    (line,) = result.stderr.splitlines()
    assert "Python 3.11 or newer is missing" in line


def test_a_python_without_ensurepip_names_the_package_of_its_own_version(tmp_path: Path) -> None:
    result = set_up(tmp_path, 'case "$2" in *ensurepip*) exit 1 ;; *print*) echo 3.11 ;; esac')
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "apt-get install python3.11-venv" in line
    assert not (tmp_path / "venv").exists()
