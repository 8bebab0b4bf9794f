"""Times the mesh and other engines on the same weights, with one client, each alone, in turn.

    make bench-peers
    make bench-peers BENCH_ARGS="--quick --peers llama.cpp vllm"

Sets up the peers that are missing, each in an environment of its own below state/peers; that takes some GB and, for
llama.cpp, a build. A peer that cannot be set up or fails is named with the reason, and the others run. Writes a table,
a plot and all figures. Nothing here fails because something was slow.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.benchmarks.machine import describe_machine
from tests.benchmarks.make_bench_model import SIZES, make_bench_model
from tests.benchmarks.peers.contenders import PEERS, AbsentError, Contender, mesh_contender, peer_contender
from tests.benchmarks.peers.engines import Engine
from tests.benchmarks.peers.report import PeersReport, write_report
from tests.benchmarks.peers.sitting import Load, Sitting, columns_of, sit
from tests.benchmarks.rates import best_rates, measure_rates
from tests.benchmarks.serve_benchmark import PromptSource

WAYS_TO_FAIL = (RuntimeError, OSError, EOFError, httpx.HTTPError)


@dataclass(frozen=True)
class Plan:
    """What is run."""

    model: str
    peers: tuple[str, ...]
    meshes: tuple[dict[str, str], ...]
    """Settings, one mesh each."""
    load: Load
    rounds: int
    time_limit_s: float
    """No round begins that would end later, set-up not counted; the first one always runs."""
    peers_dir: Path
    models_dir: Path
    output_dir: Path


def run(plan: Plan) -> PeersReport:
    """A B C, A B C: drift of the machine meets all."""
    checkpoint = make_bench_model(plan.models_dir / f"{plan.model}-bfloat16", plan.model, "bfloat16")
    contenders, absent = _assemble(plan, checkpoint)
    machine, measured, started_s = describe_machine(), [], time.monotonic()
    source = PromptSource(SIZES[plan.model].vocabulary)
    sittings: dict[str, list[Sitting]] = {}
    for number in range(plan.rounds):
        elapsed_s = time.monotonic() - started_s
        if number and elapsed_s * (number + 1) / number > plan.time_limit_s:
            print(f"{number} rounds took {elapsed_s / 60:.0f} minutes: no time for another one", flush=True)
            break
        measured.append(measure_rates())
        for contender in [each for each in contenders if each.name not in absent]:
            try:
                with contender.start() as engine:
                    sitting = sit(engine, source, plan.load)
            except WAYS_TO_FAIL as failure:
                absent[contender.name] = f"failed in round {number + 1}: {failure}"
                print(f"{contender.name}: {absent[contender.name]}", flush=True)
                continue
            sittings.setdefault(contender.name, []).append(sitting)
            print(f"round {number + 1}: {contender.name}: {_in_short(sitting, plan.load)}", flush=True)
    return PeersReport(
        machine=machine,
        rates=best_rates(measured),
        model=plan.model,
        load=plan.load,
        contenders=[each for each in contenders if each.name in sittings],
        sittings=sittings,
        absent=absent,
        minutes=(time.monotonic() - started_s) / 60,
    )


def _assemble(plan: Plan, checkpoint: Path) -> tuple[list[Contender[Engine]], dict[str, str]]:
    contenders: list[Contender[Engine]] = [mesh_contender(checkpoint, settings) for settings in plan.meshes]
    absent = {}
    for name in plan.peers:
        try:
            contenders.append(peer_contender(name, checkpoint, plan.peers_dir))
        except AbsentError as reason:
            absent[name] = str(reason)
            print(f"{name}: {reason}", flush=True)
    return contenders, absent


def _in_short(sitting: Sitting, load: Load) -> str:
    return ", ".join(f"{key} {figure:.0f}" for key, figure in columns_of([sitting], load).items())


def parse_plan(arguments: Sequence[str] | None) -> Plan:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers", description=__doc__)
    parser.add_argument("--model", choices=sorted(SIZES), default="bench")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--mesh",
        action="append",
        metavar="NAME=VALUE,...",
        help="one mesh with these settings; several times for several; default: the defaults, and PP=1",
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--answer-tokens", type=int, default=96, help="2 or more")
    parser.add_argument("--prefill-tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of short answers: does everything run?")
    parser.add_argument("--time-limit-s", type=float, default=2000)
    parser.add_argument("--peers-dir", type=Path, default=Path("state/peers"))
    parser.add_argument("--models-dir", type=Path, default=Path("state/bench-models"))
    parser.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"))
    parsed = parser.parse_args(arguments)
    if min(parsed.answer_tokens - 1, parsed.rounds, *parsed.concurrency) < 1:
        parser.error("--answer-tokens must be 2 or more, --rounds and --concurrency 1 or more")
    return Plan(
        model=parsed.model,
        peers=tuple(parsed.peers),
        meshes=tuple(parse_settings(words) for words in parsed.mesh or ("", "PP=1")),
        load=Load(
            concurrencies=tuple(parsed.concurrency),
            prompt_tokens=parsed.prompt_tokens,
            answer_tokens=min(parsed.answer_tokens, 16) if parsed.quick else parsed.answer_tokens,
            prefill_tokens=tuple(parsed.prefill_tokens),
            prefill_tries=1 if parsed.quick else 3,
            crowd=16,
            crowd_prompt_tokens=512,
            crowd_answer_tokens=2 if parsed.quick else 32,
        ),
        rounds=1 if parsed.quick else parsed.rounds,
        time_limit_s=parsed.time_limit_s,
        peers_dir=parsed.peers_dir,
        models_dir=parsed.models_dir,
        output_dir=parsed.output_dir,
    )


def parse_settings(words: str) -> dict[str, str]:
    """Returns `A=1,B=2` as a mapping; of no words, an empty one. Raises ValueError."""
    return dict(_pair(word) for word in words.split(",") if word)


def _pair(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not (name and equals):
        raise ValueError(f"{word!r} is no NAME=VALUE")
    return name, value


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the page and what was written."""
    # Servers have sessions of their own: whoever ends this process ends them by its `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    plan = parse_plan(arguments)
    paths = write_report(run(plan), plan.output_dir)
    print(paths[1].read_text())
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
