"""What each safety feature costs: meshes that differ in one setting, measured in turn on the same machine.

    make bench-safety BENCH_ARGS="--rounds 5"

Each round starts every variant once and measures it alone, in an order that moves on by one each round. Prints a table
of steady tokens/s and of the median ratio to the mesh as it ships, with the rounds' lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from common.processes.supervisor import LocalMesh
from compose.demo_checkpoint import DEMO_CHECKPOINT
from tests.benchmarks.figures import round_figures
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.serve_benchmark import READY_WITHIN_S, MeshUnderTest, PromptSource

SHIPPED = "as shipped"
VARIANTS: dict[str, dict[str, str]] = {
    SHIPPED: {},
    "JOURNAL=off": {"JOURNAL": "off"},
    "JOURNAL=durable": {"JOURNAL": "durable"},
    "SPARES=2 (a mirror for each stage)": {"SPARES": "2"},
    "COMBINE=partial (order of sums not fixed)": {"COMBINE": "partial"},
}
SMALLEST_VOCABULARY = 400
"""Random prompts take ids that every model here has."""


def measure(settings: dict[str, str], model: str, streams: int, tokens: int, seed_round: int) -> float:
    """Steady tokens/s of one mesh that is started for it."""
    state_dir = Path(tempfile.mkdtemp(prefix="safety-"))
    source = PromptSource(SMALLEST_VOCABULARY)
    try:
        with LocalMesh({"MODEL": model, "PORT": "0"} | settings, state_dir) as local:
            local.wait_ready(READY_WITHIN_S)
            mesh = MeshUnderTest(local)
            mesh.run_round(source.take(streams, 32 + seed_round), 16)
            return round_figures(mesh.run_round(source.take(streams, 32), tokens).streams).steady_tokens_per_s
    finally:
        shutil.rmtree(state_dir, ignore_errors=True)


def run(model: str, streams: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Tokens/s by variant, one value a round."""
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    names = list(VARIANTS)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(measure(VARIANTS[name], model, streams, tokens, number))
            print(f"round {number + 1}: {name}: {found[name][-1]:.1f} tokens/s", flush=True)
    return found


def table(found: dict[str, list[float]]) -> str:
    """Markdown; ratios are taken within a round."""
    lines = [
        "| variant | tokens/s, median | of as shipped, median | lowest | highest |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, speeds in found.items():
        ratios = [speed / shipped for speed, shipped in zip(speeds, found[SHIPPED], strict=True)]
        lines.append(
            f"| {name} | {median(speeds):.0f} | {median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.safety_cost", description=__doc__)
    parser.add_argument("--model", default=str(DEMO_CHECKPOINT), help="folder of a checkpoint")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write JSON there")
    parsed = parser.parse_args(arguments)
    if parsed.rounds < 1 or parsed.tokens < 2 or parsed.streams < 1:
        parser.error("--rounds and --streams must be 1 or more, --tokens 2 or more")
    found = run(parsed.model, parsed.streams, parsed.tokens, parsed.rounds)
    if parsed.output:
        document = {"machine": asdict(describe_machine()), "model": parsed.model, "tokens_per_s": found}
        parsed.output.write_text(json.dumps(document, indent=2) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
