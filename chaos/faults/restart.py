"""A stop and, as soon as it has ended, a start: what a deployment does to one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chaos.faults.parameters import Parameters
from chaos.faults.stop import Stop


def make_restart(parameters: Mapping[str, Any]) -> Stop:
    """`timeout_s`, 1 to 120: time to leave in order."""
    taken = Parameters(parameters)
    timeout_s = taken.number("timeout_s", 20.0, 1, 120)
    taken.done()
    return Stop(timeout_s, comes_back=True, name="restart")
