"""Who may join, and which nodes live: alive -> suspect -> dead. Pure; time is an argument.

Four witnesses tell, because each sees another kind of death. A lost pulse (`common/node/silence.py`): the process is
stopped, or cut off. A closed lifeline: the process is gone, or ZeroMQ has heard nothing of it for long. Silence on the
control link: its loop is stuck. Heartbeats without progress while there is work: it computes nothing. Dead is final for
an incarnation: what it says afterwards is not believed, and it comes back as another incarnation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from common.checkpoint.model_config import ModelConfig
from common.errors import CheckpointError, ConfigurationError, MoemeshError, NodeLostError, ProtocolError
from common.ids import Incarnation, NodeId
from common.messages import Hello
from common.topology import CheckpointPart, LayerRange, NodeDescription, NodeKind

MIN_HEARTBEATS_MISSED = 8
"""How many before anything is concluded from heartbeats that do not come, or do not show what they must."""
MAX_REMEMBERED_DEAD = 1024
"""Incarnations that are still known to be dead; none speaks again that long after."""
LIFELINE_GRACE_S = 0.05
"""How long a closed lifeline may take to open again; within it the node is suspect."""
LATE_GRACE_S = 6.0
"""The same while the observer's own link loses packets: connections break that will stand again. One to a process that
has ended is refused, and that is not a question of grace."""
ALONE_GRACE_S = 30.0
"""The same while no node at all is heard: the observer may be what is cut off, and none could take over."""
LIFELINE_OPEN_S = 10.0
"""How long the first lifeline to a node may take: one that cannot be reached is of no use, whatever it says."""
LONGEST_TURN_S = 1.0
"""The longest turn of the observer's loop. After a longer absence it has heard no node meanwhile: time beyond that is
not counted."""

Key = TypeVar("Key")
Value = TypeVar("Value")


class NodeState(StrEnum):
    """What is believed of a node."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    """Gets no new work if there is another choice; nothing is taken from it."""
    DEAD = "dead"


class ChangeReason(StrEnum):
    """What a change of state was concluded from."""

    JOINED = "joined"
    HEARD = "heard"
    SILENT = "silent"
    LIFELINE_CLOSED = "lifeline_closed"
    UNREACHABLE = "unreachable"
    NO_PROGRESS = "no_progress"
    NO_PULSE = "no_pulse"
    LEFT = "left"
    REPLACED = "replaced"


@dataclass(frozen=True, slots=True)
class MembershipChange:
    """One node's state changed. `before` is None for a node that has just joined."""

    node_id: NodeId
    incarnation: Incarnation
    before: NodeState | None
    after: NodeState
    reason: ChangeReason


@dataclass(slots=True)
class _Member:
    incarnation: Incarnation
    heard_s: float
    progressed_s: float
    progress: int = 0
    is_busy: bool = False
    joined_s: float | None = None
    """None once its lifeline has stood."""
    closed_s: float | None = None
    state: NodeState = NodeState.ALIVE


def patience_for(step_deadline_s: float, heartbeat_interval_s: float) -> float:
    """Returns how many seconds a node may be silent. One that has ended or is stopped is seen otherwise. Silence alone
    may be one long computation: it gets as long as a step does, and as some heartbeats take at least."""
    return max(step_deadline_s, MIN_HEARTBEATS_MISSED * heartbeat_interval_s)


