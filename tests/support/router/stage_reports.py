"""Stage roles, and stages that answer what they are told."""

from __future__ import annotations

from typing import Any

from common.ids import NodeId
from common.messages import AssignMirror, AssignStage, StageReady
from services.router.control.actions import Action, Tell
from services.router.control.stage_roles import StageRoles
from tests.support.router.mesh_shapes import node, small_mesh, small_model

RESULTS = ("tcp://router:9",)


def roles_of(**mesh: Any) -> StageRoles:
    settings = {name: mesh.pop(name) for name in ("recovery", "adopts") if name in mesh}
    return StageRoles(small_model(), small_mesh(**mesh), RESULTS, "token of router", **settings)


def told(actions: list[Action]) -> dict[str, tuple[AssignStage, int]]:
    """Assignments by node, with their generation."""
    return {
        action.node_id: (action.message, action.header.generation)
        for action in actions
        if isinstance(action, Tell) and isinstance(action.message, AssignStage)
    }


def ready(message: AssignStage) -> StageReady:
    return StageReady(message.pipeline, message.slot, message.lease_term, 7, num_tier_slots=message.num_tier_slots)


def report(roles: StageRoles, actions: list[Action]) -> list[Action]:
    """All who were told a slot are ready for it."""
    answers: list[Action] = []
    for node_id, (message, generation) in told(actions).items():
        answers += roles.apply_ready(NodeId(node_id), ready(message), generation)
    return answers


def opened(roles: StageRoles, *names: str) -> list[Action]:
    answers: list[Action] = []
    for name in names:
        answers += report(roles, roles.join(node(name)))
    return answers


def mirror_of(actions: list[Action]) -> dict[str, AssignMirror]:
    return {name: message for name, (message, _) in mirrors_told(actions).items()}


def mirrors_told(actions: list[Action]) -> dict[str, tuple[AssignMirror, int]]:
    """By node, with the number of its role."""
    return {
        action.node_id: (action.message, action.header.generation)
        for action in actions
        if isinstance(action, Tell) and isinstance(action.message, AssignMirror)
    }


def mirrored(roles: StageRoles, actions: list[Action]) -> None:
    """All who were told to mirror are complete."""
    for name, (_, number) in mirrors_told(actions).items():
        for is_complete in (False, True):
            roles.apply_mirror_report(NodeId(name), number, is_complete=is_complete)
