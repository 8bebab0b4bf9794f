"""What the mesh thread knows of nodes and steps, put together for `control/readiness.py`. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from common.ids import NodeId
from common.messages import Heartbeat
from common.topology import NodeDescription
from services.router.control.experts.expert_roles import ExpertRoles
from services.router.control.membership import Membership
from services.router.control.readiness import MeshEvidence, PipelineEvidence, ProgressWatch
from services.router.control.redundancy import Redundancy
from services.router.control.stage_roles import StageRoles
from services.router.mesh.status import NodeStatus
from services.router.scheduling.snapshot import SchedulerSnapshot


def mesh_evidence(
    membership: Membership,
    progress: ProgressWatch,
    stages: StageRoles,
    experts: ExpertRoles,
    scheduler: SchedulerSnapshot,
) -> MeshEvidence:
    """All living nodes, and the pipelines that roles and scheduler both hold open."""
    holders = {
        pipeline: tuple(node_id for node_id in roles.holders if node_id is not None)
        for pipeline, roles in stages.pipelines.items()
        if roles.is_open
    }
    return MeshEvidence(
        nodes={node_id: progress.evidence(node_id, state) for node_id, state in membership.living().items()},
        pipelines=tuple(
            PipelineEvidence(
                pipeline=seen.pipeline,
                holders=holders[seen.pipeline],
                step=seen.awaited_step,
                token=seen.awaited_token,
                canary_sent_s=seen.canary_sent_s,
                last_work_s=seen.last_work_s,
                has_answered=seen.has_answered,
            )
            for seen in scheduler.pipelines
            if seen.pipeline in holders
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
    """All registered nodes, by id."""
    mirrored = {node_id: slot for slot, node_id in stages.mirrors.nodes.items()}
    return tuple(
        NodeStatus(
            node,
            membership.state_of(node_id),
            heartbeats.get(node_id),
            stages.slot_of(node_id),
            mirrored.get(node_id),
            experts.num_held(node_id),
        )
        for node_id, node in sorted(nodes.items())
    )
