"""Who may join: a node's Hello, checked against what this mesh serves, and who may not any more. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from common.checkpoint.model_config import ModelConfig
from common.errors import CheckpointError, ConfigurationError, MoemeshError, NodeLostError, ProtocolError
from common.ids import Incarnation, NodeId
from common.messages import Hello
from common.topology import CheckpointPart, LayerRange, NodeDescription, NodeKind
from services.router.control.membership import MAX_REMEMBERED_DEAD, ChangeReason, MembershipChange


def check_hello(hello: Hello, sender: NodeId, fingerprint: str, config: ModelConfig) -> NodeDescription:
    """What the node says of itself. Raises ProtocolError, or CheckpointError if it sees other weights."""
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
    )


def _read_part(hello: Hello, config: ModelConfig) -> CheckpointPart | None:
    """What the node can load; None: everything."""
    layers, experts = hello.part_layers, hello.part_experts
    if not layers and not experts:
        return None
    if layers and not (len(layers) == 2 and layers[0] < layers[1] <= config.num_layers):
        raise ProtocolError(f"Hello.part_layers {layers} is no range of this model's {config.num_layers} layers")
    if any(expert >= config.num_experts for expert in experts):
        raise ProtocolError(f"Hello.part_experts names an expert outside [0, {config.num_experts})")
    return CheckpointPart(LayerRange(*layers) if layers else None, frozenset(experts))


def refuse_other_device(node: NodeDescription, others: Iterable[NodeDescription]) -> None:
    """Raises ConfigurationError where nodes of its kind compute on another kind of device: any of them may become the
    copy, the mirror or the heir of another, and what it then computes would have other bits.

    Stages on GPUs with experts on CPUs, or the other way round, are no such thing.
    """
    for other in others:
        if other.kind is node.kind and other.node_id != node.node_id and other.device_kind != node.device_kind:
            raise ConfigurationError(
                f"{node.node_id} computes on {node.device_kind}, the {node.kind.value} nodes of this mesh on "
                f"{other.device_kind}: DEVICE must name the same kind of device for all of them"
            )


def differing_classes(nodes: Iterable[NodeDescription], kind: NodeKind) -> list[str]:
    """Numeric classes of the nodes of one kind, if there is more than one: results may differ in their last bits."""
    classes = sorted({node.numeric_class for node in nodes if node.kind is kind})
    return classes if len(classes) > 1 else []


def not_linked(nodes: Iterable[NodeDescription]) -> list[str]:
    """What to say of nodes that have said hello and that the router has no connection to."""
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
        self._told[change.node_id] = error
        if len(self._told) > MAX_REMEMBERED_DEAD:
            del self._told[next(iter(self._told))]

    def let_go(self, node_id: NodeId) -> None:
        """It wanted to leave, and was told that it may."""
        self._let_go[node_id] = None
        if len(self._let_go) > MAX_REMEMBERED_DEAD:
            del self._let_go[next(iter(self._let_go))]

    def was_let_go(self, node_id: NodeId) -> bool:
        """Whether it left with leave; if it speaks again it was not heard."""
        return node_id in self._let_go

    def refuse(self, node_id: NodeId) -> None:
        """Raises what a dead node is told; of others nothing is known here."""
        if node_id in self._told:
            raise self._told[node_id].with_traceback(None)