class Membership:
    """See the module. Every method that may change a state returns the changes; `tick` finds those that time brings."""

    def __init__(self, patience_s: float) -> None:
        """A node without heartbeats is suspect after half of `patience_s`, and dead after all of it; a busy one without
        progress is suspect after that time, and dead after twice as long."""
        self._patience_s = patience_s
        self._members: dict[NodeId, _Member] = {}
        self._dead: dict[tuple[NodeId, Incarnation], None] = {}  # an ordered set
        self._turned_s: float | None = None
        self.is_alone = False
        """Whether the observer hears no node; its owner says so."""
        self.is_late = False
        """Whether many come back late to the observer; its owner says so."""

    def join(self, node_id: NodeId, incarnation: Incarnation, now_s: float) -> list[MembershipChange]:
        """It said hello. Said again it is a heartbeat; another incarnation replaces the last; a dead one stays so."""
        if (node_id, incarnation) in self._dead:
            return []
        member = self._members.get(node_id)
        if member is not None and member.incarnation == incarnation:
            return self.heartbeat(node_id, incarnation, member.progress, member.is_busy, now_s)
        changes = self._bury(node_id, ChangeReason.REPLACED)
        self._members[node_id] = _Member(incarnation, heard_s=now_s, progressed_s=now_s, joined_s=now_s)
        return [*changes, MembershipChange(node_id, incarnation, None, NodeState.ALIVE, ChangeReason.JOINED)]

    def heartbeat(
        self, node_id: NodeId, incarnation: Incarnation, progress: int, is_busy: bool, now_s: float
    ) -> list[MembershipChange]:
        """It is there. `progress` counts work done (steps, calls, tensors loaded); `is_busy`: it has some to do."""
        member = self._member(node_id, incarnation)
        if member is None:
            return []
        member.heard_s = now_s
        if progress != member.progress or not is_busy or not member.is_busy:
            member.progressed_s = now_s  # idle until now counts as progress: the work has only just come
        member.progress, member.is_busy = progress, is_busy
        return self._judge(node_id, member, now_s)

    def lifeline_closed(self, node_id: NodeId, incarnation: Incarnation, now_s: float) -> list[MembershipChange]:
        """Its connection broke. Heartbeats do not save it (they may have been under way), only a new connection."""
        member = self._member(node_id, incarnation)
        if member is None:
            return []
        member.closed_s = now_s if member.closed_s is None else member.closed_s
        return self._judge(node_id, member, now_s)

    def lifeline_opened(self, node_id: NodeId, incarnation: Incarnation, now_s: float) -> list[MembershipChange]:
        """Its connection stands (again)."""
        member = self._member(node_id, incarnation)
        if member is None:
            return []
        member.closed_s = member.joined_s = None
        return self._judge(node_id, member, now_s)

    def lose(self, node_id: NodeId, incarnation: Incarnation, reason: ChangeReason) -> list[MembershipChange]:
        """It is gone, and nothing has to wait: its connection broke and nothing listens there any more; or it is silent
        for longer than its link explains (`common/node/silence.py`); or it leaves."""
        return [] if self._member(node_id, incarnation) is None else self._bury(node_id, reason)

    def turn(self, now_s: float) -> None:
        """The observer's loop turns; before it takes in anything. What it slept through is no node's silence."""
        turn_s, self._turned_s = 0.0 if self._turned_s is None else now_s - self._turned_s, now_s
        away_s = turn_s - LONGEST_TURN_S
        if away_s <= 0:
            return
        for member in self._members.values():
            member.heard_s += away_s
            member.progressed_s += away_s
            member.joined_s = None if member.joined_s is None else member.joined_s + away_s
            member.closed_s = None if member.closed_s is None else member.closed_s + away_s

    def tick(self, now_s: float) -> list[MembershipChange]:
        """Returns what time alone has changed, by node id."""
        changes: list[MembershipChange] = []
        for node_id in sorted(self._members):
            changes += self._judge(node_id, self._members[node_id], now_s)
        return changes

    def state_of(self, node_id: NodeId) -> NodeState:
        """Returns DEAD for a node that is not known."""
        member = self._members.get(node_id)
        return NodeState.DEAD if member is None else member.state

    def has_stood(self, node_id: NodeId) -> bool:
        """Returns whether there has been a connection to it since it joined."""
        member = self._members.get(node_id)
        return member is not None and member.joined_s is None

    def living(self) -> dict[NodeId, NodeState]:
        """Returns nodes that are alive or suspect, by id."""
        return {node_id: self._members[node_id].state for node_id in sorted(self._members)}

    @property
    def _grace_s(self) -> float:
        if self.is_alone:
            return ALONE_GRACE_S
        return LATE_GRACE_S if self.is_late else LIFELINE_GRACE_S

    def _member(self, node_id: NodeId, incarnation: Incarnation) -> _Member | None:
        """Returns None for an incarnation that is unknown, dead or replaced."""
        member = self._members.get(node_id)
        return None if member is None or member.incarnation != incarnation else member

    def _bury(self, node_id: NodeId, reason: ChangeReason) -> list[MembershipChange]:
        member = self._members.pop(node_id, None)
        if member is None:
            return []
        _remember(self._dead, (node_id, member.incarnation), None)
        return [MembershipChange(node_id, member.incarnation, member.state, NodeState.DEAD, reason)]

    def _judge(self, node_id: NodeId, member: _Member, now_s: float) -> list[MembershipChange]:
        """Returns the state that the observations allow now; worst witness first."""
        silent_s = now_s - member.heard_s
        stuck_s = now_s - member.progressed_s if member.is_busy else 0.0
        if member.closed_s is not None and now_s - member.closed_s >= self._grace_s:
            return self._bury(node_id, ChangeReason.LIFELINE_CLOSED)
        if member.joined_s is not None and now_s - member.joined_s >= LIFELINE_OPEN_S:
            return self._bury(node_id, ChangeReason.UNREACHABLE)
        if silent_s >= self._patience_s:
            return self._bury(node_id, ChangeReason.SILENT)
        if stuck_s >= 2 * self._patience_s:
            return self._bury(node_id, ChangeReason.NO_PROGRESS)
        if member.closed_s is not None:
            after, reason = NodeState.SUSPECT, ChangeReason.LIFELINE_CLOSED
        elif silent_s >= self._patience_s / 2:
            after, reason = NodeState.SUSPECT, ChangeReason.SILENT
        elif stuck_s >= self._patience_s:
            after, reason = NodeState.SUSPECT, ChangeReason.NO_PROGRESS
        else:
            after, reason = NodeState.ALIVE, ChangeReason.HEARD
        if after is member.state:
            return []
        before, member.state = member.state, after
        return [MembershipChange(node_id, member.incarnation, before, after, reason)]


