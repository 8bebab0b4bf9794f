"""Conversations as agents have them, on the mesh and on other engines that keep prompts, each alone, in turn.

    make bench-agents
    make bench-agents BENCH_ARGS="--quick --peers vllm"

All begin with one system prompt, go on at the same time, and send everything that was said with each turn. A mesh
without its prefix cache plays them too. An engine that takes longer than `--time-limit-s` for a round is stopped there.
Writes a table, a plot and all figures. Nothing here fails because something was slow.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.agents.contenders import PEERS, caching_contender
from tests.benchmarks.agents.conversations import Traffic, draw_conversations
from tests.benchmarks.agents.figures import WHOLE, columns_of
from tests.benchmarks.agents.playing import Played, play
from tests.benchmarks.agents.report import AgentsReport, write_report
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.make_bench_model import SIZES, make_bench_model
from tests.benchmarks.peers.__main__ import WAYS_TO_FAIL, parse_settings
from tests.benchmarks.peers.contenders import AbsentError, Contender, mesh_contender
from tests.benchmarks.peers.engines import HttpEngine
from tests.benchmarks.rates import best_rates, measure_rates
from tests.benchmarks.serve_benchmark import PromptSource

WARM_UP_PROMPT_TOKENS = 256
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Plan:
    """What is run."""

    model: str
    peers: tuple[str, ...]
    meshes: tuple[dict[str, str], ...]
    """Settings, one mesh each."""
    traffic: Traffic
    rounds: int
    time_limit_s: float
    """Of one engine in one round, without its start."""
    peers_dir: Path
    models_dir: Path
    output_dir: Path


def run(plan: Plan) -> AgentsReport:
    """A B C, A B C; each round has conversations of its own."""
    checkpoint = make_bench_model(plan.models_dir / f"{plan.model}-bfloat16", plan.model, "bfloat16")
    contenders, absent = _assemble(plan, checkpoint)
    machine, measured, started_s = describe_machine(), [], time.monotonic()
    played: dict[str, list[Played]] = {}
    for number in range(plan.rounds):
        measured.append(measure_rates())
        for contender in [each for each in contenders if each.name not in absent]:
            try:
                found = _sit(contender, plan, number)
            except WAYS_TO_FAIL as failure:
                absent[contender.name] = f"failed in round {number + 1}: {failure}"
                print(f"{contender.name}: {absent[contender.name]}", flush=True)
                continue
            played.setdefault(contender.name, []).append(found)
            figures = columns_of([found], plan.traffic)
            words = ", ".join(f"{key} {figures[key]:.0f}" for key in WHOLE)
            print(f"round {number + 1}: {contender.name}: {words}", flush=True)
    return AgentsReport(
        machine=machine,
        rates=best_rates(measured),
        model=plan.model,
        traffic=plan.traffic,
        time_limit_s=plan.time_limit_s,
        contenders=[each for each in contenders if each.name in played],
        played=played,
        absent=absent,
        minutes=(time.monotonic() - started_s) / 60,
    )


def _sit(contender: Contender[HttpEngine], plan: Plan, number: int) -> Played:
    vocabulary = SIZES[plan.model].vocabulary
    # A seed of its own: the warm-up must not draw the same tokens.
    conversations = draw_conversations(plan.traffic, vocabulary, random.Random(f"conversations of round {number}"))
    with contender.start() as engine:
        prompts = PromptSource(vocabulary).take(plan.traffic.conversations, WARM_UP_PROMPT_TOKENS)
        engine.run_round(prompts, WARM_UP_TOKENS)
        return asyncio.run(play(engine, conversations, plan.time_limit_s))


def _assemble(plan: Plan, checkpoint: Path) -> tuple[list[Contender[HttpEngine]], dict[str, str]]:
    contenders = [mesh_contender(checkpoint, settings) for settings in plan.meshes]
    absent = {}
    for name in plan.peers:
        try:
            contenders.append(caching_contender(name, checkpoint, plan.peers_dir, plan.traffic))
        except AbsentError as reason:
            absent[name] = str(reason)
            print(f"{name}: {reason}", flush=True)
    return contenders, absent


def parse_plan(arguments: Sequence[str] | None) -> Plan:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.agents", description=__doc__)
    parser.add_argument("--model", choices=sorted(SIZES), default="bench")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--mesh",
        action="append",
        metavar="NAME=VALUE,...",
        help="one mesh with these settings; several times for several; default: the defaults, and PREFIX_CACHE=off",
    )
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--system-tokens", type=int, default=4000)
    parser.add_argument("--message-tokens", type=int, nargs=2, default=[60, 200], metavar=("LEAST", "MOST"))
    parser.add_argument("--answer-tokens", type=int, nargs=2, default=[40, 60], metavar=("LEAST", "MOST"))
    parser.add_argument("--think-s", type=float, nargs=2, default=[0.2, 1.0], metavar=("LEAST", "MOST"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--time-limit-s", type=float, default=240, help="of one engine in one round")
    parser.add_argument("--quick", action="store_true", help="two turns: does everything run?")
    parser.add_argument("--peers-dir", type=Path, default=Path("state/peers"))
    parser.add_argument("--models-dir", type=Path, default=Path("state/bench-models"))
    parser.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"))
    parsed = parser.parse_args(arguments)
    if (
        min(parsed.conversations, parsed.turns, parsed.rounds, parsed.message_tokens[0], parsed.answer_tokens[0] - 1)
        < 1
    ):
        parser.error("answers need 2 tokens or more, and there is 1 or more of everything else")
    for least, most in (parsed.message_tokens, parsed.answer_tokens, parsed.think_s):
        if least > most:
            parser.error(f"{least} is more than {most}")
    return Plan(
        model=parsed.model,
        peers=tuple(parsed.peers),
        meshes=tuple(parse_settings(words) for words in parsed.mesh or ("", "PREFIX_CACHE=off")),
        traffic=Traffic(
            conversations=parsed.conversations,
            turns=2 if parsed.quick else parsed.turns,
            system_tokens=parsed.system_tokens,
            message_tokens=(parsed.message_tokens[0], parsed.message_tokens[1]),
            answer_tokens=(parsed.answer_tokens[0], parsed.answer_tokens[1]),
            think_s=(parsed.think_s[0], parsed.think_s[1]),
        ),
        rounds=1 if parsed.quick else parsed.rounds,
        time_limit_s=parsed.time_limit_s,
        peers_dir=parsed.peers_dir,
        models_dir=parsed.models_dir,
        output_dir=parsed.output_dir,
    )


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
