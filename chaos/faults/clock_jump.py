"""The wall clock of a node jumps. This works only for processes that were started under libfaketime, which reads the
offset from a file; their monotonic clock stays, since no kernel makes that jump."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from chaos.faults.base import Fault, Range
from chaos.faults.processes import environment_of, path_seen_by
from chaos.target import Node, Target, TargetError

_NO_OFFSET = "+0"


class ClockJump(Fault):
    """The clock goes forward by `offset_s`, or back where that is negative. Processes with one file jump together."""

    name = "clock_jump"
    offset_s: Annotated[float, Range(-1e9, 1e9)] = 3600

    def unavailable(self, target: Target) -> str:
        return next((reason for node in target.nodes() if (reason := _refusal(node))), "")

    def apply(self, target: Target, victims: Sequence[Node]) -> None:
        for victim in victims:
            if reason := _refusal(victim):
                raise TargetError(reason)
            path = path_seen_by(victim, environment_of(victim)["FAKETIME_TIMESTAMP_FILE"]).resolve()
            self._undo.add(path.write_text, _NO_OFFSET)
            path.write_text(f"{self.offset_s:+g}")


def _refusal(node: Node) -> str:
    try:
        environment = environment_of(node)
    except TargetError as error:
        return str(error)
    if "libfaketime" in environment.get("LD_PRELOAD", "") and environment.get("FAKETIME_TIMESTAMP_FILE"):
        return ""
    return f"{node.name} was not started under libfaketime"
