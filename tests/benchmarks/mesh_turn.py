"""How long the mesh thread is busy in one turn while expert nodes of a large model come, load, report and go.

    python -m tests.benchmarks.mesh_turn --layers 60 --experts 256 --nodes 64 --stages 8

Everything but the sockets is real: messages are encoded and decoded, placements are computed elsewhere, as by the
router's own process, and their time is shown by itself. The CPU time of the thread counts.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np

from common.checkpoint.model_config import ModelConfig
from common.ids import Incarnation, NodeId
from common.messages import (
    AssignShards,
    ExpertHeartbeat,
    Header,
    Leave,
    Message,
    PublishPlacement,
    ShardsReady,
    StageHeartbeat,
)
from common.topology import NodeDescription, NodeKind
from common.wire import codec
from common.wire.array import array_to_frame, frame_to_array
from common.wire.transport import LinkEvent
from services.router.control.experts.placing import PlacementAnswer, PlacementRequest, answer_request
from tests.support.router.fake_mesh import FakeClient, FakeMesh, hello_of
from tests.support.router.mesh_shapes import SHARD_BYTES, node, small_model

PLACEMENT = "a placement, elsewhere"


class WirePlacer:
    """Answers when it is told to, outside of the turns that are timed."""

    def __init__(self) -> None:
        self.requests: deque[PlacementRequest] = deque()
        self.answers: deque[PlacementAnswer] = deque()
        self.seconds: list[float] = []

    def begin(self, request: PlacementRequest) -> None:
        self.requests.append(request)

    def pop_answer(self) -> PlacementAnswer | None:
        return self.answers.popleft() if self.answers else None

    def work(self) -> None:
        """Compute what was asked for."""
        while self.requests:
            began_s = time.thread_time()
            self.answers.append(answer_request(self.requests.popleft()))
            self.seconds.append(time.thread_time() - began_s)


class WireClient(FakeClient):
    """Messages are bytes on both sides."""

    def receive_control(self) -> tuple[NodeId, Message, Header] | None:
        received: Any = super().receive_control()
        return None if received is None else (received[0], *codec.decode(received[1]))

    def watch(self, description: NodeDescription) -> None:
        super().watch(description)
        self.events.append((description.node_id, LinkEvent.CONNECTED))

    def tell(self, node_id: NodeId, message: Message, header: Header | None = None) -> bool:
        frames = [bytes(frame) for frame in codec.encode(message, header or Header())]  # as the socket copies them
        return super().tell(node_id, message, header) and bool(frames)


class LargeMesh:
    """A mesh whose expert nodes load a part of what they lack a turn, and say so all at once."""

    def __init__(self, config: ModelConfig, num_nodes: int, num_stages: int, spare_share: float) -> None:
        """`spare_share`: room of a node beyond its part."""
        self.config, self.placer = config, WirePlacer()
        self.mesh = FakeMesh(config=config, placer=self.placer, pp=1, spares=num_stages)
        client: Any = WireClient()
        client.after_wait = self.mesh.loop.stop
        self.mesh.client = self.mesh.loop._client = self.mesh.loop._flow._client = client
        self.mesh.loop._witnesses._client = client
        self.shape = (config.num_layers, config.num_experts, 1)
        self.capacity = int(2 * config.num_layers * config.num_experts / num_nodes * (1 + spare_share)) * SHARD_BYTES
        self.wanted: dict[str, Any] = {}
        self.held: dict[str, Any] = {}
        self.believed: dict[str, dict[str, Any]] = {}
        """What heartbeats of each node say of its role."""
        self.seconds: dict[str, list[float]] = {}
        self.num_joined = self.num_turns = self.num_reports = 0
        self.stages = [f"s{number:02}" for number in range(num_stages)]
        for name in self.stages:
            self.say(name, hello_of(node(name, NodeKind.STAGE)))
        for number in range(num_nodes):
            self.join(f"n{number:02}", number)

    def join(self, name: str, number: int) -> None:
        self.num_joined += 1
        host, incarnation = f"h{number // 4}", Incarnation(self.num_joined)
        described = node(name, NodeKind.EXPERT, self.capacity, host_label=host, incarnation=incarnation)
        self.believed.pop(name, None)
        self.wanted[name] = self.held[name] = np.zeros(self.shape, dtype=np.uint8)
        self.say(name, hello_of(described))

    def say(self, name: str, message: Message) -> None:
        frames: Any = [bytes(frame) for frame in codec.encode(message, Header())]
        self.mesh.client.inbox.append((NodeId(name), frames, Header()))

    def turn(self, what: str) -> None:
        self.mesh.now_s += 0.06
        self.num_turns += 1
        for name in [*self.wanted, *self.stages][self.num_turns % 8 :: 8]:
            kind = StageHeartbeat if name in self.stages else ExpertHeartbeat
            self.say(name, kind(**self.believed.get(name, {})))
        self.run_turn(what)
        while self.mesh.client.inbox:
            self.run_turn(what)
        for name, message, _ in self.mesh.client.sent:
            if isinstance(message, PublishPlacement):
                self.believed[name] = {"placement_version": message.version}
            elif isinstance(message, AssignShards):
                self.believed.setdefault(name, {})["shards_version"] = message.version
                self.wanted[name] = frame_to_array(message.shards, "uint8", self.shape, "shards") != 0
                self.held[name] = self.held[name] * self.wanted[name]
        self.mesh.client.sent.clear()

    def run_turn(self, what: str) -> None:
        began_s, began_thread_s = self.mesh.now_s, time.thread_time()
        self.mesh.loop._clock = lambda: began_s + time.thread_time() - began_thread_s
        self.mesh.loop._stopping = False
        self.mesh.loop.run()
        self.seconds.setdefault(what, []).append(time.thread_time() - began_thread_s)

    def load(self, share: float) -> None:
        """Every node loads so much of what it lacks, and reports."""
        for name, wanted in self.wanted.items():
            missing = np.flatnonzero((wanted != 0) & (self.held[name] == 0))
            held = self.held[name].copy()
            held.reshape(-1)[missing[: max(1, int(share * missing.size))]] = 1
            if missing.size:
                self.held[name] = held
                self.num_reports += 1
                frames = [array_to_frame(held.astype(dtype)) for dtype in (np.uint8, np.int32, np.float32)]
                report = ShardsReady(
                    self.believed[name]["shards_version"], False, frames[0], self.num_reports, *frames[1:]
                )
                self.believed[name]["shards_reports"] = self.num_reports
                self.say(name, report)

    def settle(self, what: str) -> None:
        for _ in range(60):
            self.placer.work()
            self.turn(f"{what}: new placement" if self.placer.answers else f"{what}: reports")
            if not self.is_loading and not self.placer.requests:
                self.turn(f"{what}: reports")  # of the last ones
                if not self.is_loading and not self.placer.requests:
                    return
            self.load(0.5)

    @property
    def is_loading(self) -> bool:
        return any(((wanted != 0) & (self.held[name] == 0)).any() for name, wanted in self.wanted.items())

    def lose(self, name: str) -> None:
        del self.wanted[name], self.held[name]
        self.mesh.client.lifelines.discard(name)
        described = self.mesh.loop._nodes[NodeId(name)]
        self.mesh.membership.lifeline_closed(described.node_id, described.incarnation, self.mesh.now_s - 1.0)


def measure(
    layers: int, experts: int, nodes: int, stages: int, spare_share: float = 0.2, losses: int = 3
) -> dict[str, float]:
    """Longest turn of each kind in seconds of CPU time, and the longest computation of a placement elsewhere."""
    config = replace(small_model(), num_layers=layers, num_experts=experts, moe_layers=(True,) * layers)
    large = LargeMesh(config, nodes, stages, spare_share)
    large.turn("everybody joins")
    large.settle("start")
    assert large.mesh.experts.is_served
    for number in range(losses):
        large.lose(f"n{number:02}")
        large.turn("the turn after a loss")
        assert large.mesh.experts.is_served, "copies are asked at once"
        large.settle("after a loss")
        large.join(f"n{number:02}", number)
        large.turn("a node joins")
        large.settle("after a join")
    large.say("n05", Leave("stopped"))
    large.turn("a node wants to leave")
    large.settle("after that")
    for _ in range(20):
        large.turn("nothing happens")
    turns = {name: max(seconds) for name, seconds in large.seconds.items()}
    return turns | {PLACEMENT: max(large.placer.seconds)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 60), ("experts", 256), ("nodes", 64), ("stages", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--spare-share", type=float, default=0.2, help="room of a node beyond its part")
    options = parser.parse_args()
    figures = measure(options.layers, options.experts, options.nodes, options.stages, options.spare_share)
    for name, seconds in figures.items():
        print(f"{name:32} {1000 * seconds:8.2f} ms")


if __name__ == "__main__":
    main()
