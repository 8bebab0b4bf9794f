"""What one expert call costs, beside a bare round trip of the same bytes over the same kind of sockets.

    make bench-hops BENCH_ARGS="--choices 1 --rounds 40"

A stage's loop and an expert node's loop run in a process each, with their real client, service, sockets and a router
that says no more than it must. Calls go as they ship, over a link (tcp) or through a ring (ipc), and, in a run of its
own, in messages. The feed-forward network is an echo in messages, and has no hidden units in native code. Calls of one
layer follow each other, one at a time. In between, in the same process, the same bytes go to an echo and back,
blocking, with nothing around them. A call of T rows with K choices sends T rows of 1,024 bf16, and is answered T * K
rows.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import structlog
import torch
import zmq

from common.compute.native_library import load_native_kernels
from common.messages import ExpertHeartbeat, Header, Hello, PublishPlacement, StageHeartbeat, Welcome
from common.node.control_link import ControlLink, NodeAddresses
from common.node.process import NodeProcess
from common.processes.child_process import end_with_parent
from common.topology import ShardId
from common.wire.array import array_to_frame
from common.wire.endpoints import join_endpoints
from common.wire.transport import RoutingSocket, SocketLimits, Transport
from common.wire.zmq_functions import zmq_functions
from services.expert import calls
from services.expert.ring_server import LinkSocket, RingServer
from services.expert.service import ExpertService
from services.expert.shard_loader import HeldShards, ShardLoader
from services.expert.shard_store import ShardStore
from services.stage.experts.client import ExpertClient
from services.stage.experts.nodes import ExpertNodes
from services.stage.experts.rings import Rings
from services.stage.model.decoder import ExpertCall
from services.stage.model.executor import WantsExperts
from services.stage.service import StageService

LAYERS, EXPERTS, WIDTH = 1, 8, 1024
CALLS_A_ROUND = 50
WARM_UP_ROUNDS = 4
TOKEN = "bench"
LOG: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
CONFIG: Any = SimpleNamespace(num_layers=LAYERS, num_experts=EXPERTS, hidden_size=WIDTH)
WAYS = {"native": "call", "messages": "call in messages"}
KINDS = ("call", "bare round trip", "bare without copies")


def open_link(kind: str, endpoint: str, pattern: str, data: str) -> NodeProcess[Any]:
    """Returns the outside of a node; `pattern` is what it binds to, `data` the kind of its data socket."""
    transport = Transport(SocketLimits())
    socket = getattr(transport, data)("data", [pattern.format(socket=f"{kind}-data")])
    lifeline = transport.router("lifeline", [pattern.format(socket=f"{kind}-lifeline")])
    is_tcp, links = pattern.startswith("tcp://"), None
    if kind == "expert" and is_tcp:
        links = transport.router("links", [pattern])
    told = () if links is None else links.endpoints
    hello = Hello(f"{kind}-1", 1, kind, 0, "", "cpu", "", socket.endpoints, lifeline.endpoints, "", links=told)
    control = ControlLink(transport, NodeAddresses(endpoint, "", pattern), hello)
    folder = None if is_tcp else Path(pattern.removeprefix("ipc://")).parent
    return NodeProcess(transport, control, lifeline, socket, "", LOG, folder, links)


def serve_node(endpoint: str, pattern: str, choices: int) -> None:
    """An expert node that answers each row with itself, or with zeros where native code answers."""
    CONFIG.num_experts_per_token = choices
    echo: Callable[..., Any] = lambda rows, offsets, experts: rows  # noqa: E731
    vars(calls)["grouped_gated_ffn"] = echo
    node = open_link("expert", endpoint, pattern, "router")
    held = HeldShards(CONFIG, None)  # type: ignore[arg-type]
    store = held.store = ShardStore(CONFIG, 1, torch.bfloat16, None)
    memory = torch.zeros(WIDTH)
    expert: Any = SimpleNamespace(group_fields=(*[memory.data_ptr()] * 3, 0))
    store._shards = {ShardId(0, number, 0): expert for number in range(EXPERTS)}
    shards = ShardLoader(held, node.control, LOG)
    shards._weights = expert  # there is no checkpoint
    ExpertService(node, shards, rings=_open_rings(node)).run(lambda: False)


def _open_rings(node: NodeProcess[RoutingSocket]) -> RingServer:
    kernels, functions = load_native_kernels(threads=1), zmq_functions()
    assert kernels is not None
    assert functions is not None
    links = None if node.links is None else LinkSocket(node.links, functions)
    return RingServer(node.rings_folder, node.control.hello.node_id, 1, kernels, LOG, links=links)


def serve_bare(endpoint: str, answer_bytes: int) -> None:
    """Answers whatever comes with so many bytes; what comes as two frames, without copying."""
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.bind(endpoint)
    print(socket.getsockopt_string(zmq.LAST_ENDPOINT), flush=True)
    answer = bytes(answer_bytes)
    while True:
        sender, *question = socket.recv_multipart(copy=False)
        if len(question) == 1:
            socket.send_multipart([sender.bytes, answer])
        else:
            socket.send_multipart([sender, b"", answer], copy=False)


class Rounds:
    """In place of an executor: wants one call after the other, and goes to the bare echo in between."""

    def __init__(self, call: ExpertCall, bare: zmq.Socket[bytes], num_rounds: int) -> None:
        self.times_us: dict[str, list[float]] = {kind: [] for kind in KINDS}
        """A median a round."""
        self.has_work = True
        self.num_running = 0
        self._call, self._bare, self._num_rounds = call, bare, num_rounds
        self._question = bytes(call.hidden.numel() * 2)
        self._running: Any = SimpleNamespace(
            header=Header(1, 2, 0, 4, trace="0/4"),
            deadline_s=float("inf"),
            degraded_rows=set(),
            is_mixed=False,
            num_retried_calls=0,
        )
        self._began_s = 0.0
        self._round: list[float] = []

    def run_one(self) -> WantsExperts:
        if len(self._round) == CALLS_A_ROUND:
            self._end_round()
        self.has_work = False
        self._began_s = time.perf_counter()
        return WantsExperts(self._running, self._call)

    def resume(self, running: Any, answer: Any) -> None:
        self._round.append((time.perf_counter() - self._began_s) * 1e6)
        self.has_work = True

    def drop(self, running: Any) -> None:
        raise SystemExit("a call has failed")

    def _end_round(self) -> None:
        self.times_us["call"].append(median(self._round))
        self._round.clear()
        self.times_us["bare round trip"].append(self._time_bare(self._copying))
        self.times_us["bare without copies"].append(self._time_bare(self._without_copies))
        if len(self.times_us["call"]) == self._num_rounds + WARM_UP_ROUNDS:
            raise StopIteration

    def _time_bare(self, ask: Callable[[], object]) -> float:
        times_us = []
        for _ in range(CALLS_A_ROUND):
            began_s = time.perf_counter()
            ask()
            times_us.append((time.perf_counter() - began_s) * 1e6)
        return median(times_us)

    def _copying(self) -> None:
        self._bare.send(self._question)
        self._bare.recv()

    def _without_copies(self) -> None:
        self._bare.send_multipart([b"", self._question], copy=False)
        self._bare.recv_multipart(copy=False)


def serve_stage(
    endpoint: str, pattern: str, bare_endpoint: str, rows: int, choices: int, rounds: int, way: str
) -> None:
    """Prints, for each kind of round trip, the median of the rounds' medians and the fastest round."""
    node = open_link("stage", endpoint, pattern, "pull")
    nodes = ExpertNodes(node.transport, TOKEN, EXPERTS, LOG)
    kernels = load_native_kernels(threads=1)
    assert kernels is not None
    rings = Rings(nodes, node.rings_folder, zmq_functions(), kernels, WIDTH, LOG) if way == "native" else None
    experts = ExpertClient(nodes, LOG, rings, kernels)
    bare = zmq.Context().socket(zmq.DEALER)
    bare.connect(bare_endpoint)
    generator = torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:choices] for _ in range(rows)])
    hidden = torch.randn((rows, WIDTH), generator=generator).to(torch.bfloat16)
    executor = Rounds(ExpertCall(0, hidden, chosen, torch.rand((rows, choices))), bare, rounds)
    worker: Any = SimpleNamespace(
        poll=lambda: None,
        grow=lambda: None,
        waits_for_quiet=False,
        mirror=None,
        slot=None,
        lease_term=0,
        layers=SimpleNamespace(ranks=None),
        state_of=lambda number: "",
    )
    service = StageService(node, worker, experts)
    held: Any = SimpleNamespace(watermark=SimpleNamespace(mark=0), tier=SimpleNamespace(since=0, num_slots=0))

    def should_stop() -> bool:
        if len(executor.times_us["call"]) >= WARM_UP_ROUNDS and not bytes_before:
            bytes_before.append(nodes.bytes_sent)
        if worker.slot is None and any(node.connected for node in experts.nodes):
            worker.slot = SimpleNamespace(executor=executor, held=held, takes_steps=False, untold=None)
        return False

    bytes_before: list[int] = []
    try:
        service.run(should_stop)
    except StopIteration:
        pass
    if rings is not None and nodes.bytes_sent > bytes_before[0]:
        raise SystemExit("calls went as messages")
    for kind, times_us in executor.times_us.items():
        kind = WAYS[way] if kind == "call" else kind
        print(f"{kind}|{median(times_us[WARM_UP_ROUNDS:])}|{min(times_us[WARM_UP_ROUNDS:])}", flush=True)


