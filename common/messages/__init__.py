"""Every message of the mesh, grouped by link. A kind that asks is an imperative, one that tells is not.

The codec (`common/wire/codec.py`) turns these to frames and back; field types are limited to what it checks: int,
float, str, bool, tuples of int or str, and TensorFrame. Terms, generation, attempt, step, time left and trace are in
`Header`.
"""

from __future__ import annotations

from common.messages.control import (
    AssignMirror,
    AssignShards,
    AssignStage,
    ExpertHeartbeat,
    Failed,
    Heartbeat,
    Hello,
    Leave,
    LeaveAcknowledged,
    MirrorReady,
    MirrorTo,
    PublishPlacement,
    ShardsReady,
    StageHeartbeat,
    StageReady,
    Unassign,
    Welcome,
)
from common.messages.experts import CancelCall, Dispatch, ExpertRows
from common.messages.frames import NO_ARRAY, Header, TensorFrame
from common.messages.mirroring import MirrorAck, MirrorBlocks, MirrorRows
from common.messages.pipeline import Step, StepResult

__all__ = [
    "NO_ARRAY",
    "AssignMirror",
    "AssignShards",
    "AssignStage",
    "CancelCall",
    "Dispatch",
    "ExpertHeartbeat",
    "ExpertRows",
    "Failed",
    "Header",
    "Heartbeat",
    "Hello",
    "Leave",
    "LeaveAcknowledged",
    "Message",
    "MirrorAck",
    "MirrorBlocks",
    "MirrorReady",
    "MirrorRows",
    "MirrorTo",
    "PublishPlacement",
    "ShardsReady",
    "StageHeartbeat",
    "StageReady",
    "Step",
    "StepResult",
    "TensorFrame",
    "Unassign",
    "Welcome",
]

Message = (
    Hello
    | Welcome
    | AssignStage
    | Unassign
    | StageReady
    | AssignMirror
    | MirrorReady
    | MirrorTo
    | AssignShards
    | ShardsReady
    | PublishPlacement
    | StageHeartbeat
    | ExpertHeartbeat
    | Leave
    | LeaveAcknowledged
    | Failed
    | Step
    | StepResult
    | MirrorRows
    | MirrorBlocks
    | MirrorAck
    | Dispatch
    | ExpertRows
    | CancelCall
)
