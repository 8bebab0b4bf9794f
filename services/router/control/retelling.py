"""What a node believes and should not, or should and does not, it is told again. Pure; time is an argument.

Any control message may be lost with the link that carries it. So each heartbeat says what the node believes, and the
router compares that with what it wants, whatever it remembers to have sent. A message that is on its way is not
repeated: what differs is told again when it has differed for longer than a message takes, and then less and less often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from common.ids import NodeId, PipelineId
from services.router.control.actions import Action
from services.router.control.pipeline_state import Pipeline

PATIENCE_S = 0.4
"""With heartbeats every 0.25 s, what was lost is told again at the third one that shows it."""
MAX_PATIENCE_S = 3.0
RETRY_S = 5.0
"""After a node could not take its role."""


class Topic(StrEnum):
    """What a node may be wrong about."""

    ROLE = "role"
    FEED = "feed"
    PLACEMENT = "placement"
    SHARDS = "shards"


@dataclass(frozen=True, slots=True)
class Misbelief:
    """A node believes something else than it should."""

    topic: Topic
    wanted: tuple[int, ...]
    """Stands for what it should believe: another value is another disagreement."""
    tell: Callable[[], list[Action]]
    """Makes what it is to be told, only when it is."""


@dataclass(slots=True)
class _Open:
    wanted: tuple[int, ...]
    tell_at_s: float
    patience_s: float = PATIENCE_S


class Retelling:
    """Since when each node disagrees about what, and when it is told again."""

    def __init__(self) -> None:
        self._open: dict[NodeId, dict[Topic, _Open]] = {}

    def due(self, node_id: NodeId, found: Iterable[Misbelief], now_s: float) -> dict[Topic, list[Action]]:
        """What to tell a node again now. `found`: all that its newest heartbeat shows."""
        before, after = self._open.pop(node_id, {}), dict[Topic, _Open]()
        due: dict[Topic, list[Action]] = {}
        for one in found:
            known = before.get(one.topic)
            if known is None or known.wanted != one.wanted:
                known = _Open(one.wanted, now_s + PATIENCE_S)
            elif now_s >= known.tell_at_s:
                known.patience_s = min(2 * known.patience_s, MAX_PATIENCE_S)
                known.tell_at_s = now_s + known.patience_s
                due[one.topic] = one.tell()
            after[one.topic] = known
        if after:
            self._open[node_id] = after
        return due

    def forget(self, node_id: NodeId) -> None:
        """It is gone; one that agreed in everything is no error."""
        self._open.pop(node_id, None)


class Refusals:
    """Pipelines that wait for a node which refused its role, and when they are assigned anew."""

    def __init__(self) -> None:
        self._waiting: dict[PipelineId, tuple[int, float]] = {}

    def note(self, pipeline: PipelineId, generation: int, now_s: float) -> None:
        """In this generation; said again it changes nothing."""
        if self._waiting.get(pipeline, (0, 0.0))[0] != generation:
            self._waiting[pipeline] = generation, now_s + RETRY_S

    def due(self, pipelines: Mapping[PipelineId, Pipeline], now_s: float) -> list[PipelineId]:
        """Whom to assign anew now: not those that have other holders by now."""
        due = {pipeline: generation for pipeline, (generation, at_s) in self._waiting.items() if now_s >= at_s}
        for pipeline in due:
            del self._waiting[pipeline]
        return [p for p, generation in due.items() if p in pipelines and pipelines[p].generation == generation]