def start(*arguments: object) -> subprocess.Popen[str]:
    """Starts this module in another role."""
    parent = os.getpid()
    return subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.expert_hop", "--as", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: end_with_parent(parent),
    )


def run(pattern: str, rows: int, choices: int, rounds: int, way: str) -> dict[str, tuple[float, float]]:
    """Returns median and fastest round in microseconds by kind of round trip; `pattern` is what is bound to."""
    transport = Transport(SocketLimits())
    router = transport.router("control", [pattern.format(socket="control")])
    others = [start("node", router.endpoints[0], pattern, choices)]
    others.append(start("bare", pattern.format(socket="bare"), rows * choices * WIDTH * 2))
    assert others[1].stdout is not None
    bare_endpoint = others[1].stdout.readline().strip()
    stage: subprocess.Popen[str] | None = None
    try:
        while stage is None or stage.poll() is None:
            if any(other.poll() is not None for other in others if other is not stage):
                raise RuntimeError("the node or the bare echo has ended before the stage")
            router.raw.poll(100)
            while (received := router.receive()) is not None:
                identity, message, _ = received
                if isinstance(message, ExpertHeartbeat | StageHeartbeat) or not isinstance(message, Hello):
                    continue
                router.send(identity, Welcome(250, "bfloat16", "exact", 32, 1, 10_000), Header(router_term=1))
                if message.node_kind == "expert":
                    placement = _placement(message)
                    stage = start("stage", router.endpoints[0], pattern, bare_endpoint, rows, choices, rounds, way)
                    others.append(stage)
                else:
                    router.send(identity, placement, Header(router_term=1))
    finally:
        for other in others:
            other.kill()
        transport.close()
    assert stage.stdout is not None
    with ExitStack() as pipes:
        for other in others:
            pipes.enter_context(other)
        lines = [line.split("|") for line in stage.stdout.read().splitlines() if line.count("|") == 2]  # and no log
    return {kind: (float(middle), float(fastest)) for kind, middle, fastest in lines}


