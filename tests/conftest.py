"""What every test gets: where one fails that has a mesh, the report ends with the logs of the mesh's processes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.failed:
        fixtures: dict[str, Any] = getattr(item, "funcargs", {})
        for name, value in fixtures.items():
            log_tails = getattr(value, "log_tails", None)
            if log_tails is not None:
                report.sections.append((f"processes of {name}", log_tails()))
    return report
