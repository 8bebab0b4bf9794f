"""What the mesh thread knows of nodes and steps, put together for `control/readiness.py`. Pure."""

from __future__ import annotations

from common.membership import Membership
from services.router.control.expert_roles import ExpertRoles
from services.router.control.readiness import MeshEvidence, PipelineEvidence, ProgressWatch
from services.router.control.stage_roles import StageRoles
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
            )
            for seen in scheduler.pipelines
            if seen.pipeline in holders
        ),
        stages_detail=stages.detail,
        is_served=experts.is_served,
        shards=experts.ready,
        num_shards=experts.num_shards,
        experts_detail=experts.detail,
    )
