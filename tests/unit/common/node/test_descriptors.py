"""The limit of open files, seen by a process of its own: a limit that was lowered cannot be raised again here."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("soft", "hard", "after"), [(64, 200, 200), (200, 200, 200), (64, 400, 300)])
def test_a_process_raises_its_own_limit_as_far_as_it_may_and_needs(soft: int, hard: int, after: int) -> None:
    script = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "from common.node import process\n"
        "process.MAX_DESCRIPTORS = 300\n"
        "process.raise_descriptor_limit()\n"
        "print(process.descriptor_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[1])"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.split() == [str(after), str(hard)]
