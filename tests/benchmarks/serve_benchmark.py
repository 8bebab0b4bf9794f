"""Times the mesh through HTTP beside transformers' generate() on the same weights, in turn, on the same machine.

    make bench BENCH_ARGS="--model bench --dtype bfloat16 --concurrency 1 4 16 32 --repeats 3 --set PP=1"

Writes a table, a plot and all the figures into docs/benchmarks. Nothing here fails because something was slow.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from common.processes.supervisor import LocalMesh
from tests.benchmarks.figures import RoundFigures, median, median_figures, round_figures
from tests.benchmarks.hops import HopFigures, hop_figures
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.make_bench_model import DTYPES, SIZES, make_bench_model
from tests.benchmarks.report import BenchmarkReport, LevelReport, PrefillReport, ProcessReport, write_report
from tests.benchmarks.streaming_client import StreamTimes, TimedRound, run_round
from tests.benchmarks.transformers_peer import TransformersPeer
from tests.support.processes.process_table import process_size
from tests.support.served.metrics_text import MetricsSnapshot, read_metrics

READY_WITHIN_S = 300
WARM_UP_TOKENS = 8
SETTLE_S = 0.75
"""Nodes report their counts with every heartbeat, a few a second."""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    model: str
    dtype: str
    concurrencies: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int
    prefill_tokens: tuple[int, ...]
    repeats: int
    time_limit_s: float
    """No repeat begins that would end after this; the first one always runs."""
    threads: int
    settings: dict[str, str]
    models_dir: Path
    output_dir: Path


class MeshUnderTest:
    """A mesh as its clients see it."""

    def __init__(self, local: LocalMesh) -> None:
        self.local = local
        address = urlsplit(local.url)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 80
        self._model = str(httpx.get(local.url + "/v1/models", trust_env=False).json()["data"][0]["id"])

    def run_round(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> TimedRound:
        """All prompts at once, greedy, exactly `max_tokens` tokens each."""
        common = {"model": self._model, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        timed = asyncio.run(
            run_round(self._host, self._port, [common | {"prompt": list(prompt)} for prompt in prompts])
        )
        for stream in timed.streams:
            if stream.num_tokens != max_tokens:
                raise RuntimeError(f"asked for {max_tokens} tokens, got {stream.num_tokens}")
        return timed

    def metrics(self) -> MetricsSnapshot:
        """What the mesh has counted so far, once all nodes have reported it."""
        time.sleep(SETTLE_S)
        return read_metrics(httpx.get(self.local.url + "/metrics", trust_env=False).text)


@contextmanager
def mesh_under_test(plan: Plan, checkpoint: Path) -> Iterator[MeshUnderTest]:
    """The mesh with its own defaults, but for what the plan sets."""
    state_dir = Path(tempfile.mkdtemp(prefix="moemesh-bench-"))
    environment = {"MODEL": str(checkpoint), "PORT": "0", "DTYPE": plan.dtype} | plan.settings
    try:
        with LocalMesh(environment=environment, state_dir=state_dir) as local:
            local.wait_ready(timeout_s=READY_WITHIN_S)
            yield MeshUnderTest(local)
    finally:
        shutil.rmtree(state_dir, ignore_errors=True)


class PromptSource:
    """Random prompts that no cache has seen."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._vocabulary = vocabulary

    def take(self, num_prompts: int, num_tokens: int) -> list[list[int]]:
        """Special tokens, the first few ids, are left out."""
        return [[self._random.randrange(3, self._vocabulary) for _ in range(num_tokens)] for _ in range(num_prompts)]


@dataclass
class _Level:
    """Rounds of one concurrency, as they come."""

    mesh: list[RoundFigures]
    peer: list[RoundFigures]
    client_cpu_shares: list[float]
    hops: list[HopFigures]


