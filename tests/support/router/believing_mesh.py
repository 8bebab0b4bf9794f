"""A mesh loop, and nodes that know no more than what reaches them over links that lose, delay and repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.ids import NodeId
from common.messages import (
    AssignMirror,
    AssignShards,
    AssignStage,
    ExpertHeartbeat,
    Header,
    Leave,
    LeaveAcknowledged,
    Message,
    MirrorReady,
    MirrorTo,
    PublishPlacement,
    StageHeartbeat,
    StageReady,
    TensorFrame,
    Unassign,
    Welcome,
)
from common.topology import NodeDescription, NodeKind, StageState
from common.wire.transport import LinkEvent
from services.router.control.experts.shard_bits import pack
from tests.support.router.expert_shards import all_loaded
from tests.support.router.fake_mesh import FakeMesh, Sent, hello_of
from tests.support.router.mesh_shapes import node

BEAT_S = 0.25
HELLO_S = 1.0
Fate = Callable[[str, Message], list[float]]
"""Node and message -> after how many seconds each of its copies arrives; none: it is lost."""


def faithful(name: str, message: Message) -> list[float]:
    """Every message arrives once, at once."""
    return [0.0]


@dataclass
class Believer:
    """A node as far as control goes: the rules of `StageService` and `ShardLoader`, without sockets and tensors."""

    description: NodeDescription
    said: list[tuple[Message, Header]] = field(default_factory=list)
    is_welcome: bool = False
    said_hello_s: float = -1e9
    is_leaving: bool = False
    leave_by_s: float = 0.0
    """Its own patience ends."""
    is_gone: bool = False
    role: AssignStage | AssignMirror | None = None
    role_number: int = 0
    newest_number: int = 0
    state: StageState = StageState.SPARE
    num_loads: int = 0
    feed: MirrorTo | None = None
    feed_number: int = 0
    newest_feed: int = 0
    num_feeds: int = 0
    placement: PublishPlacement | None = None
    shards: TensorFrame | None = None
    shards_version: int = 0
    num_reports: int = 0

    def hear(self, message: Message, header: Header) -> None:
        """Take in one message of the router."""
        if isinstance(message, Welcome):
            self.is_welcome = True
        elif isinstance(message, LeaveAcknowledged):
            self.is_gone = True
        elif isinstance(message, AssignStage | AssignMirror | Unassign):
            self._apply_role(message, header.generation)
        elif isinstance(message, MirrorTo):
            self._obey_feed(message, header.generation)
        elif isinstance(message, PublishPlacement):
            if self.placement is None or message.version > self.placement.version:
                self.placement = message
        elif isinstance(message, AssignShards) and message.version >= self.shards_version:
            self.shards, self.shards_version = message.shards, message.version
            self.num_reports += 1
            self.said.append((all_loaded(message, self.num_reports), Header()))

    def _apply_role(self, message: AssignStage | AssignMirror | Unassign, number: int) -> None:
        if number <= self.newest_number:
            return
        self.newest_number = number
        if isinstance(message, Unassign):
            self.role, self.role_number, self.state, self.feed, self.feed_number = None, 0, StageState.SPARE, None, 0
            return
        is_same_slot = self.role is not None and self.role.lease_term == message.lease_term
        self.role, self.role_number = message, number
        self.num_loads += not is_same_slot
        if isinstance(message, AssignStage):
            if not is_same_slot:
                self.feed, self.feed_number = None, 0
            self.state = StageState.HOLDING
            ready = StageReady(message.pipeline, message.slot, message.lease_term)
            self.said.append((ready, Header(generation=number)))
        else:
            self.feed, self.feed_number, self.state = None, 0, StageState.FILLING
            self._say_mirrored(is_complete=False)

    def _obey_feed(self, message: MirrorTo, number: int) -> None:
        if self.state is not StageState.HOLDING or self.role is None or self.role.lease_term != message.lease_term:
            return
        if number < self.newest_feed or (number == self.feed_number and self.feed is not None):
            return
        self.newest_feed = number
        self.feed, self.feed_number = (message, number) if message.endpoints else (None, 0)
        self.num_feeds += 1

    def is_fed(self) -> None:
        """The holder has sent all that it has."""
        if self.state is StageState.FILLING:
            self.state = StageState.COMPLETE
            self._say_mirrored(is_complete=True)

    def _say_mirrored(self, *, is_complete: bool) -> None:
        assert self.role is not None
        report = MirrorReady(self.role.pipeline, self.role.slot, self.role.lease_term, is_complete)
        self.said.append((report, Header(generation=self.role_number)))

    def heartbeat(self) -> StageHeartbeat | ExpertHeartbeat:
        """What it believes."""
        if self.description.kind is NodeKind.EXPERT:
            return ExpertHeartbeat(
                shards_version=self.shards_version, shards_reports=self.num_reports, is_leaving=self.is_leaving
            )
        return StageHeartbeat(
            role_number=self.role_number,
            role_state=self.state,
            lease_term=self.role.lease_term if self.role is not None else 0,
            feed_number=self.feed_number,
            placement_version=self.placement.version if self.placement is not None else 0,
            is_leaving=self.is_leaving,
        )


class BelievingMesh(FakeMesh):
    """`fate` decides what becomes of each control message, in both directions; tests set it."""

    def __init__(self, **mesh: Any) -> None:
        super().__init__(**mesh)
        self.fate: Fate = faithful
        self.believers: dict[str, Believer] = {}
        self._under_way: list[tuple[float, int, Callable[[], None]]] = []
        self._num_sent = 0
        self._connected: set[str] = set()
        """Nodes whose lifelines stand."""
        self._next_beat_s = 0.0
        self.told: list[Sent] = []
        """All that the router has sent, however it fared."""

    def _send(self, name: str, message: Message, arrive: Callable[[], None]) -> None:
        for delay_s in self.fate(name, message):
            self._num_sent += 1
            self._under_way.append((self.now_s + delay_s, self._num_sent, arrive))

    def _obey(self, name: str, message: Any, header: Header) -> None:
        self.told.append((name, message, header))
        believer = self.believers.get(name)
        if believer is not None:
            self._send(name, message, lambda: believer.hear(message, header))

    def join(self, name: str, kind: NodeKind = NodeKind.STAGE, **changes: Any) -> Believer:
        """A process starts."""
        self.believers[name] = Believer(node(name, kind, **changes))
        self.alive[name] = self.believers[name].description
        return self.believers[name]

    def lose(self, name: str) -> None:
        """A process ends."""
        self.believers.pop(name, None)
        super().lose(name)

    def leave(self, name: str) -> None:
        """A process is told to stop."""
        self.believers[name].is_leaving, self.believers[name].leave_by_s = True, self.now_s + 15.0
        self.believers[name].said.append((Leave("stopped"), Header()))

    def live(self, seconds: float) -> None:
        """Let time pass, in rounds of 50 ms."""
        for _ in range(round(seconds / 0.05)):
            self._let_nodes_speak()
            self._let_arrive()
            self.answer()
            self.turn(0.05)
            self._connect_lifelines()
            self._let_arrive()

    def _connect_lifelines(self) -> None:
        for name in sorted(self.client.lifelines - self._connected):
            if name in self.believers:
                self.client.events.append((NodeId(name), LinkEvent.CONNECTED))
        self._connected = set(self.client.lifelines)

    def _let_nodes_speak(self) -> None:
        is_beat = self.now_s >= self._next_beat_s
        if is_beat:
            self._next_beat_s = self.now_s + BEAT_S
        for name, believer in list(self.believers.items()):
            if believer.is_gone or (believer.is_leaving and self.now_s >= believer.leave_by_s):
                self.lose(name)
                continue
            if not believer.is_welcome and self.now_s - believer.said_hello_s >= HELLO_S:
                believer.said_hello_s = self.now_s
                believer.said.append((hello_of(believer.description), Header()))
            if is_beat and believer.is_welcome:
                believer.said.append((believer.heartbeat(), Header()))
            said, believer.said = believer.said, []
            for message, header in said:
                self._send(name, message, lambda n=name, m=message, h=header: self.say(n, m, h))  # type: ignore[misc]
        self._feed()

    def _feed(self) -> None:
        for holder in self.believers.values():
            mirror = self.believers.get(holder.feed.node_id) if holder.feed is not None else None
            if mirror is not None and mirror.role is not None and holder.role is not None:
                if mirror.role.lease_term == holder.role.lease_term and mirror.role.slot == holder.role.slot:
                    mirror.is_fed()

    def _let_arrive(self) -> None:
        due = [one for one in self._under_way if one[0] <= self.now_s]
        self._under_way = [one for one in self._under_way if one[0] > self.now_s]
        for _, _, arrive in sorted(due, key=lambda one: one[:2]):
            arrive()

    def differences(self) -> list[str]:
        """Where a node believes something else than the router does; empty: all agree, and nothing is missing."""
        found = [*self._wrong_stages(), *self._wrong_experts()]
        found += [f"{name} has not left" for name, believer in self.believers.items() if believer.is_leaving]
        if set(self.membership.living()) != set(self.believers):
            found.append("the router counts other nodes than there are")
        return found

    def _wrong_stages(self) -> Iterator[str]:
        mirrors = self.stages.mirrors
        for pipeline in self.stages.pipelines.values():
            if not pipeline.is_open:
                yield "a pipeline is not open"
        fed = {slot: name for slot, name in mirrors.nodes.items()}
        for name, believer in self.believers.items():
            if believer.description.kind is not NodeKind.STAGE:
                continue
            slot, mirrored = self.stages.slot_of(NodeId(name)), mirrors.number_of(NodeId(name))
            expected = (0, StageState.SPARE)
            if slot is not None:
                expected = (self.stages.pipelines[slot.pipeline].generation, StageState.HOLDING)
            elif mirrored is not None:
                expected = (mirrored, StageState.COMPLETE)
            if (believer.role_number, believer.state) != expected:
                yield f"{name} is {believer.state} by {believer.role_number}, not {expected}"
            target = believer.feed.node_id if believer.feed is not None else None
            if slot is not None and target != fed.get(slot):
                yield f"{name} feeds {target}, not {fed.get(slot)}"
            if believer.placement is None or believer.placement.version != self.experts.version:
                yield f"{name} has another placement"
        if mirrors.num_complete != len(fed):
            yield "the router waits for a mirror"

    def _wrong_experts(self) -> Iterator[str]:
        if not self.experts.is_served:
            yield "a shard is not served"
        for name, believer in self.believers.items():
            if believer.description.kind is NodeKind.EXPERT and not believer.is_leaving:
                held, told = self.experts.ready.get(NodeId(name)), self.experts._told.get(NodeId(name))
                if held is None or believer.shards is None:
                    yield f"{name} was told nothing"
                elif not np.array_equal(held, pack(self.experts.read_shards(believer.shards, "held"))):
                    yield f"{name} holds something else than the router believes"
                elif told is None or not np.array_equal(held, told):
                    yield f"{name} was told to hold something else"
