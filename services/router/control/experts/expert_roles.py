"""Which expert node is to hold which shards, as nodes come, load and go. Pure: returns actions, sends nothing.

What happens is only noted; `tick` then answers everything that has happened since the last one at once. A placement is
computed elsewhere (`pop_request`, `accept_answer`): for a large model it takes a second. Until it has come, the one
before goes on without the nodes that are gone, and before the first one what nodes hold is served.

P shards in the order of (layer, expert, slice), N nodes in the order of their ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.checkpoint.model_config import ModelConfig
from common.errors import CheckpointError
from common.ids import NodeId
from common.messages import AssignShards, Failed, Header, PublishPlacement, ShardsReady, TensorFrame
from common.topology import NodeDescription
from common.wire.array import BoolArray, Uint8Array, array_to_frame, frame_to_array
from common.wire.endpoints import join_endpoints
from services.router.control.actions import Action, Tell
from services.router.control.experts.first_classes import FirstClasses
from services.router.control.experts.placing import PlacementAim, PlacementAnswer, PlacementRequest
from services.router.control.experts.roll_out import PlacementTarget, ShardAssignment, next_assignment
from services.router.control.experts.shard_bits import ShardBits, count, pack, stack, unpack
from services.router.control.experts.shard_probes import Disagreement, ShardProbes
from services.router.control.sizes import MeshShape

SETTLE_S = 1.0
"""Waits before the first placement: nodes that start together are placed together, so that nothing is loaded twice."""
REPORT_INTERVAL_S = 0.05
"""Reports of nodes that load are answered together, at most this often: dozens of nodes report five times a second."""
DRAIN_DEADLINE_S = 12.0
"""Below the 15 s after which a node goes without being let go."""
DRAIN_QUIET_S = 0.25
"""How long after the stages were told to ask others: their last calls are answered by then."""


@dataclass(slots=True)
class Leaving:
    """A node that leaves: it is asked until others hold what it holds, or until its time is up."""

    since_s: float
    quiet_since_s: float | None = None
    """The time since which no stage is told to ask it; None: some are."""

    def may_go(self, is_asked: bool, now_s: float) -> bool:
        """Returns whether it need not be waited for any more. `is_asked`: calls are sent to it now."""
        if is_asked:
            self.quiet_since_s = None
        elif self.quiet_since_s is None:
            self.quiet_since_s = now_s
        is_quiet = self.quiet_since_s is not None and now_s - self.quiet_since_s >= DRAIN_QUIET_S
        return is_quiet or now_s - self.since_s >= DRAIN_DEADLINE_S


class ExpertRoles:
    """Places shards. `num_expected` nodes are waited for (shortly) before the first placement."""

    def __init__(self, config: ModelConfig, shape: MeshShape, num_expected: int) -> None:
        self._num_expected = num_expected
        self._aim = PlacementAim(config, shape)
        self._table_shape, self._is_named = self._aim.table_shape, self._aim.is_named
        self.num_shards = int(self._is_named.sum())
        """The shards of the whole model."""
        self._nodes: dict[NodeId, NodeDescription] = {}
        self._nothing = pack(np.zeros_like(self._is_named))
        self.ready: dict[NodeId, ShardBits] = {}
        """[W] by node: what it holds, by its own report, without what it was told since to unload."""
        self._told: dict[NodeId, ShardBits] = {}
        self._told_versions: dict[NodeId, int] = {}
        self._report_numbers: dict[NodeId, int] = {}
        """The number of each node's newest report."""
        self._target: PlacementTarget | None = None
        """The target for the nodes that live; None: to be made anew."""
        self._assignment: ShardAssignment | None = None
        self._asked: tuple[NodeId, ...] = ()
        """The nodes of `_assignment`."""
        self._publication: PublishPlacement | None = None
        """What was published of `_assignment`, with the nodes as they were then."""
        self._first_classes = FirstClasses()
        self._num_orphans = 0
        self.num_copies_to_load = 0
        """Safety copies that have a place and that no node holds yet."""
        self._last_joined_s = 0.0
        self._has_changed = False
        """Whether a role is to be looked at again at once."""
        self._has_reports = False
        self._rolled_s = -REPORT_INTERVAL_S
        self.version = 0
        """The version of what was published last; 0: nothing was."""
        self._draining: dict[NodeId, Leaving] = {}
        self._probes = ShardProbes(self._table_shape)
        self.has_news = False
        """Whether what may be asked has changed since `pop_news`."""

    @property
    def is_served(self) -> bool:
        """Returns whether every shard has a node that can be asked."""
        return self._assignment is not None and not self._num_orphans

    @property
    def missing_copies(self) -> int:
        """Counts safety copies that are wished for and have no room or no node."""
        return self._aim.answer.missing_copies if self._aim.answer is not None else 0

    @property
    def problem(self) -> str:
        """Returns why not every shard can be placed, as a sentence; empty if it can."""
        return self._aim.answer.problem if self._aim.answer is not None else ""

    @property
    def detail(self) -> str:
        """Returns what is served, as a sentence."""
        if self.problem:
            return self.problem
        if self._assignment is None:
            return f"{len(self._nodes)} of {self._num_expected} expert nodes"
        return f"{self.num_shards - self._num_orphans} of {self.num_shards} expert shards loaded"

    @property
    def num_held(self) -> dict[NodeId, int]:
        """Counts the shards that each node holds, as in `ready`."""
        counts = count(stack(list(self.ready.values()), self._is_named.size))  # all rows at once: ten times as fast
        return dict(zip(self.ready, counts.tolist(), strict=True))

    # ---- what happens

    def join(self, description: NodeDescription, now_s: float, held: BoolArray | None = None) -> None:
        """An expert node registered. One that reconnects is told anew; what it had ready it still has, since another
        process would have another id. `held` [P]: what it has from a router before this one."""
        self._nodes[description.node_id] = description
        self.ready.setdefault(description.node_id, self._nothing if held is None else pack(held))
        self._told.pop(description.node_id, None)
        self._last_joined_s = now_s
        self._change()

    def drain(self, node_id: NodeId, now_s: float) -> None:
        """An expert node wants to stop: others are to hold what it holds. It is asked until they do; see `may_go`."""
        if node_id in self._nodes and node_id not in self._draining:
            self._draining[node_id] = Leaving(now_s)
            self._change()

    def lose(self, node_id: NodeId) -> None:
        """An expert node is gone."""
        self._draining.pop(node_id, None)
        if self._nodes.pop(node_id, None) is not None:
            self.ready.pop(node_id)
            self._told.pop(node_id, None)
            self._told_versions.pop(node_id, None)
            self._report_numbers.pop(node_id, None)
            self._probes.forget(node_id)
            self._change()

    def apply_report(self, node_id: NodeId, held: BoolArray, version: int, number: int) -> None:
        """A node says what it holds, [P]; the roll-out goes on. `version`: of what it had been told by then. `number`:
        of this report. One that a newer one overtook says nothing, nor does one from before the node was told anew: it
        may have unloaded shards since, and reports again."""
        is_newest = number >= self._report_numbers.get(node_id, 0)
        if node_id in self._nodes and is_newest and version >= self._told_versions.get(node_id, 0):
            self.ready[node_id], self._report_numbers[node_id] = pack(held), number
            self._has_reports = True

    def read_report(self, node_id: NodeId, message: ShardsReady) -> list[Action]:
        """Applies what a node says it holds, unless its answers to the probe contradict those of others: a node that is
        found wrong is told to end, and asked for nothing. Raises ProtocolError with the name of the field."""
        held = self.read_shards(message.shards, "ShardsReady.shards")
        found = self._probes.compare(self._nodes[node_id], message) if node_id in self._nodes else []
        if all(one.node_id != node_id for one in found):
            self.apply_report(node_id, held, message.version, message.number)
        return [self._refuse(one) for one in found]

    def _refuse(self, found: Disagreement) -> Action:
        self.ready[found.node_id], self._has_changed = self._nothing, True
        self._report_numbers.pop(found.node_id, None)  # a node that is not reached by this is asked and told once more
        reason = found.describe(self._nodes, self._table_shape)
        return Tell(found.node_id, Failed(CheckpointError.code, reason), Header())

    def read_shards(self, frame: TensorFrame, name: str) -> BoolArray:
        """Reads [P], the shards that a message names. Raises ProtocolError with the name of the field."""
        held: BoolArray = frame_to_array(frame, "uint8", self._table_shape, name).reshape(-1) != 0
        return held

    def read_held(self, frame: TensorFrame) -> BoolArray | None:
        """Returns what a node has from a router before this one; of no use where that one cut experts otherwise."""
        return self.read_shards(frame, "Hello.held_shards") if frame.shape == self._table_shape else None

    def may_go(self, now_s: float) -> list[NodeId]:
        """Returns nodes that want to stop and are not needed, or that cannot wait any longer: `lose` them."""
        if not self._draining:
            return []
        answer = self._aim.answer
        # Where those that stay cannot take everything over, waiting longer changes nothing.
        is_hopeless = self._aim.is_waited_for or (answer is not None and not answer.has_room)
        needed = self._needed()
        return sorted(
            node_id
            for node_id, leaving in self._draining.items()
            if leaving.may_go(node_id in needed, now_s) or is_hopeless
        )

    def _needed(self) -> set[NodeId]:
        """Returns the nodes that calls go to, for experts whose weights another node sees too and could take over."""
        if self._assignment is None:
            return set()
        owners = self._assignment.owners.reshape(-1, *self._table_shape)
        if self._aim.answer is not None and self._aim.answer.unseen:
            owners = np.delete(owners, self._aim.answer.unseen, axis=2)
        numbers = np.flatnonzero(np.bincount(owners.reshape(-1))).tolist()
        return {self._asked[number - 1] for number in numbers if number}

    def _change(self) -> None:
        self._aim.change()
        self._target, self._has_changed = None, True

    # ---- what follows

    def tick(self, now_s: float) -> list[Action]:
        """Tell nodes what they are to hold next, as far as anything has happened."""
        is_due = self._has_reports and now_s - self._rolled_s >= REPORT_INTERVAL_S
        if not (self._has_changed or is_due):
            return []
        if self._aim.answer is None and not (self._has_settled(now_s) and any(r.any() for r in self.ready.values())):
            return []
        self._has_changed = self._has_reports = False
        self._rolled_s = now_s
        return self._roll_on()

    def pop_request(self, now_s: float) -> PlacementRequest | None:
        """Returns what is to be placed now; None: nothing, or the last request is not answered yet."""
        if not self._has_settled(now_s):
            return None
        nodes = [node for node_id, node in self._nodes.items() if node_id not in self._draining]
        return self._aim.pop_request(nodes, self.ready, self._told)

    def accept_answer(self, answer: PlacementAnswer) -> None:
        """What `pop_request` asked for."""
        if self._aim.accept_answer(answer):
            self._target, self._has_changed = None, True

    def publish_to(self, stages: list[NodeId]) -> list[Action]:
        """Returns the placement as it is, for stages that have just joined."""
        if self._publication is None:
            return []
        return [Tell(node_id, self._publication, Header()) for node_id in stages]

    def told(self, node_id: NodeId) -> tuple[int, int] | None:
        """Returns the version of what a node was told to hold, and the number of its newest report; None where that is
        nothing, or of no interest, since it leaves."""
        if node_id not in self._told or node_id in self._draining:
            return None
        return self._told_versions[node_id], self._report_numbers.get(node_id, 0)

    def assign_again(self, node_id: NodeId) -> list[Action]:
        """Tell a node what it is to hold; it reports then, also what it has said before."""
        return [self._assign(node_id)]

    def pop_news(self, stages: list[NodeId]) -> list[Action]:
        """Publish to all stages what has changed."""
        self.has_news = False
        return self.publish_to(stages)

    def _has_settled(self, now_s: float) -> bool:
        return (
            self._aim.answer is not None
            or now_s - self._last_joined_s >= SETTLE_S
            or len(self._nodes) >= self._num_expected
        )

    def _roll_on(self) -> list[Action]:
        self._target = self._target or self._aim.target(self.ready)
        nodes = tuple(sorted(self._nodes))
        before, asked_before = self._assignment, self._asked
        told = stack([self._told.get(node_id, self._nothing) for node_id in nodes], self._is_named.size)
        now = next_assignment(
            self._target,
            stack([self.ready[node_id] for node_id in nodes], self._is_named.size),
            told,
            np.array(
                [self._nodes[node_id].capacity_bytes // self._aim.shard_bytes for node_id in nodes], dtype=np.int64
            ),
        )
        self._assignment, self._asked, self._num_orphans = now, nodes, int(now.orphans.sum())
        self.num_copies_to_load = int(np.maximum(self._target.num_owners - now.num_owners, 0).sum())
        actions = self._tell(nodes, now.shards, (told != now.shards).any(axis=1))
        is_same = before is not None and asked_before == nodes and np.array_equal(before.owners, now.owners)
        if actions or not is_same:
            self.version += 1
            self.has_news = True
            self._publication = self._publish(now)
        return actions

    def _tell(self, nodes: tuple[NodeId, ...], wanted: ShardBits, is_other: BoolArray) -> list[Action]:
        """`is_other` [N]: nodes that were told something else last."""
        actions: list[Action] = []
        for node_id, shards, is_news in zip(nodes, wanted, is_other.tolist(), strict=True):
            # One that leaves keeps what it has, so that calls that are under way to it are answered.
            if node_id not in self._draining and (is_news or node_id not in self._told):
                self._told[node_id], self._told_versions[node_id] = shards, self.version + 1
                self.ready[node_id] = self.ready[node_id] & shards  # told to hold the rest again, it loads it again
                actions.append(self._assign(node_id))
        return actions

    def _assign(self, node_id: NodeId) -> Action:
        shards = unpack(self._told[node_id], self._is_named.size)
        bitmap: Uint8Array = shards.view(np.uint8)
        if self._assignment is not None and self._num_orphans:
            bitmap = bitmap + (shards & self._assignment.orphans)
        frame = array_to_frame(bitmap.reshape(self._table_shape))
        return Tell(node_id, AssignShards(self._told_versions[node_id], frame), Header())

    def _publish(self, assignment: ShardAssignment) -> PublishPlacement:
        described = [self._nodes[node_id] for node_id in self._asked]
        return PublishPlacement(
            version=self.version,
            node_ids=self._asked,
            incarnations=tuple(node.incarnation for node in described),
            endpoints=tuple(join_endpoints(node.endpoints) for node in described),
            ipc_tokens=tuple(node.ipc_token for node in described),
            numeric_classes=tuple(node.numeric_class for node in described),
            owners=array_to_frame(assignment.owners.reshape(-1, *self._table_shape)),
            first_classes=self._first_classes.choose(
                assignment.owners.reshape(-1, self._table_shape[0], self._table_shape[1] * self._table_shape[2]),
                [node.numeric_class for node in described],
            ),
            links=tuple(join_endpoints(node.links) for node in described),
        )
