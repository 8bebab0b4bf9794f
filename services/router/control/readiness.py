"""Whether a token can be made end to end, judged from what is seen of nodes and steps. Pure; time is an argument.

Three questions. Is every expert shard held by a node that lives? Is a pipeline open whose stages all live? And does it
answer: real steps under load, canaries (steps that carry nothing) in silence? How long a step, or the next token of a
running request, may take is what steps and tokens have been taking (`scheduling/pace.py`); before anything has been
measured, as long as the stages report progress.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.ids import NodeId, PipelineId
from common.messages import Heartbeat
from services.router.control.experts.shard_bits import ShardBits, count
from services.router.control.membership import NodeState
from services.router.engine import Readiness

CANARY_UNANSWERED_S = 1.5
"""A canary that is unanswered for this long, without progress, shows a hang."""
SILENT_S = 1.6
"""Without work a node has nothing to do but send heartbeats (every 0.25 s by default)."""
STALE_S = 1.5
"""A status is published every 0.1 s; one this old means that the mesh thread hangs."""


@dataclass(frozen=True, slots=True)
class Redundancy:
    """Counts, as they are now."""

    complete_mirrors: int = 0
    """Slots whose mirror could take over at once."""
    missing_mirrors: int = 0
    """Slots that should have one and have not."""
    missing_copies: int = 0
    """Safety copies of expert shards that are wished for and have no room or no node."""
    copies_to_load: int = 0
    """Those that have a place and are not loaded yet."""

    def warnings(self) -> tuple[str, ...]:
        """Returns each thing that there should be twice and is not, as a sentence."""
        said = (
            (self.missing_mirrors, "slots without a mirror that could take over"),
            (self.missing_copies, "safety copies of expert shards without room or without a node"),
            (self.copies_to_load, "safety copies of expert shards yet to be loaded"),
        )
        return tuple(f"{what}: {count}" for count, what in said if count)


NOTHING_MISSING = Redundancy()


@dataclass(frozen=True, slots=True)
class NodeEvidence:
    """One registered node."""

    state: NodeState
    heard_s: float
    """Its last heartbeat."""
    progressed_s: float
    """The last heartbeat that showed more work done than the one before."""
    idle_since_s: float | None = None
    """The heartbeat since which it has neither done any work nor had any; None: it has some."""


@dataclass(frozen=True, slots=True)
class Awaited:
    """An answer or a token that has not come."""

    since_s: float
    explained_s: float
    """How long the silence is normal, given how long such things have taken."""
    is_measured: bool
    """Whether there was anything to take that from. Else progress of the stages explains more."""

    def is_overdue(self, progressed_s: float, now_s: float) -> bool:
        """Returns whether it should have come by now. `progressed_s`: when a stage last reported work done."""
        since_s = self.since_s if self.is_measured else max(self.since_s, progressed_s)
        return now_s - since_s > self.explained_s


@dataclass(frozen=True, slots=True)
class PipelineEvidence:
    """One open pipeline."""

    pipeline: PipelineId
    holders: tuple[NodeId, ...]
    step: Awaited | None
    """The unanswered step with work that is overdue first."""
    token: Awaited | None
    """The running request whose next token or part of a prompt is overdue first."""
    canary_sent_s: float | None
    """When an unanswered step that carries nothing was sent."""
    last_work_s: float
    """When a step with work was last answered, or when the pipeline opened."""
    has_answered: bool = True
    """Whether any step has come back: the links from the router through all stages and back stand."""

    @property
    def canary(self) -> Awaited | None:
        """Returns the answer that is due to a step that carries nothing; None: none is."""
        return None if self.canary_sent_s is None else Awaited(self.canary_sent_s, CANARY_UNANSWERED_S, False)


@dataclass(frozen=True, slots=True)
class MeshEvidence:
    """What the mesh thread knows."""

    nodes: Mapping[NodeId, NodeEvidence]
    pipelines: tuple[PipelineEvidence, ...]
    stages_detail: str
    """What stage nodes there are, as a sentence."""
    is_served: bool
    """Every shard has a node that has loaded it and is not dead."""
    shards: Mapping[NodeId, ShardBits]
    """[W] by expert node: which shards it has loaded."""
    num_shards: int
    experts_detail: str
    redundancy: Redundancy = NOTHING_MISSING


def judge(evidence: MeshEvidence, now_s: float) -> Readiness:
    """Says that the mesh is ready, or all that is missing. A request that is stuck is a no, whatever else goes on."""
    reasons = _reasons(evidence, now_s)
    missing = _missing(evidence, reasons, now_s)
    if not missing:
        missing = [stuck for pipeline in evidence.pipelines if (stuck := _stuck(pipeline, evidence, now_s))]
    if missing:
        return Readiness(False, "; ".join(missing), tuple(missing), evidence.redundancy.warnings())
    detail = f"{reasons.count('')} pipelines; {evidence.experts_detail}"
    return Readiness(True, detail, warnings=evidence.redundancy.warnings())


def accepts_requests(evidence: MeshEvidence, now_s: float) -> bool:
    """Returns whether a new request would get tokens, perhaps of another pipeline than one that is stuck."""
    return not _missing(evidence, _reasons(evidence, now_s), now_s)


def judge_age(readiness: Readiness, published_s: float | None, now_s: float) -> Readiness:
    """Returns what a status still says that was published some time ago. None: the mesh thread has not looked yet."""
    if published_s is None or now_s - published_s <= STALE_S:
        return readiness
    missing = f"the mesh thread has been silent for {now_s - published_s:.1f} s"
    return Readiness(False, missing, (missing,))


class ProgressWatch:
    """When each node was heard, and when its counts of work last grew."""

    def __init__(self) -> None:
        self._heard: dict[NodeId, NodeEvidence] = {}
        self._counts: dict[NodeId, tuple[int, ...]] = {}

    def join(self, node_id: NodeId, now_s: float) -> None:
        """It has registered."""
        self._heard[node_id] = NodeEvidence(NodeState.ALIVE, now_s, now_s)
        self._counts[node_id] = ()

    def note(self, node_id: NodeId, heartbeat: Heartbeat, now_s: float) -> None:
        """A heartbeat of a node that has joined. Busy seconds are not progress: a retry keeps busy, too."""
        before, counts = self._heard[node_id], heartbeat.work_done
        has_progressed = counts != self._counts[node_id]
        idle_since_s = now_s if has_progressed or before.idle_since_s is None else before.idle_since_s
        self._heard[node_id] = NodeEvidence(
            before.state,
            now_s,
            now_s if has_progressed else before.progressed_s,
            None if heartbeat.queued else idle_since_s,
        )
        self._counts[node_id] = counts

    def forget(self, node_id: NodeId) -> None:
        """It is gone; an unknown node is not an error."""
        self._heard.pop(node_id, None)
        self._counts.pop(node_id, None)

    def evidence(self, node_id: NodeId, state: NodeState) -> NodeEvidence:
        """Returns what is seen of a node that has joined."""
        return replace(self._heard[node_id], state=state)


def _missing(evidence: MeshEvidence, reasons: Sequence[str], now_s: float) -> list[str]:
    """Returns what keeps every pipeline from making tokens. `reasons`: those of `_reasons`."""
    missing = _missing_shards(evidence, _quiet_since_s(evidence), now_s)
    if not reasons:
        missing.append(f"no pipeline is open ({evidence.stages_detail})")
    elif all(reasons):
        missing += reasons
    return missing


def _reasons(evidence: MeshEvidence, now_s: float) -> list[str]:
    """Returns why each pipeline can make no token now; "" for one that can."""
    quiet_since_s = _quiet_since_s(evidence)
    return [_why_not(pipeline, evidence, quiet_since_s, now_s) for pipeline in evidence.pipelines]


def _quiet_since_s(evidence: MeshEvidence) -> float | None:
    """Returns when the last work was answered; None while there is some. A busy node may be too busy for heartbeats."""
    if any(pipeline.step is not None for pipeline in evidence.pipelines):
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
    served = [held for node_id, held in evidence.shards.items() if node_id not in mute]
    num_unserved = evidence.num_shards - (int(count(np.bitwise_or.reduce(served))) if served else 0)
    if not num_unserved:
        return []
    return [f"{num_unserved} of {evidence.num_shards} expert shards are only on nodes not answering: {', '.join(mute)}"]


def _why_not(pipeline: PipelineEvidence, evidence: MeshEvidence, quiet_since_s: float | None, now_s: float) -> str:
    """Returns why this pipeline can make no token now; "" if it can."""
    nodes = evidence.nodes
    mute = [n for n in pipeline.holders if not _answers(nodes.get(n), quiet_since_s, now_s)]
    if mute:
        return f"pipeline {pipeline.pipeline}: not answering: {', '.join(mute)}"
    progressed_s = _progressed_s(pipeline, nodes)
    for what, awaited in (("step", pipeline.step), ("canary", pipeline.canary)):
        if awaited is not None and awaited.is_overdue(progressed_s, now_s):
            return f"pipeline {pipeline.pipeline}: a {what} has been unanswered for {now_s - awaited.since_s:.1f} s"
    if not pipeline.has_answered:
        return f"pipeline {pipeline.pipeline}: nothing has come through its links yet"
    return _stuck(pipeline, evidence, now_s)


def _stuck(pipeline: PipelineEvidence, evidence: MeshEvidence, now_s: float) -> str:
    """Names a running request that gets no further; "" if there is none, or where a stage is dead anyway."""
    if not evidence.nodes.keys() >= set(pipeline.holders) or pipeline.token is None:
        return ""
    if not pipeline.token.is_overdue(_progressed_s(pipeline, evidence.nodes), now_s):
        return ""
    since_s = pipeline.token.since_s
    return f"pipeline {pipeline.pipeline}: a running request has had no token for {now_s - since_s:.1f} s"


def _progressed_s(pipeline: PipelineEvidence, nodes: Mapping[NodeId, NodeEvidence]) -> float:
    return max(nodes[node_id].progressed_s for node_id in pipeline.holders)
