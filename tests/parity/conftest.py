"""Checkpoints and references made once a session, and the count of excused positions at its end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.parity.verdict import ParityCount
from tests.support.checkpoints.shelf import Shelf

COUNT_KEY = pytest.StashKey[ParityCount]()


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    threads = torch.get_num_threads()
    # Models this small are faster on one thread, and the mesh needs the other core.
    torch.set_num_threads(1)
    yield Shelf(tmp_path_factory.mktemp("checkpoints"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def parity_count(request: pytest.FixtureRequest) -> ParityCount:
    return request.config.stash.setdefault(COUNT_KEY, ParityCount())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    count = config.stash.get(COUNT_KEY, None)
    if count is not None:
        terminalreporter.write_line(str(count))
