"""The contract of a fault.

`apply` hurts, `heal` undoes it and is safe to call at any time, also twice and also when nothing was applied; the
runner heals everything at the start of a run, after each fault's time, and at the end. A fault keeps what it must undo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from chaos.target import Node, Target


class Fault(Protocol):
    """One kind of damage with its parameters."""

    name: str
    """As suites and reports write it, for example `kill`."""
    needs: frozenset[str]
    """Features that the target must have; a target without them skips the fault, and the report says so."""

    def unavailable(self, target: Target) -> str:
        """Why this machine cannot do it (a missing program, a kernel without a module), as a sentence; empty if it
        can."""
        ...

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        """Hurt the victims now; returns at once. Raises TargetError if it cannot."""
        ...

    def heal(self, target: Target) -> None:
        """Undo everything that this object has done."""
        ...


FaultMaker = Callable[[Mapping[str, Any]], Fault]
"""From the parameters of a suite's YAML; raises ValueError that names the parameter and what would be right."""
