"""Expert nodes of the small model: what they are told to hold, and whom stages may ask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from common.array import frame_to_array
from common.ids import NodeId
from common.messages import AssignShards, PublishPlacement
from common.topology import CheckpointPart, NodeDescription, NodeKind, ShardId
from services.router.control.actions import Action, Tell
from services.router.control.expert_roles import ExpertRoles
from tests.support.mesh_shapes import EXPERTS, LAYERS, PLENTY, SHARD_BYTES, node, small_mesh, small_model

ALL = frozenset(ShardId(layer, expert, 0) for layer in range(LAYERS) for expert in range(EXPERTS))


def expert(name: str, shards: int | None = None, **changes: Any) -> NodeDescription:
    """A node with room for so many shards (None: for all)."""
    return node(name, NodeKind.EXPERT, PLENTY if shards is None else shards * SHARD_BYTES, **changes)


def roles_of(num_expected: int = 2, **mesh: Any) -> ExpertRoles:
    return ExpertRoles(small_model(), small_mesh(**mesh), num_expected)


def told(actions: Iterable[Action]) -> dict[str, frozenset[ShardId]]:
    """What each node is to hold, by the last word."""
    shards: dict[str, frozenset[ShardId]] = {}
    for action in actions:
        if isinstance(action, Tell) and isinstance(action.message, AssignShards):
            bitmap = frame_to_array(action.message.shards, "uint8", (LAYERS, EXPERTS, None), "shards")
            shards[action.node_id] = frozenset(ShardId(*place) for place in zip(*bitmap.nonzero(), strict=True))
    return shards


def published(roles: ExpertRoles) -> dict[ShardId, list[str]]:
    """Who may be asked for each shard, first choice first, as a stage reads it."""
    actions = roles.publish_to([NodeId("stage")])
    if not actions:
        return {}
    (action,) = actions
    assert isinstance(action, Tell)
    message = action.message
    assert isinstance(message, PublishPlacement)
    copies = frame_to_array(message.copies, "uint8", (len(message.node_ids), LAYERS, EXPERTS, None), "copies")
    owners: dict[ShardId, list[tuple[int, str]]] = {shard: [] for shard in ALL}
    for number, layer, index, piece in zip(*copies.nonzero(), strict=True):
        place = int(copies[number, layer, index, piece])
        owners[ShardId(int(layer), int(index), int(piece))].append((place, message.node_ids[number]))
    return {shard: [name for _, name in sorted(named)] for shard, named in owners.items()}


def settle(roles: ExpertRoles, actions: list[Action]) -> None:
    """All nodes load what they are told and say so, until nobody is told anything."""
    while wanted := told(actions):
        actions = [action for name, held in wanted.items() for action in roles.take_report(NodeId(name), held)]


def seeing(name: str, *experts: int) -> NodeDescription:
    return expert(name, part=CheckpointPart(experts=frozenset(experts)))


def ready_roles(names: str, **mesh: Any) -> ExpertRoles:
    roles, actions = roles_of(num_expected=len(names), **mesh), []
    for name in names:
        actions += roles.join(expert(name), 0.0)
    settle(roles, actions)
    return roles
