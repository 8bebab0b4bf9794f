"""What nodes say in their heartbeats that they believe, against what they should. Pure; time is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from common.ids import NodeId
from common.messages import Heartbeat, StageReady
from common.topology import NodeKind, StageState
from services.router.control.actions import Action
from services.router.control.experts.expert_roles import ExpertRoles
from services.router.control.mirror_roles import MirrorReport
from services.router.control.retelling import Misbelief, Retelling, Topic
from services.router.control.stage_roles import StageRoles


@dataclass(frozen=True, slots=True)
class Consequences:
    """What comes of a heartbeat."""

    news: list[Action]
    """Of what it reports, where the report itself was lost."""
    again: dict[Topic, list[Action]]
    """What the node is told again."""


class Beliefs:
    """Compares each heartbeat with the roles as they are now. A report counts like the message that said it first."""

    def __init__(self, stages: StageRoles, experts: ExpertRoles) -> None:
        self._stages = stages
        self._experts = experts
        self._retelling = Retelling()

    def take(self, node_id: NodeId, kind: NodeKind, said: Heartbeat, now_s: float) -> Consequences:
        """Of a node that is registered."""
        if kind is NodeKind.EXPERT:
            found, news = [self._shards(node_id, said)], list[Action]()
        else:
            news = self._report(node_id, said)
            found = [self._role(node_id, said), self._feed(node_id, said), self._placement(node_id, said)]
        misbeliefs = [one for one in found if one is not None]
        return Consequences(news, self._retelling.due(node_id, misbeliefs, now_s))

    def forget(self, node_id: NodeId) -> None:
        """It is gone."""
        self._retelling.forget(node_id)

    def _report(self, node_id: NodeId, said: Heartbeat) -> list[Action]:
        slot = self._stages.slot_of(node_id)
        if said.role_state == StageState.HOLDING and slot is not None:
            ready = StageReady(slot.pipeline, slot.index, said.lease_term, 0, 0, said.kv_mark)
            return self._stages.take_ready(node_id, ready, said.role_number)
        if said.role_state in (StageState.FILLING, StageState.COMPLETE):
            is_complete = said.role_state == StageState.COMPLETE
            return self._stages.take_mirror(node_id, MirrorReport(said.role_number, is_complete, said.broken_stream))
        return []

    def _role(self, node_id: NodeId, said: Heartbeat) -> Misbelief | None:
        stages = self._stages
        slot, mirrored = stages.slot_of(node_id), stages.mirrors.number_of(node_id)
        if slot is not None:
            pipeline = stages.pipelines[slot.pipeline]
            if not pipeline.is_whole or said.role_number == pipeline.generation:
                return None  # one with a hole is assigned anew once that is filled
            return Misbelief(Topic.ROLE, (pipeline.generation,), lambda: [stages.assign(slot)])
        if mirrored is not None:
            again = partial(stages.mirrors.assign_again, node_id, stages.nodes)
            return None if said.role_number == mirrored else Misbelief(Topic.ROLE, (mirrored,), again)
        if not said.role_number or not stages.are_settled:
            return None
        unassign = stages.messages.unassign
        return Misbelief(Topic.ROLE, (0, said.role_number), lambda: [unassign(node_id, said.lease_term)])

    def _feed(self, node_id: NodeId, said: Heartbeat) -> Misbelief | None:
        slot = self._stages.slot_of(node_id)
        if slot is None or said.role_state != StageState.HOLDING:
            return None
        number = self._stages.mirrors.feed_number_of(slot)
        again = partial(self._stages.mirrors.feed_again, slot, node_id, said.lease_term, self._stages.nodes)
        return None if said.feed_number == number else Misbelief(Topic.FEED, (number,), again)

    def _placement(self, node_id: NodeId, said: Heartbeat) -> Misbelief | None:
        version = self._experts.version
        if not version or said.placement_version == version:
            return None
        return Misbelief(Topic.PLACEMENT, (version,), partial(self._experts.publish_to, [node_id]))

    def _shards(self, node_id: NodeId, said: Heartbeat) -> Misbelief | None:
        told = self._experts.told(node_id)
        if told is None or (said.shards_version == told[0] and said.shards_reports <= told[1]):
            return None
        return Misbelief(Topic.SHARDS, told, partial(self._experts.assign_again, node_id))