def _remember(dead: dict[Key, Value], key: Key, value: Value) -> None:
    """Adds one, and forgets the one that has been dead for longest where there are too many."""
    dead[key] = value
    if len(dead) > MAX_REMEMBERED_DEAD:
        del dead[next(iter(dead))]


def check_hello(hello: Hello, sender: NodeId, fingerprint: str, config: ModelConfig) -> NodeDescription:
    """Reads what the node says of itself. Raises ProtocolError, or CheckpointError if it sees other weights."""
    if hello.node_id != sender:
        raise ProtocolError(f"Hello.node_id {hello.node_id!r} is not the sender {sender!r}")
    if hello.node_kind not in tuple(NodeKind):
        raise ProtocolError(f"Hello.node_kind {hello.node_kind!r} is neither stage nor expert")
    if hello.fingerprint != fingerprint:
        raise CheckpointError(
            f"the checkpoints differ: {sender} sees one with the fingerprint {hello.fingerprint}, the router one with "
            f"{fingerprint}; MODEL must name the same files on every node, or parts that were cut from them"
        )
    return NodeDescription(
        node_id=sender,
        incarnation=Incarnation(hello.incarnation),
        kind=NodeKind(hello.node_kind),
        capacity_bytes=hello.capacity_bytes,
        host_label=hello.host_label,
        numeric_class=hello.numeric_class,
        fingerprint=hello.fingerprint,
        endpoints=hello.endpoints,
        lifeline=hello.lifeline,
        ipc_token=hello.ipc_token,
        process=hello.process,
        part=_read_part(hello, config),
        links=hello.links,
    )


def _read_part(hello: Hello, config: ModelConfig) -> CheckpointPart | None:
    """Reads what the node can load; None: everything."""
    layers, experts = hello.part_layers, hello.part_experts
    if not layers and not experts:
        return None
    if layers and not (len(layers) == 2 and layers[0] < layers[1] <= config.num_layers):
        raise ProtocolError(f"Hello.part_layers {layers}: not a valid range of this model's {config.num_layers} layers")
    if any(expert >= config.num_experts for expert in experts):
        raise ProtocolError(f"Hello.part_experts names an expert outside [0, {config.num_experts})")
    return CheckpointPart(LayerRange(*layers) if layers else None, frozenset(experts))


def refuse_other_device(node: NodeDescription, others: Iterable[NodeDescription]) -> None:
    """Raises ConfigurationError where nodes of its kind compute on another kind of device: any of them may become the
    copy, the mirror or the heir of another, and what it then computes would have other bits.

    Stages on GPUs with experts on CPUs, or the other way round, are not affected.
    """
    for other in others:
        if other.kind is node.kind and other.node_id != node.node_id and other.device_kind != node.device_kind:
            raise ConfigurationError(
                f"{node.node_id} computes on {node.device_kind}, the {node.kind.value} nodes of this mesh on "
                f"{other.device_kind}: DEVICE must name the same kind of device for all of them"
            )


def differing_classes(nodes: Iterable[NodeDescription], kind: NodeKind) -> list[str]:
    """Returns the numeric classes of one kind of nodes if they differ: results may differ in their last bits."""
    classes = sorted({node.numeric_class for node in nodes if node.kind is kind})
    return classes if len(classes) > 1 else []


def not_linked(nodes: Iterable[NodeDescription]) -> list[str]:
    """Returns what to say of nodes that have said hello and that the router has no connection to."""
    return [f"the router is not connected to {node.node_id} at {', '.join(node.lifeline)}" for node in nodes]


class DeclaredDead:
    """Incarnations that are dead to the mesh or were let go, and what each is told when it speaks again. Forgets those
    that have been so for longest."""

    def __init__(self) -> None:
        self._told: dict[NodeId, MoemeshError] = {}
        self._let_go: dict[NodeId, None] = {}

    def add(self, change: MembershipChange, description: NodeDescription | None) -> None:
        """One that could not be reached is told to end: as another incarnation it could not be reached either."""
        error: MoemeshError = NodeLostError(
            f"{change.node_id} was declared dead ({change.reason}): it must come back as another incarnation"
        )
        if change.reason is ChangeReason.UNREACHABLE and description is not None:
            error = ConfigurationError(
                f"the router cannot connect to {change.node_id} at {', '.join(description.lifeline)}: "
                "ADVERTISE_HOST must be a name or address that it reaches, with no firewall in between"
            )
        _remember(self._told, change.node_id, error)

    def let_go(self, node_id: NodeId) -> None:
        """It wanted to leave, and was told that it may."""
        _remember(self._let_go, node_id, None)

    def was_let_go(self, node_id: NodeId) -> bool:
        """Returns whether it left with leave; if it speaks again, that was not heard."""
        return node_id in self._let_go

    def refuse(self, node_id: NodeId) -> None:
        """Raises what a dead node is told; of others nothing is known here."""
        if node_id in self._told:
            raise self._told[node_id].with_traceback(None)
