"""Two pipelines beside one: tokens a second over what bandwidth allows, and how long first tokens take.

A pipeline has a core to itself (its stage and its expert node are pinned to it) and one request in flight. Two clients
send requests one by one, so that one pipeline keeps the second client waiting, and two do not. How long first tokens
take is held against one pipeline that has one client: it keeps nobody waiting, either.
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
ONE_CORE = {"THREADS": "1"}
"""`auto` would count all cores: processes are pinned when they have started."""
SPEED_GOAL = 0.85
"""Of the speedup that the bandwidths allow."""
TTFT_GOAL = 1.1
"""Times that of one alone."""


@dataclass(frozen=True)
class PipelineFigures:
    """A number of pipelines under a load."""

    pipelines: int
    clients: int
    tokens_per_s: float
    """Of all clients, prompts included."""
    allowed_tokens_per_s: float
    """If decoding took as long as its weights take to be read by as many cores."""
    ttft_p95_ms: float

    @property
    def share(self) -> float:
        return self.tokens_per_s / self.allowed_tokens_per_s


@dataclass(frozen=True)
class PairFigures:
    """Two pipelines and what they are held against."""

    alone: PipelineFigures
    """One with one client."""
    one: PipelineFigures
    """One with the clients of two."""
    two: PipelineFigures

    @property
    def speedup(self) -> float:
        return self.two.tokens_per_s / self.one.tokens_per_s

    @property
    def allowed_speedup(self) -> float:
        """The bandwidth of all cores over that of one."""
        return self.two.allowed_tokens_per_s / self.one.allowed_tokens_per_s

    @property
    def ttft_ratio(self) -> float:
        return self.two.ttft_p95_ms / self.alone.ttft_p95_ms


def measure_pair(model: str, checkpoint: Path, requests: int, rounds: int) -> PairFigures:
    """All three in turn in each round; `requests` of each client and round.

    Raises RuntimeError if there are fewer than two cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < CLIENTS:
        raise RuntimeError("two pipelines with a core each need two cores")
    source = PromptSource(SIZES[model].vocabulary)
    loads = ((1, 1), (1, CLIENTS), (2, CLIENTS))
    found: dict[tuple[int, int], list[tuple[float, list[float]]]] = {load: [] for load in loads}
    measured = []
    for _ in range(rounds):
        measured.append(measure_rates())
        for (pipelines, clients), runs in found.items():
            runs.append(_run(checkpoint, cores[:pipelines], clients, source, requests))
    rates = best_rates(measured)
    bandwidths = {1: rates.read_bytes_per_s, 2: rates.read_bytes_per_s_all}
    alone, one, two = (
        PipelineFigures(
            pipelines=pipelines,
            clients=clients,
            tokens_per_s=statistics.median(tokens_per_s for tokens_per_s, _ in runs),
            # Each reads the weights of its own stream.
            allowed_tokens_per_s=decode_limit(SIZES[model], 1, bandwidths[pipelines]),
            ttft_p95_ms=1000 * percentile_95([wait_s for _, waits_s in runs for wait_s in waits_s]),
        )
        for (pipelines, clients), runs in found.items()
    )
    return PairFigures(alone, one, two)


def _run(
    checkpoint: Path, cores: Sequence[int], clients: int, source: PromptSource, requests: int
) -> tuple[float, list[float]]:
    """Returns tokens a second, and the seconds to each first token."""
    state_dir = Path(tempfile.mkdtemp(prefix="pair-"))
    settings = {"MODEL": str(checkpoint), "PORT": "0", "SERVED_NAME": SERVED_NAME, **ONE_IN_FLIGHT, **ONE_CORE}
    nodes = {"STAGES": str(len(cores)), "EXPERTS": str(len(cores))}
    try:
        with LocalMesh(settings | nodes, state_dir) as mesh:
            mesh.wait_ready(READY_WITHIN_S)
            _pin(mesh, cores)
            _ask(mesh, source, clients, 1)
            streams = _ask(mesh, source, clients, requests)
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


def _ask(mesh: LocalMesh, source: PromptSource, clients: int, requests: int) -> tuple[StreamTimes, ...]:
    address, seeds = urlsplit(mesh.url), itertools.count()
    common = {"model": SERVED_NAME, "max_tokens": ANSWER_TOKENS, "temperature": 1.0, "ignore_eos": True}
    bodies = [
        [common | {"prompt": prompt, "seed": next(seeds)} for prompt in source.take(requests, PROMPT_TOKENS)]
        for _ in range(clients)
    ]
    return asyncio.run(run_clients(address.hostname or "127.0.0.1", address.port or 80, bodies)).streams


def describe(pair: PairFigures) -> Sequence[str]:
    """Returns sentences."""
    speed_share = pair.speedup / pair.allowed_speedup
    return (
        *(
            f"{_counted(figures.pipelines, 'pipeline')} with {_counted(figures.clients, 'client')}: "
            f"{figures.tokens_per_s:.1f} tokens/s, {figures.share:.0%} of what the bandwidth allows; TTFT p95 "
            f"{figures.ttft_p95_ms:.0f} ms."
            for figures in (pair.alone, pair.one, pair.two)
        ),
        f"Two pipelines are {pair.speedup:.2f} times as fast as one; the bandwidths of two threads and one allow "
        f"{pair.allowed_speedup:.2f}. That is {speed_share:.2f} of it; the goal of {SPEED_GOAL} is "
        f"{_met(speed_share >= SPEED_GOAL)}.",
        f"Their TTFT p95 is {pair.ttft_ratio:.2f} times that of one alone; the goal of {TTFT_GOAL} is "
        f"{_met(pair.ttft_ratio <= TTFT_GOAL)}.",
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _met(is_met: bool) -> str:
    return "met" if is_met else "not met"
