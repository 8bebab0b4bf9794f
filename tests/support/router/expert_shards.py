"""Expert nodes of the small model: what they are told to hold, and whom stages may ask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from common.ids import NodeId
from common.messages import AssignShards, PublishPlacement, ShardsReady
from common.topology import CheckpointPart, NodeDescription, NodeKind, ShardId
from common.wire.array import BoolArray, array_to_frame, frame_to_array
from services.router.control.actions import Action, Tell
from services.router.control.experts.expert_roles import REPORT_INTERVAL_S, ExpertRoles
from services.router.control.experts.placing import PlacementRequest, answer_request
from tests.support.router.mesh_shapes import EXPERTS, LAYERS, PLENTY, SHARD_BYTES, node, small_mesh, small_model

ALL = frozenset(ShardId(layer, expert, 0) for layer in range(LAYERS) for expert in range(EXPERTS))


def expert(name: str, shards: int | None = None, **changes: Any) -> NodeDescription:
    """A node with room for so many shards (None: for all)."""
    return node(name, NodeKind.EXPERT, PLENTY if shards is None else shards * SHARD_BYTES, **changes)


class PromptRoles:
    """Roles whose placements are computed at once, and whose actions follow each event."""

    def __init__(self, roles: ExpertRoles) -> None:
        self.state = roles
        self.now_s = 0.0
        self.is_prompt = True
        """Otherwise placements wait for `deliver`."""
        self.versions: dict[str, int] = {}
        """Of what each node was told last."""
        self.requests: list[PlacementRequest] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)

    def join(self, description: NodeDescription, now_s: float, held: frozenset[ShardId] = frozenset()) -> list[Action]:
        self.state.join(description, now_s, row_of(held))
        return self.tick(now_s)

    def drain(self, node_id: NodeId, now_s: float) -> list[Action]:
        self.state.drain(node_id, now_s)
        return self.tick(now_s)

    def lose(self, node_id: NodeId, now_s: float) -> list[Action]:
        self.state.lose(node_id)
        return self.tick(now_s)

    def apply_report(self, node_id: NodeId, held: frozenset[ShardId], version: int | None = None) -> list[Action]:
        """`version`: of what the node had been told by then; None: all that it was told."""
        self.state.apply_report(node_id, row_of(held), self.versions.get(node_id, 0) if version is None else version, 0)
        return self.tick(self.now_s + 2 * REPORT_INTERVAL_S)

    def tick(self, now_s: float) -> list[Action]:
        self.now_s = max(self.now_s, now_s)
        if (request := self.state.pop_request(self.now_s)) is not None:
            self.requests.append(request)
        return self.deliver() if self.is_prompt else self._note(self.state.tick(self.now_s))

    def deliver(self) -> list[Action]:
        """The placements that were asked for have been computed."""
        for request in self.requests:
            self.state.accept_answer(answer_request(request))
        self.requests.clear()
        return self._note(self.state.tick(self.now_s))

    def _note(self, actions: list[Action]) -> list[Action]:
        for action in actions:
            if isinstance(action, Tell) and isinstance(action.message, AssignShards):
                self.versions[action.node_id] = action.message.version
        return actions


def row_of(shards: Iterable[ShardId]) -> BoolArray:
    """[P]: as a node reports them."""
    table = np.zeros((LAYERS, EXPERTS, 1), dtype=np.bool_)
    for shard in shards:
        table[shard] = True
    return table.reshape(-1)


def roles_of(num_expected: int = 2, **mesh: Any) -> PromptRoles:
    return PromptRoles(ExpertRoles(small_model(), small_mesh(**mesh), num_expected))


def all_loaded(asked: AssignShards, number: int = 0) -> ShardsReady:
    """The report of a node that has loaded all of it; every shard answers the probe alike."""
    asked_for = np.frombuffer(asked.shards.data, np.uint8).reshape(asked.shards.shape) != 0
    digests, projections = array_to_frame(asked_for.astype(np.int32)), array_to_frame(asked_for.astype(np.float32))
    return ShardsReady(asked.version, True, asked.shards, number, digests, projections)


def told(actions: Iterable[Action]) -> dict[str, frozenset[ShardId]]:
    """What each node is to hold, by the last word."""
    shards: dict[str, frozenset[ShardId]] = {}
    for action in actions:
        if isinstance(action, Tell) and isinstance(action.message, AssignShards):
            bitmap = frame_to_array(action.message.shards, "uint8", (LAYERS, EXPERTS, None), "shards")
            shards[action.node_id] = frozenset(ShardId(*place) for place in zip(*bitmap.nonzero(), strict=True))
    return shards


def published(roles: PromptRoles) -> dict[ShardId, list[str]]:
    """Who may be asked for each shard, first choice first, as a stage reads it."""
    actions = roles.publish_to([NodeId("stage")])
    if not actions:
        return {}
    (action,) = actions
    assert isinstance(action, Tell)
    message = action.message
    assert isinstance(message, PublishPlacement)
    owners = frame_to_array(message.owners, "int32", (None, LAYERS, EXPERTS, None), "owners")
    return {shard: [message.node_ids[number - 1] for number in owners[:, *shard].tolist() if number] for shard in ALL}


def settle(roles: PromptRoles, actions: list[Action]) -> None:
    """All nodes load what they are told and say so, until nobody is told anything."""
    while wanted := told(actions):
        actions = [action for name, held in wanted.items() for action in roles.apply_report(NodeId(name), held)]


def seeing(name: str, *experts: int) -> NodeDescription:
    return expert(name, part=CheckpointPart(experts=frozenset(experts)))


def ready_roles(names: str, **mesh: Any) -> PromptRoles:
    roles, actions = roles_of(num_expected=len(names), **mesh), []
    for name in names:
        actions += roles.join(expert(name), 0.0)
    settle(roles, actions)
    return roles
