"""What the mesh thread publishes: gathered from nodes, roles and steps, judged, and shown at GET /mesh. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from common.ids import Generation, NodeId, PipelineId
from common.messages import ExpertHeartbeat, Heartbeat
from common.topology import CheckpointPart, NodeDescription, NodeKind, StageSlot
from services.router.control.experts.expert_roles import ExpertRoles
from services.router.control.membership import Membership, NodeState
from services.router.control.readiness import NOTHING_MISSING, MeshEvidence, ProgressWatch, Redundancy
from services.router.control.stage_roles import StageRoles
from services.router.engine import Readiness
from services.router.scheduling.snapshot import SchedulerSnapshot

JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One registered node."""

    description: NodeDescription
    state: NodeState
    heartbeat: Heartbeat | None
    slot: StageSlot | None
    """The slot of a stage that holds one."""
    mirrored: StageSlot | None = None
    """The slot of a spare stage that follows its holder, however far it is."""
    num_shards: int = 0
    """The shards of an expert node, as it reported."""


@dataclass(slots=True)
class HopTotals:
    """Time and bytes between processes since the router's start, also of nodes that are gone. What has the name of a
    field of heartbeats is the sum of these."""

    pipeline_steps: int = 0
    pipeline_seconds: float = 0.0
    pipeline_bytes: int = 0
    calls: int = 0
    call_seconds: float = 0.0
    call_bytes: int = 0
    answers: int = 0
    """The steps of expert nodes."""
    queue_seconds: float = 0.0
    answer_bytes: int = 0
    resent: int = 0
    hedged: int = 0
    hedge_wins: int = 0
    late_answers: int = 0
    cancelled: int = 0
    suspicions: int = 0
    reduce_seconds: float = 0.0
    reduces: int = 0
    degraded_rows: int = 0
    other_class_rows: int = 0
    dropped: int = 0

    def keep(self, last: Heartbeat | None) -> None:
        """Adds the counts that a node last reported."""
        if last is None:
            return
        for total in fields(self):
            if hasattr(last, total.name):
                setattr(self, total.name, getattr(self, total.name) + getattr(last, total.name))
        if isinstance(last, ExpertHeartbeat):
            self.answers += last.steps

    def snapshot(self, nodes: tuple[NodeStatus, ...]) -> HopTotals:
        """Returns the totals with what living nodes last reported."""
        total = replace(self)
        for node in nodes:
            total.keep(node.heartbeat)
        return total


@dataclass(frozen=True, slots=True)
class MeshStatus:
    """Everything that /ready, /metrics and the status page show of the mesh: nothing yet, unless it is given."""

    readiness: Readiness
    published_s: float | None = None
    """When the mesh thread made this status; None: it has not run yet."""
    served_s: float | None = None
    """When a new request would last have got tokens, by the mesh thread's clock; None: never."""
    nodes: tuple[NodeStatus, ...] = ()
    scheduler: SchedulerSnapshot = field(default_factory=SchedulerSnapshot)
    num_blocks: Mapping[PipelineId, int] = field(default_factory=dict)
    hops: HopTotals = field(default_factory=HopTotals)
    placement_version: int = 0
    generations: Mapping[PipelineId, Generation] = field(default_factory=dict)
    redundancy: Redundancy = NOTHING_MISSING
    suspended_pipelines: int = 0
    """Pipelines that wait for a holder with their requests' blocks."""
    completions_per_s: float = 0.0
    """How fast the line of waiting requests goes forward."""


def mesh_evidence(
    membership: Membership,
    progress: ProgressWatch,
    stages: StageRoles,
    experts: ExpertRoles,
    scheduler: SchedulerSnapshot,
) -> MeshEvidence:
    """Returns all living nodes, and the pipelines that roles and scheduler both hold open."""
    holders = {
        pipeline: tuple(node_id for node_id in roles.holders if node_id is not None)
        for pipeline, roles in stages.pipelines.items()
        if roles.is_open
    }
    return MeshEvidence(
        nodes={node_id: progress.evidence(node_id, state) for node_id, state in membership.living().items()},
        pipelines=tuple(
            replace(seen, holders=holders[seen.pipeline]) for seen in scheduler.pipelines if seen.pipeline in holders
        ),
        stages_detail=stages.detail,
        is_served=experts.is_served,
        shards=experts.ready,
        num_shards=experts.num_shards,
        experts_detail=experts.detail,
        redundancy=Redundancy(
            stages.mirrors.num_complete,
            stages.mirrors.num_missing,
            experts.missing_copies,
            experts.num_copies_to_load,
        ),
    )


def node_statuses(
    nodes: Mapping[NodeId, NodeDescription],
    membership: Membership,
    heartbeats: Mapping[NodeId, Heartbeat],
    stages: StageRoles,
    experts: ExpertRoles,
) -> tuple[NodeStatus, ...]:
    """Returns all registered nodes, by id."""
    mirrored = {node_id: slot for slot, node_id in stages.mirrors.nodes.items()}
    num_held = experts.num_held
    return tuple(
        NodeStatus(
            node,
            membership.state_of(node_id),
            heartbeats.get(node_id),
            stages.slot_of(node_id),
            mirrored.get(node_id),
            num_held.get(node_id, 0),
        )
        for node_id, node in sorted(nodes.items())
    )


def describe_mesh(status: MeshStatus, readiness: Readiness) -> JsonObject:
    """Returns `nodes` by id, with what each is for, and `pipelines`. What dies is missing within a second."""
    generations = status.generations
    return {
        "ready": readiness.ready,
        "detail": readiness.detail,
        "warnings": list(readiness.warnings),
        "placement_version": status.placement_version,
        "missing_copies": status.redundancy.missing_copies,
        "pipelines": [
            {"pipeline": pipeline, "generation": generations[pipeline], "open": pipeline in status.num_blocks}
            for pipeline in sorted(generations)
        ],
        "nodes": [_node(node) for node in status.nodes],
    }


def _node(node: NodeStatus) -> JsonObject:
    own, beat, slot = node.description, node.heartbeat, node.slot or node.mirrored
    return {
        "node": own.node_id,
        "kind": own.kind.value,
        "role": _role(node),
        "slot": None if slot is None else {"pipeline": slot.pipeline, "index": slot.index},
        "state": node.state.value,
        "process": own.process,
        "host": own.host_label,
        "numeric_class": own.numeric_class,
        "capacity_bytes": own.capacity_bytes,
        "part": _part(own.part),
        "shards": node.num_shards if own.kind is NodeKind.EXPERT else None,
        "busy_seconds": beat.busy_seconds if beat else None,
        "rows": beat.rows if beat else None,
        "queued": beat.queued if beat else None,
    }


def _role(node: NodeStatus) -> str:
    """Returns `holder` of a slot, its `mirror`, `expert` with shards, or `spare`."""
    if node.slot is not None:
        return "holder"
    if node.mirrored is not None:
        return "mirror"
    return "expert" if node.num_shards else "spare"


def _part(part: CheckpointPart | None) -> JsonObject | None:
    """Returns what it can load; None: everything."""
    if part is None:
        return None
    return {"layers": None if part.layers is None else list(part.layers), "experts": sorted(part.experts)}
