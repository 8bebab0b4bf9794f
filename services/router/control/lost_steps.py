"""Lost steps: sent, not answered, and at no stage. Pure; time is an argument.

A link that breaks loses what was on it, without a word: a step between two stages, or a result on its way to the
router. The next message over that link shows the gap by its number; where none comes, since all requests wait for just
this answer, nothing shows it but the step's deadline, which is long, since work may be. But every stage says with its
heartbeats whether it has work: a step that is late, while no stage has had any for several heartbeats, is lost.

It may be on its way still, on a slow link. So what counts as late is what such steps have been taking
(`scheduling/pace.py`), and after each renewal that brought no answer twice the time before the next one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from common.ids import PipelineId
from services.router.control.readiness import Awaited, MeshEvidence, PipelineEvidence

UNHELD_S = 0.75
"""How long all stages must have said that they have nothing: three heartbeats of the usual interval."""
MAX_DOUBLINGS = 6


@dataclass(slots=True)
class _Renewed:
    """A pipeline whose steps were given up for lost, and in which nothing has been answered since."""

    times: int
    first_sent_s: float | None = None
    """When the first step after the last renewal was sent."""


class LostSteps:
    """Ask `look` several times a second."""

    def __init__(self) -> None:
        self._renewed: dict[PipelineId, _Renewed] = {}

    def look(self, evidence: MeshEvidence, unsent: Collection[PipelineId], now_s: float) -> list[PipelineId]:
        """Returns pipelines that have lost a step and need a new generation. `unsent`: those with a step that the first
        stage has not taken yet, so the router has it."""
        lost = []
        for pipeline in evidence.pipelines:
            awaited = pipeline.step or pipeline.canary
            if awaited is None or pipeline.pipeline in unsent:
                continue
            times = self._times_without_answer(pipeline.pipeline, awaited)
            if self._is_lost(pipeline, awaited, 1 << times, evidence, now_s):
                self._renewed[pipeline.pipeline] = _Renewed(min(times + 1, MAX_DOUBLINGS))
                lost.append(pipeline.pipeline)
        return lost

    def _times_without_answer(self, pipeline: PipelineId, awaited: Awaited) -> int:
        renewed = self._renewed.get(pipeline)
        if renewed is None:
            return 0
        if renewed.first_sent_s is None:
            renewed.first_sent_s = awaited.since_s
        elif awaited.since_s > renewed.first_sent_s:  # so that one has been answered
            del self._renewed[pipeline]
            return 0
        return renewed.times

    @staticmethod
    def _is_lost(
        pipeline: PipelineEvidence, awaited: Awaited, patience: int, evidence: MeshEvidence, now_s: float
    ) -> bool:
        if now_s - awaited.since_s <= patience * awaited.explained_s:
            return False
        for node_id in pipeline.holders:
            node = evidence.nodes.get(node_id)
            if node is None or node.idle_since_s is None or now_s - node.heard_s > UNHELD_S:
                return False  # one that says nothing may compute
            if node.heard_s - max(node.idle_since_s, awaited.since_s) < patience * UNHELD_S:
                return False
        return True
