"""What layers in a row (PP) and ranks side by side (TP) are worth on one machine.

    make bench-parallel BENCH_ARGS="--rounds 3"

Each round starts every shape once and measures it alone, in an order that moves on by one each round. Writes a table, a
plot and all figures into docs/benchmarks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from common.processes.supervisor import LocalMesh
from tests.benchmarks.figures import round_figures
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.make_bench_model import SIZES, make_bench_model
from tests.benchmarks.serve_benchmark import READY_WITHIN_S, MeshUnderTest, PromptSource
from tests.support.served.metrics_text import MetricsSnapshot

SHAPES: dict[str, dict[str, str]] = {
    "PP 1, TP 1": {"PP": "1", "TP": "1"},
    "PP 2, TP 1": {"PP": "2", "TP": "1"},
    "PP 1, TP 2": {"PP": "1", "TP": "2"},
    "PP 1, TP 2, fast": {"PP": "1", "TP": "2", "TP_REDUCE": "fast"},
    "PP 1, TP 2, gloo": {"PP": "1", "TP": "2", "TP_COLLECTIVES": "gloo"},
    "PP 2, TP 2": {"PP": "2", "TP": "2"},
    "PP 1, TP 4": {"PP": "1", "TP": "4"},
}
PREFILLS = (128, 2048)
CONCURRENCIES = (1, 4, 16)
PROMPT_TOKENS = 128
REDUCES = "moemesh_tp_reduce_seconds"


@dataclass(frozen=True)
class ShapeFigures:
    """One shape in one round."""

    ttft_s: dict[int, list[float]]
    """By prompt length, one value a prompt."""
    tpot_ms: dict[int, float]
    """By concurrency."""
    tokens_per_s: dict[int, float]
    reduce_us: float
    """Mean of one collective while tokens were made, by the first rank; 0 without ranks."""


def measure(settings: dict[str, str], model: str, checkpoint: Path, tokens: int, prompts: int) -> ShapeFigures:
    """A mesh that is started for it."""
    state_dir = Path(tempfile.mkdtemp(prefix="parallel-"))
    source = PromptSource(SIZES[model].vocabulary)
    try:
        with LocalMesh({"MODEL": str(checkpoint), "PORT": "0"} | settings, state_dir) as local:
            local.wait_ready(READY_WITHIN_S)
            mesh = MeshUnderTest(local)
            mesh.run_round(source.take(4, PROMPT_TOKENS), 16)
            ttft_s = {
                length: [_first_token_s(mesh, source.take(1, length)) for _ in range(prompts)] for length in PREFILLS
            }
            before = mesh.metrics()
            rounds = {
                count: round_figures(mesh.run_round(source.take(count, PROMPT_TOKENS), tokens).streams)
                for count in CONCURRENCIES
            }
            return ShapeFigures(
                ttft_s,
                {count: figures.tpot_s * 1000 for count, figures in rounds.items()},
                {count: figures.steady_tokens_per_s for count, figures in rounds.items()},
                _mean_reduce_us(mesh.metrics().since(before)),
            )
    finally:
        shutil.rmtree(state_dir, ignore_errors=True)


def _first_token_s(mesh: MeshUnderTest, prompts: list[list[int]]) -> float:
    (stream,) = mesh.run_round(prompts, 1).streams
    return stream.arrivals[0][0] - stream.sent_s


def _mean_reduce_us(spent: MetricsSnapshot) -> float:
    count = spent.value(f"{REDUCES}_count")
    return spent.value(f"{REDUCES}_sum") / count * 1e6 if count else 0.0


def run(parsed: argparse.Namespace) -> dict[str, list[ShapeFigures]]:
    """By shape, one entry a round."""
    checkpoint = make_bench_model(parsed.models_dir / f"{parsed.model}-{parsed.dtype}", parsed.model, parsed.dtype)
    names = [name for name in SHAPES if not parsed.shapes or name in parsed.shapes]
    found: dict[str, list[ShapeFigures]] = {name: [] for name in names}
    for number in range(parsed.rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            figures = measure(SHAPES[name], parsed.model, checkpoint, parsed.tokens, parsed.prompts)
            found[name].append(figures)
            print(f"round {number + 1}: {name}: {figures.tokens_per_s}", flush=True)
    return found


def table(found: dict[str, list[ShapeFigures]]) -> str:
    """Markdown: medians over rounds."""
    heads = ["shape"]
    heads += [f"TTFT {length}" for length in PREFILLS]
    heads += [f"TPOT x{count}" for count in CONCURRENCIES] + [f"tokens/s x{count}" for count in CONCURRENCIES]
    heads += ["collective"]
    units = "TTFT: p50 / p95 in ms, by prompt tokens. TPOT in ms and tokens/s, by streams. A collective in us."
    lines = [units, "", "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name, rounds in found.items():
        cells = [name]
        for length in PREFILLS:
            times = [1000 * value for figures in rounds for value in figures.ttft_s[length]]
            cells.append(f"{median(times):.0f} / {_p95(times):.0f}")
        cells += [f"{median(figures.tpot_ms[count] for figures in rounds):.1f}" for count in CONCURRENCIES]
        cells += [f"{median(figures.tokens_per_s[count] for figures in rounds):.1f}" for count in CONCURRENCIES]
        mean_us = median(figures.reduce_us for figures in rounds)
        cells.append(f"{mean_us:.0f}" if mean_us else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _p95(values: Sequence[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def plot(found: dict[str, list[ShapeFigures]], path: Path) -> None:
    """Tokens/s by concurrency, one line a shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, rounds in found.items():
        speeds = [median(figures.tokens_per_s[count] for figures in rounds) for count in CONCURRENCIES]
        axes.plot(CONCURRENCIES, speeds, marker="o", label=name)
    axes.set(xlabel="concurrent streams", ylabel="tokens/s, all streams", xscale="log", title="Layers and ranks")
    axes.set_xticks(CONCURRENCIES, [str(count) for count in CONCURRENCIES])
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.parallel", description=__doc__)
    parser.add_argument("--model", default="bench", choices=sorted(SIZES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), help="default: all")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--prompts", type=int, default=5, help="prompts of each length and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models-dir", type=Path, default=Path("state/bench-models"))
    parser.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"))
    parsed = parser.parse_args(arguments)
    if min(parsed.rounds, parsed.prompts) < 1 or parsed.tokens < 2:
        parser.error("--rounds and --prompts must be 1 or more, --tokens 2 or more")
    found = run(parsed)
    parsed.output_dir.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"machine": asdict(describe_machine()), "model": parsed.model, "dtype": parsed.dtype}
    document["shapes"] = {name: [asdict(figures) for figures in rounds] for name, rounds in found.items()}
    (parsed.output_dir / "parallel.json").write_text(json.dumps(document, indent=1) + "\n")
    (parsed.output_dir / "parallel.md").write_text(table(found) + "\n")
    plot(found, parsed.output_dir / "parallel.png")
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