def _placement(expert: Hello) -> PublishPlacement:
    owners = array_to_frame(np.ones((1, LAYERS, EXPERTS, 1), dtype=np.int32))
    names, incarnations, links = (expert.node_id,), (expert.incarnation,), (join_endpoints(expert.links),)
    return PublishPlacement(1, names, incarnations, (expert.endpoints[0],), (TOKEN,), ("cpu",), owners, links=links)


def main() -> None:
    """Prints a table: a line a kind of round trip, with its share of the bare one."""
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--as"]:
        role, *arguments = sys.argv[2:]
        if role == "stage":
            endpoint, pattern, bare_endpoint, *numbers, way = arguments
            rows, choices, rounds = map(int, numbers)
            serve_stage(endpoint, pattern, bare_endpoint, rows, choices, rounds, way)
        elif role == "node":
            serve_node(arguments[0], arguments[1], int(arguments[2]))
        else:
            serve_bare(arguments[0], int(arguments[1]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--choices", type=int, default=1, help="experts of each row")
    parser.add_argument("--rounds", type=int, default=40, help=f"of {CALLS_A_ROUND} round trips of each kind")
    parsed = parser.parse_args()
    print("| link | round trip | p50 us | fastest round us | of the bare one |\n| --- | --- | --- | --- | --- |")
    for link, way in itertools.product(("tcp", "ipc"), WAYS):
        with tempfile.TemporaryDirectory() as folder:
            pattern = "tcp://127.0.0.1:*" if link == "tcp" else f"ipc://{folder}/{{socket}}"
            found = run(pattern, parsed.rows, parsed.choices, parsed.rounds, way)
        bare_us = found["bare round trip"][0]
        for kind, (middle_us, fastest_us) in found.items():
            print(f"| {link} | {kind} | {middle_us:.0f} | {fastest_us:.0f} | {middle_us / bare_us:.2f} |", flush=True)


if __name__ == "__main__":
    main()
