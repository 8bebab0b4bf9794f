"""A stage's expert client beside expert nodes that serve rings in this process; what goes as a message is a list."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from torch import Tensor

from common.compute.gated_ffn import GatedExpert, grouped_gated_ffn
from common.compute.native_library import NativeKernels
from common.messages import Header, PublishPlacement
from common.topology import ShardId
from common.wire.array import array_to_frame
from common.wire.call_ring import RingMemory, RingShape, new_bell, ring_shape
from common.wire.transport import LinkEvent, RoutingSocket, SocketLimits, Transport
from common.wire.zmq_functions import link_limits, zmq_functions
from services.expert.ring_server import CallThread, LinkSocket, NodeLinks, RingCounts, RingServer
from services.expert.shard_store import ShardStore
from services.stage.experts.client import CallDone, CallFailed, ExpertClient
from services.stage.experts.nodes import ExpertNodes
from services.stage.experts.rings import Rings
from services.stage.model.decoder import ExpertCall
from tests.support.nodes.kernels import kernels_for
from tests.support.nodes.memory_transport import MemorySocket, MemoryTransport

LAYERS, EXPERTS, WIDTH, EXPERT_WIDTH, CHOICES = 2, 6, 48, 32, 2
ALL = tuple(range(EXPERTS))
LOG: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])


class _Config:
    num_layers, num_experts, hidden_size, num_experts_per_token = LAYERS, EXPERTS, WIDTH, CHOICES


class HeldStore(ShardStore):
    """A store that is given its experts instead of reading them."""

    def __init__(self, kernels: NativeKernels, dtype: torch.dtype, num_slices: int) -> None:
        config: Any = _Config()
        super().__init__(config, num_slices, dtype, kernels)

    def put(self, shard: ShardId, expert: GatedExpert) -> None:
        self._shards[shard] = expert
        with self._watching:
            self._tell({shard: expert})


class IdleThread(CallThread):
    """Takes rings in and answers nothing, as a stopped process, until it is woken."""

    def __init__(self, store: ShardStore, kernels: NativeKernels, links: NodeLinks) -> None:
        self._store, self._kernels, self._links, self.bell = store, kernels, links, new_bell()
        self.shape = ring_shape(WIDTH, store.dtype.itemsize, CHOICES * store.num_slices)
        self.rings: dict[int, tuple[RingMemory, int]] = {}
        self.awake: CallThread | None = None

    def add(self, number: int, memory: RingMemory, stage_bell: int) -> None:
        self.rings[number] = memory, stage_bell

    def remove(self, number: int) -> None:
        self.rings.pop(number, None)
        if self.awake is not None:
            self.awake.remove(number)

    def wake(self) -> None:
        self.awake = CallThread(self._store, self._kernels, self._links)
        for number, (memory, stage_bell) in self.rings.items():
            self.awake.add(number, memory, stage_bell)

    def counts(self) -> RingCounts:
        return RingCounts() if self.awake is None else self.awake.counts()

    def close(self) -> RingCounts:
        counts = self.counts()
        if self.awake is not None:
            self.awake.close()
        os.close(self.bell)
        return counts


class SlotView:
    """One slot as it lies in memory."""

    def __init__(self, memory: RingMemory, shape: RingShape, index: int = 0) -> None:
        self._start = memory.address + index * (shape.num_bytes // shape.slots)
        self._answer = 128 + lines(shape.max_pairs * 8) + lines(shape.max_rows * shape.width * shape.value_bytes)
        self._rows = 128 + lines(shape.max_pairs * 8)

    @property
    def state(self) -> int:
        return ctypes.c_uint32.from_address(self._start).value

    def take(self) -> None:
        """As a node does that begins the call."""
        self.set_state(2)

    def set_state(self, state: int) -> None:
        ctypes.c_uint32.from_address(self._start).value = state

    def spoil_rows(self) -> None:
        ctypes.c_uint8.from_address(self._start + self._rows + 5).value ^= 4

    def spoil_answer(self) -> None:
        ctypes.c_uint8.from_address(self._start + self._answer + 5).value ^= 4


def lines(num_bytes: int) -> int:
    return (num_bytes + 63) // 64 * 64


class LinkTransport(MemoryTransport):
    """What is sent as messages stays in memory; links are real."""

    def __init__(self, real: Transport) -> None:
        super().__init__()
        self._real = real

    @property
    def limits(self) -> SocketLimits:
        return self._real.limits

    def dealer(self, name: str, endpoint: str, identity: bytes = b"", limits: SocketLimits | None = None) -> Any:
        if name.startswith("link to "):
            return self._real.dealer(name, endpoint, limits=limits)
        return super().dealer(name, endpoint)


class RingMesh:
    """One stage and some nodes. Experts are random, the same in each node. Nodes that are `idle` are stopped, those
    `linked` are reached by a link over tcp, through the proxy if there is one, and have no ring."""

    def __init__(
        self,
        folder: Path,
        kernels: NativeKernels,
        holdings: Mapping[str, Sequence[int]],
        dtype: torch.dtype = torch.float32,
        num_slices: int = 1,
        idle: Collection[str] = (),
        linked: Collection[str] = (),
        socks_proxy: str = "",
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        self.dtype, self.num_slices = dtype, num_slices
        self.experts = {
            ShardId(layer, expert, piece): _random_expert(generator, dtype, kernels)
            for layer in range(LAYERS)
            for expert in ALL
            for piece in range(num_slices)
        }
        self.stores = {name: HeldStore(kernels, dtype, num_slices) for name in holdings}
        for name, held in holdings.items():
            for shard, expert in self.experts.items():
                if shard.expert in held:
                    self.stores[name].put(shard, expert)
        self.real = Transport(SocketLimits(socks_proxy=socks_proxy))
        self.functions = zmq_functions()
        assert self.functions is not None
        self.folder, self.kernels, self.idle = folder, kernels, idle
        self.links = {name: self.link_socket(name) for name in linked}
        self.servers = {name: self.server(name, number) for number, name in enumerate(holdings, start=1)}
        self.transport = LinkTransport(self.real)
        transport: Any = self.transport
        nodes = ExpertNodes(transport, "", EXPERTS, LOG)
        self.rings = Rings(nodes, folder, self.functions, kernels, WIDTH, LOG)
        self.client = ExpertClient(nodes, LOG, self.rings, kernels)
        self.ended: list[CallDone | CallFailed] = []
        self.client.apply_placement(self.placement(holdings), 1, num_slices, time.monotonic())
        for name in holdings:
            self.socket(name).events.append(LinkEvent.CONNECTED)
        self.poll()

    def link_socket(self, name: str, endpoint: str = "tcp://127.0.0.1:*") -> RoutingSocket:
        """Where a node's links come in."""
        return self.real.router(f"links of {name}", [endpoint], link_limits(self.real.limits))

    def server(self, name: str, incarnation: int) -> RingServer:
        """A node's."""
        assert self.functions is not None
        links = LinkSocket(self.links[name], self.functions) if name in self.links else None
        thread = IdleThread if name in self.idle else CallThread
        folder = None if links is not None else self.folder
        return RingServer(folder, name, incarnation, self.kernels, LOG, open_thread=thread, links=links)

    def placement(
        self, holdings: Mapping[str, Sequence[int]], version: int = 1, num_slices: int | None = None
    ) -> PublishPlacement:
        owners = np.zeros((len(holdings), LAYERS, EXPERTS, num_slices or self.num_slices), dtype=np.int32)
        for place, held in enumerate(holdings.values()):
            owners[place, :, list(held)] = 1 + place
        count = len(holdings)
        return PublishPlacement(
            version=version,
            node_ids=tuple(holdings),
            incarnations=tuple(range(1, 1 + count)),
            endpoints=tuple(f"tcp://{name}:1" for name in holdings),
            ipc_tokens=("",) * count,
            numeric_classes=("cpu",) * count,
            owners=array_to_frame(owners),
            links=tuple("".join(self.links[name].endpoints) if name in self.links else "" for name in holdings),
        )

    def socket(self, name: str) -> MemorySocket:
        return self.transport.sockets[f"to {name}"]

    def open_rings(self) -> None:
        """The first call goes as messages, and says how large rings are; then there are rings."""
        self.start(self.call(1))
        self.client.abandon()
        self.socket_messages()
        deadline_s = time.monotonic() + 5
        while self.rings.peers.num_open < len(self.servers) and time.monotonic() < deadline_s:
            self.poll()
        assert self.rings.peers.num_open == len(self.servers)

    def look(self) -> None:
        """A turn of each node's loop."""
        for name, server in self.servers.items():
            server.look(self.stores[name])

    def poll(self) -> None:
        self.look()
        self.client._next_rings_s = 0.0
        self.ended += self.client.poll(time.monotonic())

    def start(self, call: ExpertCall, within_s: float = 10.0) -> int:
        now_s = time.monotonic()
        return self.client.start(call, Header(layer=call.layer), now_s, now_s + within_s)

    def finish(self, within_s: float = 5.0) -> CallDone | CallFailed:
        """Turns until one more call has ended."""
        until_s = time.monotonic() + within_s
        while not self.ended and time.monotonic() < until_s:
            self.poll()
        return self.ended.pop(0)

    def socket_messages(self) -> dict[str, list[Any]]:
        """What has gone as messages since the last look."""
        return {
            name.removeprefix("to "): [message for message, _ in socket.take_sent()]
            for name, socket in self.transport.sockets.items()
        }

    def call(self, num_tokens: int, layer: int = 1, seed: int = 0) -> ExpertCall:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn((num_tokens, WIDTH), generator=generator).to(self.dtype)
        experts = torch.stack([torch.randperm(EXPERTS, generator=generator)[:CHOICES] for _ in range(num_tokens)])
        return ExpertCall(layer, hidden, experts, torch.rand((num_tokens, CHOICES), generator=generator))

    def wanted(self, call: ExpertCall) -> Tensor:
        """What one node alone would answer, summed in the gate's order."""
        rows = []
        for token, chosen in enumerate(call.experts.tolist()):
            total = None
            for choice, expert in enumerate(chosen):
                row = None
                for piece in range(self.num_slices):
                    held = self.experts[ShardId(call.layer, expert, piece)]
                    own = grouped_gated_ffn(call.hidden[token : token + 1], (0, 1), (held,)).to(torch.float32)
                    row = own if row is None else row + own
                assert row is not None
                weighted = row * call.weights[token, choice]
                total = weighted if total is None else total + weighted
            assert total is not None
            rows.append(total.to(self.dtype))
        return torch.cat(rows)

    def thread(self, name: str) -> CallThread:
        thread = self.servers[name]._thread
        assert thread is not None
        return thread

    def wake(self, *names: str) -> None:
        """Lets nodes go on that are still stopped."""
        for name in names:
            thread = self.thread(name)
            assert isinstance(thread, IdleThread)
            if thread.awake is None:
                thread.wake()

    def number(self, name: str) -> int:
        """The stage's number of a node."""
        return next(node.number for node in self.client.nodes if node.node_id == name)

    def slot(self, name: str, index: int = 0) -> SlotView:
        """A slot of the node's ring, or of the stage's memory beside its link."""
        if name in self.links:
            peer = self.rings.peers._peers[self.number(name)]
            return SlotView(peer.memory, self.rings.peers.shape, index)
        thread = self.thread(name)
        memories = [memory for memory, _ in thread.rings.values()] if isinstance(thread, IdleThread) else []
        return SlotView([*memories, *getattr(thread, "_memories", {}).values()][0], thread.shape, index)

    def close(self) -> None:
        self.client.close()
        for server in self.servers.values():
            server.close()
        self.real.close()


