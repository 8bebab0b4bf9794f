"""A process that has a folder of its own. It mounts something, in a namespace that ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.targets.on_host import NAMESPACE_VARIABLE, OWN_FOLDER_VARIABLE

READS_A_FILE = "json.tool"
"""A module that prints the file that it is given, or fails."""


def read(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Reads a file with a process on a played host."""
    clean = {name: value for name, value in os.environ.items() if name not in (NAMESPACE_VARIABLE, OWN_FOLDER_VARIABLE)}
    command = [sys.executable, "-m", "chaos.targets.on_host", READS_A_FILE, str(path)]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=60)


def test_without_a_folder_of_its_own_a_process_sees_all_files(tmp_path: Path) -> None:
    (tmp_path / "shared.json").write_text("1")
    assert read(tmp_path / "shared.json").stdout == "1\n"


def test_a_process_with_a_folder_of_its_own_sees_no_file_of_it_and_others_see_them_still(tmp_path: Path) -> None:
    (tmp_path / "shared.json").write_text("1")
    done = read(tmp_path / "shared.json", **{OWN_FOLDER_VARIABLE: str(tmp_path)})
    if "no mount namespace can be made" in done.stderr:
        pytest.skip("this user may make no mount namespace")
    assert done.returncode != 0
    assert "No such file" in done.stderr
    assert (tmp_path / "shared.json").read_text() == "1"
    assert not os.path.ismount(tmp_path)
