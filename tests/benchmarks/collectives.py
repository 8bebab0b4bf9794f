"""What one collective costs, beside torch's own Gloo all-reduce on the same sizes: no model, no mesh, only ranks.

And what a message takes from process to process, of all bytes and of one rank's share of them: hidden states that went
from each rank to a rank of the next stage would take the second and an all_gather, where they now take the first.

    make bench-collectives BENCH_ARGS="--ranks 2 --repeats 2000"

Kinds and sizes are measured in turn within each round, in one set of processes. Bytes are those of the whole that each
rank has afterwards: a sum takes a tensor of that size from each rank, a gather its part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.distributed as dist
import zmq

from common.compute.native_library import NativeKernels, load_native_kernels
from common.processes.child_process import end_with_parent
from services.stage.model.sharded_linear import Collectives
from services.stage.ranks.collectives import Barrier, ChannelCollectives
from services.stage.ranks.shared_channel import SharedChannel, SharedMemory
from services.stage.ranks.torch_collectives import TorchCollectives, open_store
from tests.benchmarks.machine import describe_machine

SLAB_BYTES = 4 << 20
SIZES_BYTES = (2 << 10, 16 << 10, 128 << 10, 1 << 20)
ROW_BYTES = 2 << 10
"""A row of a model of 512 float32 columns."""
KINDS = ("board all_gather", "board sum", "gloo all_gather", "gloo sum", "gloo all_reduce alone")
MESSAGES = ("message, whole", "message, a rank's share")
"""One way from rank 0 to rank 1: half of there and back."""


def measure(ranks: int, rank: int, memory: SharedMemory, port: int | None, repeats: int, rounds: int) -> None:
    """One rank's work; rank 0 prints microseconds by kind and size as JSON."""
    torch.set_num_threads(1)
    kernels = _kernels()
    channel = SharedChannel(memory, SLAB_BYTES, kernels)

    def wait(name: str, seat: int, value: int) -> None:
        if not channel.wait(name, seat, value, 0, 30.0):
            raise TimeoutError(f"rank {seat} does not come")

    by_channel = ChannelCollectives(channel, Barrier(channel, tuple(range(ranks)), rank, 0, wait))
    store = open_store(port)
    if port is None:
        channel.set("turn", 0, store.port)
    by_torch = TorchCollectives(store, rank, ranks)
    link = _link(rank) if rank < 2 else None
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for num_bytes in SIZES_BYTES:
            for kind in KINDS:
                call = _call(kind, num_bytes, ranks, by_channel, by_torch)
                dist.barrier()
                times_us = found.setdefault(f"{kind}|{num_bytes}", [])
                for _ in range(max(20, repeats * SIZES_BYTES[0] // num_bytes)):
                    began_s = time.perf_counter()
                    call()
                    times_us.append((time.perf_counter() - began_s) * 1e6)
            for kind, size in zip(MESSAGES, (num_bytes, num_bytes // ranks), strict=True):
                dist.barrier()
                if link is not None:
                    exchanges = max(20, repeats * SIZES_BYTES[0] // num_bytes)
                    found.setdefault(f"{kind}|{num_bytes}", []).extend(_exchange(link, rank, size, exchanges))
    dist.barrier()  # nobody closes before the last message has been read
    if link is not None:
        link.close(linger=0)
    by_torch.close()
    if rank == 0:
        print(json.dumps(found))


def _call(
    kind: str, num_bytes: int, ranks: int, by_channel: Collectives, by_torch: Collectives
) -> Callable[[], object]:
    rows, columns = max(1, num_bytes // ROW_BYTES), min(num_bytes, ROW_BYTES) // 4
    whole, part = torch.ones(rows, columns), torch.ones(rows, columns // ranks)
    if kind == "gloo all_reduce alone":
        return lambda: dist.all_reduce(whole)
    who = by_channel if kind.startswith("board") else by_torch
    return (lambda: who.sum(whole)) if kind.endswith("sum") else (lambda: who.all_gather(part))


def _link(rank: int) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    address = f"ipc://@moemesh-bench-{os.getppid()}"
    if rank == 0:
        socket.bind(address)
    else:
        socket.connect(address)
    return socket


def _exchange(link: zmq.Socket[bytes], rank: int, num_bytes: int, times: int) -> list[float]:
    message = bytes(num_bytes)
    times_us = []
    for _ in range(times):
        began_s = time.perf_counter()
        if rank == 0:
            link.send(message)
        link.recv()
        if rank == 1:
            link.send(message)
        times_us.append((time.perf_counter() - began_s) / 2 * 1e6)
    return times_us


def _kernels() -> NativeKernels:
    kernels = load_native_kernels(threads=1)
    if kernels is None:
        raise SystemExit("ranks need the native kernels: install a C++ compiler")
    return kernels


def run(ranks: int, repeats: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds by kind and size, as rank 0 saw them."""
    memory = SharedMemory.create(SharedChannel.num_bytes(SLAB_BYTES), "bench-ranks")
    channel = SharedChannel(memory, SLAB_BYTES, _kernels())
    parent = os.getpid()

    def start(rank: int, port: int) -> subprocess.Popen[str]:
        numbers = [ranks, rank, memory.descriptor, memory.num_bytes, port, repeats, rounds]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.collectives", "--as-rank", *map(str, numbers)],
            pass_fds=(memory.descriptor,),
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: end_with_parent(parent),
        )

    first = start(0, 0)
    while not (port := channel.get("turn")):
        if first.poll() is not None:
            raise SystemExit("rank 0 has ended")
        time.sleep(0.01)
    others = [start(rank, port) for rank in range(1, ranks)]
    printed, _ = first.communicate()
    for other in others:
        other.wait()
    found: dict[str, list[float]] = json.loads(printed.splitlines()[-1])  # a log may come before it
    return found


def table(found: dict[str, list[float]]) -> str:
    """Markdown: p50 and p99 in microseconds, a row a kind."""
    heads = ["collective, us p50 / p99"] + [f"{size >> 10} KiB" for size in SIZES_BYTES]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for kind in KINDS + MESSAGES:
        cells = [kind]
        for size in SIZES_BYTES:
            times_us = found[f"{kind}|{size}"]
            cells.append(f"{median(times_us):.0f} / {quantiles(times_us, n=100)[98]:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table, and keeps it with the machine's description as JSON."""
    if sys.argv[1:2] == ["--as-rank"]:
        ranks, rank, descriptor, num_bytes, port, repeats, rounds = map(int, sys.argv[2:])
        measure(ranks, rank, SharedMemory(descriptor, num_bytes), port or None, repeats, rounds)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2000, help="of the smallest size, a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parsed = parser.parse_args()
    found = run(parsed.ranks, parsed.repeats, parsed.rounds)
    text = table(found)
    print(text)
    figures = {
        name: {"p50_us": median(times_us), "p99_us": quantiles(times_us, n=100)[98], "calls": len(times_us)}
        for name, times_us in found.items()
    }
    report = {"machine": asdict(describe_machine()), "ranks": parsed.ranks, "figures": figures}
    path = parsed.output / f"collectives-{parsed.ranks}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