def run_benchmark(plan: Plan) -> BenchmarkReport:
    """A and B in turn: each repeat has every level of the mesh and of transformers, so that drift meets both."""
    machine, started_s = describe_machine(), time.monotonic()
    checkpoint = make_bench_model(plan.models_dir / f"{plan.model}-{plan.dtype}", plan.model, plan.dtype)
    source = PromptSource(SIZES[plan.model].vocabulary)
    levels = {concurrency: _Level([], [], [], []) for concurrency in plan.concurrencies}
    prefills: dict[int, tuple[list[float], list[float]]] = {length: ([], []) for length in plan.prefill_tokens}
    with mesh_under_test(plan, checkpoint) as mesh, TransformersPeer(checkpoint, plan.dtype, plan.threads) as peer:
        for concurrency in plan.concurrencies:
            warm_up = source.take(concurrency, plan.prompt_tokens)
            mesh.run_round(warm_up, WARM_UP_TOKENS)
            peer.run_round(warm_up, WARM_UP_TOKENS)
        num_repeats = 0
        while num_repeats < plan.repeats and _is_time_left(plan, started_s, num_repeats):
            num_repeats += 1
            for length, (mesh_s, peer_s) in prefills.items():
                prompts = source.take(1, length)
                mesh_s.append(_first_token_s(mesh.run_round(prompts, 1).streams))
                peer_s.append(_first_token_s(peer.run_round(prompts, 1)))
            for concurrency, level in levels.items():
                _run_level(plan, mesh, peer, source.take(concurrency, plan.prompt_tokens), level)
                _print_progress(num_repeats, concurrency, level)
        processes = [
            ProcessReport(name, process_size(pid).resident_bytes, process_size(pid).private_bytes)
            for name, pid in mesh.local.processes()
        ]
    return BenchmarkReport(
        machine=machine,
        model=plan.model,
        num_parameters=SIZES[plan.model].num_parameters,
        dtype=plan.dtype,
        settings=plan.settings,
        prompt_tokens=plan.prompt_tokens,
        max_tokens=plan.max_tokens,
        repeats=num_repeats,
        peer_threads=plan.threads,
        levels=[_level_report(concurrency, level) for concurrency, level in levels.items()],
        prefills=[PrefillReport(length, median(ours), median(theirs)) for length, (ours, theirs) in prefills.items()],
        processes=processes,
    )


def _is_time_left(plan: Plan, started_s: float, num_done: int) -> bool:
    """Counts the start as part of every repeat, which errs on the short side."""
    elapsed_s = time.monotonic() - started_s
    return num_done == 0 or elapsed_s * (num_done + 1) / num_done < plan.time_limit_s


def _run_level(
    plan: Plan, mesh: MeshUnderTest, peer: TransformersPeer, prompts: list[list[int]], level: _Level
) -> None:
    before, started_s = mesh.metrics(), time.perf_counter()
    timed = mesh.run_round(prompts, plan.max_tokens)
    wall_s = time.perf_counter() - started_s
    level.client_cpu_shares.append(timed.client_cpu_s / wall_s)
    # Of the last repeat: links differ by orders of magnitude, repeats by little.
    level.hops = hop_figures(mesh.metrics().since(before), num_tokens=len(prompts) * plan.max_tokens)
    level.mesh.append(round_figures(timed.streams))
    level.peer.append(round_figures(peer.run_round(prompts, plan.max_tokens)))


def _first_token_s(streams: Sequence[StreamTimes]) -> float:
    return streams[0].arrivals[0][0] - streams[0].sent_s


def _level_report(concurrency: int, level: _Level) -> LevelReport:
    return LevelReport(
        concurrency=concurrency,
        mesh=median_figures(level.mesh),
        transformers=median_figures(level.peer),
        mesh_rounds=level.mesh,
        transformers_rounds=level.peer,
        client_cpu_share=median(level.client_cpu_shares),
        hops=level.hops,
    )


def _print_progress(repeat: int, concurrency: int, level: _Level) -> None:
    ours, theirs = level.mesh[-1], level.peer[-1]
    print(
        f"repeat {repeat}, concurrency {concurrency:>2}: mesh {ours.steady_tokens_per_s:7.1f} tokens/s steady, "
        f"TTFT {ours.ttft_s * 1000:6.0f} ms | transformers {theirs.steady_tokens_per_s:7.1f}, "
        f"{theirs.ttft_s * 1000:6.0f} ms | client {level.client_cpu_shares[-1]:.1%} of a core",
        flush=True,
    )


def parse_plan(arguments: Sequence[str] | None) -> Plan:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(SIZES), default="bench")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of each answer; 2 or more")
    parser.add_argument(
        "--prefill-tokens", type=int, nargs="*", default=[512, 2048], help="prompts timed by themselves"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--time-limit-s", type=float, default=540, help="begin no repeat that would end later")
    parser.add_argument("--threads", type=int, default=2, help="of transformers")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the mesh")
    parser.add_argument("--models-dir", type=Path, default=Path("state/bench-models"))
    parser.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"))
    parsed = parser.parse_args(arguments)
    if parsed.max_tokens < 2 or parsed.repeats < 1:
        parser.error("--max-tokens must be 2 or more, --repeats 1 or more")
    return Plan(
        model=parsed.model,
        dtype=parsed.dtype,
        concurrencies=tuple(parsed.concurrency),
        prompt_tokens=parsed.prompt_tokens,
        max_tokens=parsed.max_tokens,
        prefill_tokens=tuple(parsed.prefill_tokens),
        repeats=parsed.repeats,
        time_limit_s=parsed.time_limit_s,
        threads=parsed.threads,
        settings=dict(setting.split("=", 1) for setting in parsed.set),
        models_dir=parsed.models_dir,
        output_dir=parsed.output_dir,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what it wrote."""
    plan = parse_plan(arguments)
    for path in write_report(run_benchmark(plan), plan.output_dir):
        print(path)
    return 0
