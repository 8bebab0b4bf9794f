"""What GET /mesh says of a status."""

from __future__ import annotations

import json
from dataclasses import replace

from common.ids import Generation, PipelineId, SlotIndex
from common.messages import StageHeartbeat
from common.topology import NodeKind, StageSlot
from services.router.control.membership import NodeState
from services.router.engine import Readiness
from services.router.mesh.status import MeshStatus, NodeStatus, describe_mesh
from tests.support.router.mesh_shapes import node

BEAT = StageHeartbeat(steps=4, rows=40, queued=3)
SLOT = StageSlot(PipelineId(0), SlotIndex(1))


def test_each_node_has_the_role_that_it_plays_now() -> None:
    status = replace(
        MeshStatus(Readiness(False, "")),
        nodes=(
            NodeStatus(node("a", process="here/42"), NodeState.ALIVE, BEAT, SLOT),
            NodeStatus(node("b"), NodeState.SUSPECT, None, None, mirrored=SLOT),
            NodeStatus(node("c"), NodeState.ALIVE, BEAT, None),
            NodeStatus(node("d", NodeKind.EXPERT), NodeState.ALIVE, BEAT, None, num_shards=7),
            NodeStatus(node("e", NodeKind.EXPERT), NodeState.ALIVE, None, None),
        ),
        num_blocks={PipelineId(0): 30},
        generations={PipelineId(0): Generation(6), PipelineId(1): Generation(2)},
    )
    view = json.loads(json.dumps(describe_mesh(status, Readiness(False, "no token"))))
    assert (view["ready"], view["detail"]) == (False, "no token")
    place = {"pipeline": 0, "index": 1}
    assert [(n["node"], n["role"], n["slot"], n["shards"]) for n in view["nodes"]] == [
        ("a", "holder", place, None),
        ("b", "mirror", place, None),
        ("c", "spare", None, None),
        ("d", "expert", None, 7),
        ("e", "spare", None, 0),
    ]
    assert view["nodes"][0] | {"process": "here/42", "rows": 40, "queued": 3} == view["nodes"][0]
    assert view["nodes"][1]["rows"] is None
    assert view["pipelines"] == [
        {"pipeline": 0, "generation": 6, "open": True},
        {"pipeline": 1, "generation": 2, "open": False},
    ]
