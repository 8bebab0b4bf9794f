"""Who holds what, as a person or a program asks at GET /mesh. Pure: a published status in, plain JSON out."""

from __future__ import annotations

from typing import Any

from common.topology import CheckpointPart, NodeKind, StageSlot
from services.router.engine import Readiness
from services.router.mesh.status import MeshStatus, NodeStatus

JsonObject = dict[str, Any]


def describe_mesh(status: MeshStatus, readiness: Readiness) -> JsonObject:
    """`nodes` by id, with what each is for now, and `pipelines`. A part that dies is missing within a second."""
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
    own, beat = node.description, node.heartbeat
    return {
        "node": own.node_id,
        "kind": own.kind.value,
        "role": _role(node),
        "slot": _place(node.slot or node.mirrored),
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
    """`holder` of a slot, its `mirror`, `expert` with shards, or `spare`."""
    if node.slot is not None:
        return "holder"
    if node.mirrored is not None:
        return "mirror"
    return "expert" if node.num_shards else "spare"


def _part(part: CheckpointPart | None) -> JsonObject | None:
    """What it can load; None: everything."""
    if part is None:
        return None
    return {"layers": None if part.layers is None else list(part.layers), "experts": sorted(part.experts)}


def _place(slot: StageSlot | None) -> JsonObject | None:
    return None if slot is None else {"pipeline": slot.pipeline, "index": slot.index}
