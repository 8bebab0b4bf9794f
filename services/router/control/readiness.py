"""Whether a token can be made end to end, judged from what is seen of nodes and steps. Pure; time is an argument.

Three questions. Is every expert shard held by a node that lives? Is a pipeline open whose stages all live? And does it
answer: real steps under load, canaries (steps that carry nothing) in silence? A step that takes long is no hang while
its stages report progress, or while steps have been taking as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.ids import NodeId, PipelineId
from common.membership import NodeState
from common.messages import Heartbeat
from common.topology import ShardId
from services.router.engine import Readiness

UNANSWERED_S = 1.5
"""A step that is unanswered for so long, without progress, shows a hang."""
SLOW_STEP_FACTOR = 4.0
"""Where steps are slow: so many times the 99th percentile of recent ones."""
SILENT_S = 1.6
"""Without work a node has nothing to do but send heartbeats (every 0.25 s by default)."""
STALE_S = 1.5
"""A status is published every 0.1 s; one that is so old means that the mesh thread hangs."""


@dataclass(frozen=True, slots=True)
class NodeEvidence:
    """One registered node."""

    state: NodeState
    heard_s: float
    """Its last heartbeat."""
    progressed_s: float
    """The last heartbeat that showed more work done than the one before."""


@dataclass(frozen=True, slots=True)
class PipelineEvidence:
    """One open pipeline."""

    pipeline: PipelineId
    holders: tuple[NodeId, ...]
    oldest_step_sent_s: float | None
    """Of the steps with work that are unanswered."""
    canary_sent_s: float | None
    """Of an unanswered step that carries nothing."""
    last_work_s: float
    """When a step with work was last answered, or when the pipeline opened."""
    p99_step_s: float
    """Of recent steps with work; 0: none yet."""


@dataclass(frozen=True, slots=True)
class MeshEvidence:
    """What the mesh thread knows."""

    nodes: Mapping[NodeId, NodeEvidence]
    pipelines: tuple[PipelineEvidence, ...]
    stages_detail: str
    """What stage nodes there are, as a sentence."""
    is_served: bool
    """Every shard has a node that has loaded it and is not dead."""
    shards: Mapping[NodeId, frozenset[ShardId]]
    """What each expert node has loaded."""
    num_shards: int
    experts_detail: str


def judge(evidence: MeshEvidence, now_s: float) -> Readiness:
    """Ready, or everything that is missing."""
    quiet_since_s = _quiet_since_s(evidence)
    missing = _missing_shards(evidence, quiet_since_s, now_s)
    reasons = [_why_not(pipeline, evidence, quiet_since_s, now_s) for pipeline in evidence.pipelines]
    if not reasons:
        missing.append(f"no pipeline is open ({evidence.stages_detail})")
    elif all(reasons):
        missing += reasons
    if missing:
        return Readiness(False, "; ".join(missing), tuple(missing))
    return Readiness(True, f"{reasons.count('')} pipelines; {evidence.experts_detail}")


def judge_age(readiness: Readiness, published_s: float | None, now_s: float) -> Readiness:
    """What a status still says that was published some time ago. None: the mesh thread has not looked yet."""
    if published_s is None or now_s - published_s <= STALE_S:
        return readiness
    missing = f"the mesh thread has been silent for {now_s - published_s:.1f} s"
    return Readiness(False, missing, (missing,))


class ProgressWatch:
    """When each node was heard, and when its counts of work last grew."""

    def __init__(self) -> None:
        self._heard: dict[NodeId, tuple[float, float, tuple[int, ...]]] = {}

    def join(self, node_id: NodeId, now_s: float) -> None:
        """It has registered."""
        self._heard[node_id] = now_s, now_s, ()

    def note(self, node_id: NodeId, heartbeat: Heartbeat, now_s: float) -> None:
        """A heartbeat of a node that has joined. Busy seconds are no progress: a retry keeps busy, too."""
        _, progressed_s, before = self._heard[node_id]
        counts = heartbeat.steps, heartbeat.rows, heartbeat.hops
        self._heard[node_id] = now_s, progressed_s if counts == before else now_s, counts

    def forget(self, node_id: NodeId) -> None:
        """It is gone; one that is not known is no error."""
        self._heard.pop(node_id, None)

    def evidence(self, node_id: NodeId, state: NodeState) -> NodeEvidence:
        """Of a node that has joined."""
        heard_s, progressed_s, _ = self._heard[node_id]
        return NodeEvidence(state, heard_s, progressed_s)


def _quiet_since_s(evidence: MeshEvidence) -> float | None:
    """When the last work was answered; None while there is some. A busy node may be too busy for heartbeats."""
    if any(pipeline.oldest_step_sent_s is not None for pipeline in evidence.pipelines):
        return None
    return max((pipeline.last_work_s for pipeline in evidence.pipelines), default=None)


def _answers(node: NodeEvidence | None, quiet_since_s: float | None, now_s: float) -> bool:
    if node is None or node.state is not NodeState.ALIVE:
        return False
    return quiet_since_s is None or now_s - max(node.heard_s, quiet_since_s) <= SILENT_S


def _missing_shards(evidence: MeshEvidence, quiet_since_s: float | None, now_s: float) -> list[str]:
    if not evidence.is_served:
        return [evidence.experts_detail]
    mute = [n for n in sorted(evidence.shards) if not _answers(evidence.nodes.get(n), quiet_since_s, now_s)]
    if not mute:
        return []
    served = frozenset[ShardId]().union(*(held for n, held in evidence.shards.items() if n not in mute))
    num_unserved = evidence.num_shards - len(served)
    if not num_unserved:
        return []
    return [f"{num_unserved} of {evidence.num_shards} expert shards are held only by {', '.join(mute)}: no answer"]


def _why_not(pipeline: PipelineEvidence, evidence: MeshEvidence, quiet_since_s: float | None, now_s: float) -> str:
    """Why this pipeline can make no token now; "" if it can."""
    nodes = evidence.nodes
    mute = [n for n in pipeline.holders if not _answers(nodes.get(n), quiet_since_s, now_s)]
    if mute:
        return f"pipeline {pipeline.pipeline}: {', '.join(mute)} does not answer"
    progressed_s = max(nodes[node_id].progressed_s for node_id in pipeline.holders)
    limit_s = max(UNANSWERED_S, SLOW_STEP_FACTOR * pipeline.p99_step_s)
    for what, sent_s, allowed_s in (
        ("step", pipeline.oldest_step_sent_s, limit_s),
        ("canary", pipeline.canary_sent_s, UNANSWERED_S),
    ):
        if sent_s is not None and now_s - max(sent_s, progressed_s) > allowed_s:
            return f"pipeline {pipeline.pipeline}: a {what} has been unanswered for {now_s - sent_s:.1f} s"
    return ""
