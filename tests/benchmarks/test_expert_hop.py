"""The hop benchmark ends when one of its processes does."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.benchmarks import expert_hop


@pytest.mark.timeout(30)
def test_a_node_that_ends_before_its_hello_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with ExitStack() as started:

        def start(*arguments: object) -> subprocess.Popen[str]:
            process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE, text=True)
            return started.enter_context(process)

        monkeypatch.setattr(expert_hop, "start", start)
        with pytest.raises(RuntimeError, match="has ended"):
            expert_hop.run(f"ipc://{tmp_path}/{{socket}}", rows=1, choices=1, rounds=1, way="messages")