def await_message(mesh: RingMesh, *names: str) -> object:
    """The first message that one of these nodes gets."""
    until_s = time.monotonic() + 5
    while time.monotonic() < until_s:
        mesh.poll()
        sent = mesh.socket_messages()
        if messages := [message for name in names for message in sent[name]]:
            return messages[0]
    return None


def _random_expert(generator: torch.Generator, dtype: torch.dtype, kernels: NativeKernels) -> GatedExpert:
    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    gate, up = weight(EXPERT_WIDTH, WIDTH), weight(EXPERT_WIDTH, WIDTH)
    return GatedExpert(gate, up, weight(WIDTH, EXPERT_WIDTH), kernels=kernels)


@pytest.fixture
def kernels() -> NativeKernels:
    """Native ones, which rings need; skips the test where there are none."""
    found = kernels_for("native")
    assert found is not None
    return found


@pytest.fixture
def mesh(tmp_path: Path, kernels: NativeKernels) -> Iterator[RingMesh]:
    """Two nodes that hold everything."""
    made = RingMesh(tmp_path, kernels, {"a": ALL, "b": ALL})
    made.open_rings()
    yield made
    made.close()


@pytest.fixture
def idle(tmp_path: Path, kernels: NativeKernels) -> Iterator[RingMesh]:
    """The same, but they are stopped."""
    made = RingMesh(tmp_path, kernels, {"a": ALL, "b": ALL}, idle=["a", "b"])
    made.open_rings()
    yield made
    made.close()
