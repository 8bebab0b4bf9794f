"""An expert client with a test as all of its peers, over sockets that are lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import structlog
import torch
from torch import Tensor

from common.errors import MoemeshError
from common.messages import CancelCall, Dispatch, ExpertRows, Failed, Header, PublishPlacement
from common.wire.array import Int32Array, array_to_frame
from common.wire.tensor import frame_to_tensor, tensor_to_frame
from common.wire.transport import LinkEvent
from services.router.control.experts.first_classes import FirstClasses
from services.stage.experts.client import CallDone, ExpertClient
from services.stage.experts.nodes import ExpertNodes
from services.stage.model.decoder import ExpertCall
from tests.support.nodes.memory_transport import MemorySocket, MemoryTransport

LAYERS, EXPERTS, WIDTH = 2, 4, 3
ALL = tuple(range(EXPERTS))
Holdings = Mapping[str, Sequence[int]]


class Stage:
    """An expert client with the test as all of its peers."""

    def __init__(self, combine: str = "exact") -> None:
        self.transport = MemoryTransport()
        transport: Any = self.transport
        log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
        self.client = ExpertClient(ExpertNodes(transport, "", EXPERTS, log), log)
        self.client.combine = combine
        self.now_s = 0.0
        self.version = 0
        self.sums: list[tuple[str, Tensor]] = []
        self.failures: list[tuple[str, MoemeshError]] = []
        self.cancelled: list[tuple[str, int]] = []
        self.degraded: list[int] = []
        self.classes: dict[str, str] = {}
        """Numeric classes of nodes that do not have the usual one."""
        self.first_classes = FirstClasses()
        """The router's choice."""
        self.placement = placement({}, 0)
        """The last one."""
        self.num_retried = 0
        self.names: dict[int, str] = {}
        """Of the calls that have not ended."""

    def place(self, holdings: Holdings, *, connect: bool = True, version: int | None = None) -> bool:
        """Publish who holds which experts (of every layer), first node first choice."""
        self.version += 1
        classes = tuple(self.classes.get(node, "cpu") for node in holdings)
        first = self.first_classes.choose(owners_of(holdings), classes)
        self.placement = placement(holdings, version or self.version, numeric_classes=classes, first_classes=first)
        took = self.take(self.placement)
        if connect:
            for node in holdings:
                self.link(node)
        return took

    def take(self, message: PublishPlacement, router_term: int = 1) -> bool:
        return self.client.apply_placement(message, router_term, 1, self.now_s)

    def socket(self, node: str) -> MemorySocket:
        return self.transport.sockets[f"to {node}"]

    def link(self, node: str, event: LinkEvent = LinkEvent.CONNECTED) -> None:
        self.socket(node).events.append(event)
        self.poll()

    def start(self, call: ExpertCall, name: str = "call", within_s: float = 10.0) -> None:
        header = Header(step=5, generation=2, attempt=1, trace="0/5")
        number = self.client.start(call, header, self.now_s, self.now_s + within_s)
        self.names[number] = name

    def poll(self, now_s: float | None = None) -> None:
        """At this time, or now; what has ended is noted."""
        for ended in self.client.poll(self.now_s if now_s is None else now_s):
            name = self.names.pop(ended.number)
            if isinstance(ended, CallDone):
                self.sums.append((name, ended.answer))
                self.degraded.extend(sorted(ended.degraded_rows))
                self.num_retried += ended.num_retried
            else:
                self.failures.append((name, ended.error))

    def asked(self, node: str) -> list[Dispatch]:
        """Calls that have come to a node since the last look; `cancelled` keeps what was taken back."""
        messages = [message for message, _ in self.socket(node).take_sent()]
        self.cancelled += [
            (node, call) for message in messages if isinstance(message, CancelCall) for call in message.calls
        ]
        return [message for message in messages if isinstance(message, Dispatch)]

    def pass_time(self, seconds: float) -> None:
        """In steps as small as a stage's loop has them."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.now_s = min(until_s, self.now_s + 0.005)
            self.poll()

    def answer(self, node: str, *messages: Any) -> None:
        for message in messages:
            self.socket(node).say(answer_to(message) if isinstance(message, Dispatch) else message)
        self.poll()

    def answer_all(self) -> None:
        for name, socket in self.transport.sockets.items():
            if not socket.is_closed:
                self.answer(name.removeprefix("to "), *self.asked(name.removeprefix("to ")))

    @property
    def outstanding(self) -> dict[str, int]:
        return {node.node_id: node.outstanding_rows for node in self.client.nodes}


def placement(holdings: Holdings, version: int, **changes: Any) -> PublishPlacement:
    fields: dict[str, Any] = {
        "version": version,
        "node_ids": tuple(holdings),
        "incarnations": tuple(range(1, 1 + len(holdings))),
        "endpoints": tuple(f"tcp://{node}:1" for node in holdings),
        "ipc_tokens": ("",) * len(holdings),
        "numeric_classes": ("cpu",) * len(holdings),
        "owners": array_to_frame(owners_of(holdings)[..., np.newaxis]),
    }
    # The same node keeps its incarnation from one placement to the next.
    fields["incarnations"] = tuple(1 + sum(map(ord, node)) for node in holdings)
    return PublishPlacement(**(fields | changes))


def owners_of(holdings: Holdings) -> Int32Array:
    """[copies, layers, experts]: 1 + a node's place, 0 for none."""
    owners = np.zeros((len(holdings), LAYERS, EXPERTS), dtype=np.int32)
    for place, experts in enumerate(holdings.values()):
        owners[place, :, list(experts)] = 1 + place
    return owners


def make_call(experts: Sequence[Sequence[int]], layer: int = 1) -> ExpertCall:
    generator = torch.Generator().manual_seed(len(experts))
    hidden = torch.randn((len(experts), WIDTH), generator=generator)
    return ExpertCall(
        layer, hidden, torch.tensor(experts), torch.rand(len(experts), len(experts[0]), generator=generator)
    )


CALL = make_call([[0, 1], [2, 3], [1, 0], [3, 1]])


def expert_rows(hidden: Tensor, experts: Tensor) -> Tensor:
    return hidden * (1.0 + experts)[:, None]


def wanted(call: ExpertCall) -> Tensor:
    """As one node would compute it alone."""
    total = torch.zeros_like(call.hidden)
    for choice in range(call.experts.shape[1]):
        rows = expert_rows(call.hidden, call.experts[:, choice])
        total = total + rows * call.weights[:, choice, None]
    return total


def answer_to(message: Dispatch) -> ExpertRows:
    hidden = frame_to_tensor(message.hidden, torch.float32, (None, WIDTH), "hidden")
    routing = frame_to_tensor(message.routing, torch.int32, (3, None), "routing").long()
    rows = expert_rows(hidden[routing[0]], routing[1])
    if message.weights.shape != (0,):
        weights = frame_to_tensor(message.weights, torch.float32, (routing.shape[1],), "weights")
        rows = torch.zeros_like(hidden).index_add_(0, routing[0], rows * weights[:, None])
    return ExpertRows(message.call, tensor_to_frame(rows))


def refusal(message: Dispatch) -> Failed:
    return Failed("not_ready", "expert 2 is not held here", message.call)
