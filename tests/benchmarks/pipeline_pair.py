"""Two pipelines beside one: tokens a second over what bandwidth allows, and how long first tokens take.

A pipeline has a core to itself (its stage and its expert node are pinned to it) and one request in flight. Two clients
send requests one by one, so that one pipeline keeps the second client waiting, and two do not.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from common.processes.supervisor import LocalMesh
from tests.benchmarks.limits import decode_limit
from tests.benchmarks.make_bench_model import SIZES
from tests.benchmarks.peers.sitting import percentile_95
from tests.benchmarks.rates import best_rates, measure_rates
from tests.benchmarks.serve_benchmark import READY_WITHIN_S, PromptSource
from tests.benchmarks.streaming_client import StreamTimes, run_clients

CLIENTS = 2
PROMPT_TOKENS = 100
ANSWER_TOKENS = 64
SERVED_NAME = "pair"
ONE_IN_FLIGHT = {"PP": "1", "SPARES": "0", "MICRO_BATCHES": "1", "MAX_BATCH_SEQUENCES": "1"}


@dataclass(frozen=True)
class PipelineFigures:
    """A number of pipelines under the same load."""

    pipelines: int
    tokens_per_s: float
    """Of both clients, prompts included."""
    allowed_tokens_per_s: float
    """If decoding took as long as its weights take to be read by as many cores."""
    ttft_p95_ms: float

    @property
    def share(self) -> float:
        return self.tokens_per_s / self.allowed_tokens_per_s


def measure_pair(model: str, checkpoint: Path, requests: int, rounds: int) -> tuple[PipelineFigures, PipelineFigures]:
    """Returns those of one pipeline and of two, in turn in each round; `requests` of each client and round.

    Raises RuntimeError if there are fewer than two cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < CLIENTS:
        raise RuntimeError("two pipelines with a core each need two cores")
    source = PromptSource(SIZES[model].vocabulary)
    found: dict[int, list[tuple[float, list[float]]]] = {1: [], 2: []}
    measured = []
    for _ in range(rounds):
        measured.append(measure_rates())
        for pipelines, runs in found.items():
            runs.append(_run(checkpoint, cores[:pipelines], source, requests))
    rates = best_rates(measured)
    bandwidths = {1: rates.read_bytes_per_s, 2: rates.read_bytes_per_s_all}
    one, two = (
        PipelineFigures(
            pipelines=pipelines,
            tokens_per_s=statistics.median(tokens_per_s for tokens_per_s, _ in runs),
            # Each reads the weights of its own stream.
            allowed_tokens_per_s=decode_limit(SIZES[model], 1, bandwidths[pipelines]),
            ttft_p95_ms=1000 * percentile_95([wait_s for _, waits_s in runs for wait_s in waits_s]),
        )
        for pipelines, runs in found.items()
    )
    return one, two


def _run(checkpoint: Path, cores: Sequence[int], source: PromptSource, requests: int) -> tuple[float, list[float]]:
    """Returns tokens a second, and the seconds to each first token."""
    state_dir = Path(tempfile.mkdtemp(prefix="pair-"))
    settings = {"MODEL": str(checkpoint), "PORT": "0", "SERVED_NAME": SERVED_NAME, **ONE_IN_FLIGHT}
    nodes = {"STAGES": str(len(cores)), "EXPERTS": str(len(cores))}
    try:
        with LocalMesh(settings | nodes, state_dir) as mesh:
            mesh.wait_ready(READY_WITHIN_S)
            _pin(mesh, cores)
            _ask(mesh, source, 1)
            streams = _ask(mesh, source, requests)
    finally:
        shutil.rmtree(state_dir, ignore_errors=True)
    seconds = max(stream.arrivals[-1][0] for stream in streams) - min(stream.sent_s for stream in streams)
    tokens = sum(stream.num_tokens for stream in streams)
    return tokens / seconds, [stream.arrivals[0][0] - stream.sent_s for stream in streams]


def _pin(mesh: LocalMesh, cores: Sequence[int]) -> None:
    """Stage and expert node of the same number to the same core, with all their threads."""
    for name, pid in mesh.processes():
        service, _, number = name.rpartition("-")
        if service in ("stage", "expert"):
            for thread in (Path("/proc") / str(pid) / "task").iterdir():
                os.sched_setaffinity(int(thread.name), {cores[int(number) % len(cores)]})


def _ask(mesh: LocalMesh, source: PromptSource, requests: int) -> tuple[StreamTimes, ...]:
    address, seeds = urlsplit(mesh.url), itertools.count()
    common = {"model": SERVED_NAME, "max_tokens": ANSWER_TOKENS, "temperature": 1.0, "ignore_eos": True}
    bodies = [
        [common | {"prompt": prompt, "seed": next(seeds)} for prompt in source.take(requests, PROMPT_TOKENS)]
        for _ in range(CLIENTS)
    ]
    return asyncio.run(run_clients(address.hostname or "127.0.0.1", address.port or 80, bodies)).streams


def describe(one: PipelineFigures, two: PipelineFigures) -> Sequence[str]:
    """Returns sentences."""
    speedup, allowed = two.tokens_per_s / one.tokens_per_s, two.allowed_tokens_per_s / one.allowed_tokens_per_s
    return (
        f"One pipeline on one core: {one.tokens_per_s:.1f} tokens/s, {one.share:.0%} of what its bandwidth "
        f"allows; TTFT p95 {one.ttft_p95_ms:.0f} ms.",
        f"Two pipelines on two cores: {two.tokens_per_s:.1f} tokens/s, {two.share:.0%}; "
        f"TTFT p95 {two.ttft_p95_ms:.0f} ms.",
        f"Two are {speedup:.2f} times as fast as one; the bandwidths of two threads and one allow {allowed:.2f}.",
    )
