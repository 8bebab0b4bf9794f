"""What the mesh thread publishes for other threads: immutable, a new one several times a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from common.ids import Generation, PipelineId
from common.messages import Heartbeat
from common.topology import NodeDescription, NodeKind, StageSlot
from services.router.control.membership import NodeState
from services.router.control.redundancy import NOTHING_MISSING, Redundancy
from services.router.engine import Readiness
from services.router.scheduling.snapshot import SchedulerCounters, SchedulerSnapshot


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One registered node."""

    description: NodeDescription
    state: NodeState
    heartbeat: Heartbeat | None
    slot: StageSlot | None
    """Of a stage that holds one."""
    mirrored: StageSlot | None = None
    """Of a spare stage that follows the holder of one, however far it is."""
    num_shards: int = 0
    """Of an expert node, as it reported."""


@dataclass(slots=True)
class HopTotals:
    """Time and bytes between processes since the router's start, also of nodes that are gone."""

    steps: int = 0
    step_seconds: float = 0.0
    step_bytes: int = 0
    expert_calls: int = 0
    expert_call_seconds: float = 0.0
    expert_call_bytes: int = 0
    expert_answers: int = 0
    expert_queue_seconds: float = 0.0
    expert_answer_bytes: int = 0
    resent_calls: int = 0
    hedges: int = 0
    hedge_wins: int = 0
    late_answers: int = 0
    cancelled_calls: int = 0
    suspicions: int = 0
    reduce_seconds: float = 0.0
    reduces: int = 0
    degraded_rows: int = 0
    other_class_rows: int = 0
    dropped: int = 0

    def keep(self, node: NodeDescription | None, last: Heartbeat | None) -> None:
        """Add a node's counts for good: it is gone."""
        if node is None or last is None:
            return
        self.dropped += last.dropped
        self.resent_calls += last.resent
        if node.kind is NodeKind.STAGE:
            self.expert_calls += last.hops
            self.expert_call_seconds += last.hop_seconds
            self.expert_call_bytes += last.hop_bytes
            self.hedges += last.hedged
            self.hedge_wins += last.hedge_wins
            self.late_answers += last.late
            self.suspicions += last.suspicions
            self.degraded_rows += last.degraded_rows
            self.other_class_rows += last.other_class_rows
            self.reduce_seconds += last.reduce_seconds
            self.reduces += last.reduces
        else:
            self.expert_answers += last.hops
            self.expert_queue_seconds += last.hop_seconds
            self.expert_answer_bytes += last.hop_bytes
            self.cancelled_calls += last.late

    def snapshot(self, nodes: tuple[NodeStatus, ...]) -> HopTotals:
        """The totals with what living nodes last reported."""
        total = replace(self)
        for node in nodes:
            total.keep(node.description, node.heartbeat)
        return total


@dataclass(frozen=True, slots=True)
class MeshStatus:
    """Everything that /ready, /metrics and the status page show of the mesh."""

    readiness: Readiness
    published_s: float | None
    """When the mesh thread made this status; None: it has not run yet."""
    served_s: float | None
    """When a new request would last have got tokens, by the mesh thread's clock; None: never."""
    nodes: tuple[NodeStatus, ...]
    scheduler: SchedulerSnapshot
    num_blocks: Mapping[PipelineId, int]
    hops: HopTotals
    placement_version: int
    generations: Mapping[PipelineId, Generation]
    redundancy: Redundancy = NOTHING_MISSING
    suspended_pipelines: int = 0
    """Pipelines that wait for a holder with their requests' blocks."""
    completions_per_s: float = 0.0
    """How fast the line of waiting requests goes forward."""

    @staticmethod
    def starting(detail: str) -> MeshStatus:
        """Before the mesh thread has looked once."""
        return MeshStatus(
            readiness=Readiness(False, detail),
            published_s=None,
            served_s=None,
            nodes=(),
            scheduler=SchedulerSnapshot(0, 0, 0, (), SchedulerCounters()),
            num_blocks={},
            hops=HopTotals(),
            placement_version=0,
            generations={},
        )
