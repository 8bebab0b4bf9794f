"""What a node believes and should not, or should and does not, it is told again. Pure; time is an argument.

Any control message may be lost with the link that carries it. So each heartbeat says what the node believes, and the
router compares that with what it wants, whatever it remembers to have sent. A message that is on its way is not
repeated: what differs is told again when it has differed for longer than a message takes, and then less and less often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from common.ids import NodeId, PipelineId
from common.messages import ExpertHeartbeat, StageHeartbeat, StageReady
from common.topology import StageState
from services.router.control.actions import Action
from services.router.control.experts.expert_roles import ExpertRoles
from services.router.control.stage_roles import Pipeline, StageRoles

PATIENCE_S = 0.4
"""With heartbeats every 0.25 s, what was lost is told again at the third one that shows it."""
MAX_PATIENCE_S = 3.0
RETRY_S = 5.0
"""The wait after a node could not take its role."""


class Topic(StrEnum):
    """What a node may be wrong about."""

    ROLE = "role"
    FEED = "feed"
    PLACEMENT = "placement"
    SHARDS = "shards"


@dataclass(frozen=True, slots=True)
class Misbelief:
    """A node believes something else than it should."""

    topic: Topic
    wanted: tuple[int, ...]
    """Stands for what it should believe: another value is another disagreement."""
    tell: Callable[[], list[Action]]
    """Makes what it is to be told, only when it is."""


@dataclass(slots=True)
class _Open:
    wanted: tuple[int, ...]
    tell_at_s: float
    patience_s: float = PATIENCE_S


class Retelling:
    """What each node disagrees about, since when, and when it is told again."""

    def __init__(self) -> None:
        self._open: dict[NodeId, dict[Topic, _Open]] = {}

    def due(self, node_id: NodeId, found: Iterable[Misbelief], now_s: float) -> dict[Topic, list[Action]]:
        """Returns what to tell a node again now. `found`: all that its newest heartbeat shows."""
        before, after = self._open.pop(node_id, {}), dict[Topic, _Open]()
        due: dict[Topic, list[Action]] = {}
        for one in found:
            known = before.get(one.topic)
            if known is None or known.wanted != one.wanted:
                known = _Open(one.wanted, now_s + PATIENCE_S)
            elif now_s >= known.tell_at_s:
                known.patience_s = min(2 * known.patience_s, MAX_PATIENCE_S)
                known.tell_at_s = now_s + known.patience_s
                due[one.topic] = one.tell()
            after[one.topic] = known
        if after:
            self._open[node_id] = after
        return due

    def forget(self, node_id: NodeId) -> None:
        """It is gone; a node that agreed in everything is not an error."""
        self._open.pop(node_id, None)


class Refusals:
    """Pipelines that wait for a node which refused its role, and when they are assigned anew."""

    def __init__(self) -> None:
        self._waiting: dict[PipelineId, tuple[int, float]] = {}

    def note(self, pipeline: PipelineId, generation: int, now_s: float) -> None:
        """In this generation; said again it changes nothing."""
        if self._waiting.get(pipeline, (0, 0.0))[0] != generation:
            self._waiting[pipeline] = generation, now_s + RETRY_S

    def due(self, pipelines: Mapping[PipelineId, Pipeline], now_s: float) -> list[PipelineId]:
        """Returns pipelines to assign anew now: not those that have other holders by now."""
        due = {pipeline: generation for pipeline, (generation, at_s) in self._waiting.items() if now_s >= at_s}
        for pipeline in due:
            del self._waiting[pipeline]
        return [p for p, generation in due.items() if p in pipelines and pipelines[p].generation == generation]


class Beliefs:
    """Compares each heartbeat with the roles as they are now. A report counts like the message that said it first."""

    def __init__(self, stages: StageRoles, experts: ExpertRoles) -> None:
        self._stages = stages
        self._experts = experts
        self._retelling = Retelling()

    def compare(
        self, node_id: NodeId, said: StageHeartbeat | ExpertHeartbeat, now_s: float
    ) -> tuple[list[Action], dict[Topic, list[Action]]]:
        """Compares the heartbeat of a node that is registered. Returns what follows from its report, where the report
        itself was lost, and what the node is told again."""
        if isinstance(said, ExpertHeartbeat):
            found, news = [self._shards(node_id, said)], list[Action]()
        else:
            news = self._report(node_id, said)
            found = [self._role(node_id, said), self._feed(node_id, said), self._placement(node_id, said)]
        misbeliefs = [one for one in found if one is not None]
        return news, self._retelling.due(node_id, misbeliefs, now_s)

    def forget(self, node_id: NodeId) -> None:
        """It is gone."""
        self._retelling.forget(node_id)

    def _report(self, node_id: NodeId, said: StageHeartbeat) -> list[Action]:
        slot = self._stages.slot_of(node_id)
        if said.role_state == StageState.HOLDING and slot is not None:
            ready = StageReady(
                slot.pipeline, slot.index, said.lease_term, said.kv_mark, said.tier_since, said.num_tier_slots
            )
            return self._stages.apply_ready(node_id, ready, said.role_number)
        if said.role_state in (StageState.FILLING, StageState.COMPLETE):
            is_complete = said.role_state == StageState.COMPLETE
            return self._stages.apply_mirror_report(
                node_id, said.role_number, is_complete=is_complete, broken_stream=said.broken_stream
            )
        return []

    def _role(self, node_id: NodeId, said: StageHeartbeat) -> Misbelief | None:
        stages = self._stages
        slot, mirrored = stages.slot_of(node_id), stages.mirrors.number_of(node_id)
        if slot is not None:
            pipeline = stages.pipelines[slot.pipeline]
            if not pipeline.is_whole or said.role_number == pipeline.generation:
                return None  # one with a hole is assigned anew once that is filled
            return Misbelief(Topic.ROLE, (pipeline.generation,), lambda: [stages.assign(slot)])
        if mirrored is not None:
            again = partial(stages.mirrors.assign_again, node_id)
            return None if said.role_number == mirrored else Misbelief(Topic.ROLE, (mirrored,), again)
        if not said.role_number or stages.adoption.is_pending:
            return None  # a spare; or it may yet be given back what it holds
        unassign = stages.messages.unassign
        return Misbelief(Topic.ROLE, (0, said.role_number), lambda: [unassign(node_id, said.lease_term)])

    def _feed(self, node_id: NodeId, said: StageHeartbeat) -> Misbelief | None:
        slot = self._stages.slot_of(node_id)
        if slot is None or said.role_state != StageState.HOLDING:
            return None
        number = self._stages.mirrors.feed_number_of(slot)
        again = partial(self._stages.mirrors.feed_again, slot, node_id, said.lease_term)
        return None if said.feed_number == number else Misbelief(Topic.FEED, (number,), again)

    def _placement(self, node_id: NodeId, said: StageHeartbeat) -> Misbelief | None:
        version = self._experts.version
        if not version or said.placement_version == version:
            return None
        return Misbelief(Topic.PLACEMENT, (version,), partial(self._experts.publish_to, [node_id]))

    def _shards(self, node_id: NodeId, said: ExpertHeartbeat) -> Misbelief | None:
        told = self._experts.told(node_id)
        if told is None or (said.shards_version == told[0] and said.shards_reports <= told[1]):
            return None
        return Misbelief(Topic.SHARDS, told, partial(self._experts.assign_again, node_id))
