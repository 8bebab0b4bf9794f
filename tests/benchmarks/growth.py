"""How the mesh's times grow with streams, context, expert processes and stages, and whether any grows too fast.

    make bench-growth
    make bench-growth BENCH_ARGS="--quick --parts streams context"

Two parts hold a time against what the machine can do: a long prompt against its products, and two pipelines against
one. Writes a table, a plot and all figures. Nothing here fails because something was slow.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks import long_prompt, pipeline_pair
from tests.benchmarks.figures import round_figures
from tests.benchmarks.growth_curve import Curve, Point, verdict
from tests.benchmarks.long_prompt import LongPrompt, measure_long_prompt
from tests.benchmarks.machine import Machine, describe_machine
from tests.benchmarks.make_bench_model import SIZES, make_bench_model
from tests.benchmarks.peers.engines import Engine, mesh_engine
from tests.benchmarks.pipeline_pair import PairFigures, measure_pair
from tests.benchmarks.rates import Rates, measure_rates
from tests.benchmarks.report import table_of, without_nan
from tests.benchmarks.serve_benchmark import PromptSource

PARTS = ("streams", "context", "experts", "stages", "long-prompt", "pair")
PROMPT_TOKENS = 100
CONTEXT_ANSWER_TOKENS = 24
CROWD = 16
"""Streams of the second curve of experts and of stages; the first has one."""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    model: str
    parts: tuple[str, ...]
    streams: tuple[int, ...]
    contexts: tuple[int, ...]
    experts: tuple[int, ...]
    stages: tuple[int, ...]
    answer_tokens: int
    tries: int
    long_prompt_tokens: int
    pair_requests: int
    models_dir: Path
    output_dir: Path


@dataclass
class GrowthReport:
    """What a run found; parts that were not asked for are empty."""

    machine: Machine
    rates: Rates
    model: str
    curves: list[Curve] = field(default_factory=list)
    long_prompt: LongPrompt | None = None
    pair: PairFigures | None = None

    def sentences(self) -> list[str]:
        """Returns what is to be said of it all."""
        found = [f"{curve.name} with {curve.grows_with}: {verdict(curve)}." for curve in self.curves]
        found += long_prompt.describe(self.long_prompt) if self.long_prompt else ()
        found += pipeline_pair.describe(self.pair) if self.pair else ()
        return found


def run(plan: Plan) -> GrowthReport:
    """Part by part, with a word about each as soon as it is there."""
    report = GrowthReport(describe_machine(), measure_rates(), plan.model)
    checkpoint = make_bench_model(plan.models_dir / f"{plan.model}-bfloat16", plan.model, "bfloat16")
    source = PromptSource(SIZES[plan.model].vocabulary)
    measures: dict[str, Callable[[], list[Curve]]] = {
        "streams": lambda: _with_streams(plan, checkpoint, source),
        "context": lambda: _with_context(plan, checkpoint, source),
        "experts": lambda: _with_shape(plan, checkpoint, source, "expert processes", "EXPERTS", plan.experts),
        "stages": lambda: _with_shape(plan, checkpoint, source, "stages", "PP", plan.stages),
    }
    for part in plan.parts:
        told = report.sentences()
        if part == "long-prompt":
            report.long_prompt = measure_long_prompt(plan.models_dir, plan.long_prompt_tokens, plan.tries)
        elif part == "pair":
            report.pair = measure_pair(plan.model, checkpoint, plan.pair_requests, plan.tries)
        else:
            report.curves += measures[part]()
        print("\n".join(sentence for sentence in report.sentences() if sentence not in told), flush=True)
    return report


def _with_streams(plan: Plan, checkpoint: Path, source: PromptSource) -> list[Curve]:
    with mesh_engine(checkpoint, {}) as engine:
        points = [Point(count, _step_ms(engine, source, count, plan)) for count in plan.streams]
    return [Curve("a step", "streams", "ms", tuple(points))]


def _with_context(plan: Plan, checkpoint: Path, source: PromptSource) -> list[Curve]:
    first, next_ones = [], []
    with mesh_engine(checkpoint, {}) as engine:
        engine.run_round(source.take(1, PROMPT_TOKENS), 4)
        for length in plan.contexts:
            rounds = [
                round_figures(engine.run_round(source.take(1, length), CONTEXT_ANSWER_TOKENS))
                for _ in range(plan.tries)
            ]
            first.append(Point(length, 1000 * statistics.median(figures.ttft_s for figures in rounds)))
            next_ones.append(Point(length, 1000 * statistics.median(figures.tpot_s for figures in rounds)))
    return [
        Curve("TTFT", "prompt tokens", "ms", tuple(first)),
        Curve("TPOT", "prompt tokens", "ms", tuple(next_ones)),
    ]


def _with_shape(
    plan: Plan, checkpoint: Path, source: PromptSource, what: str, setting: str, counts: Sequence[int]
) -> list[Curve]:
    points: dict[int, list[Point]] = {1: [], CROWD: []}
    for count in counts:
        with mesh_engine(checkpoint, {setting: str(count)}) as engine:
            for streams, curve in points.items():
                curve.append(Point(count, _step_ms(engine, source, streams, plan)))
    return [Curve(f"a step of {streams}", what, "ms", tuple(curve)) for streams, curve in points.items()]


def _step_ms(engine: Engine, source: PromptSource, streams: int, plan: Plan) -> float:
    """Returns how long it takes until each of the streams has one more token, while all decode."""
    engine.run_round(source.take(streams, PROMPT_TOKENS), 4)
    rates = [
        round_figures(engine.run_round(source.take(streams, PROMPT_TOKENS), plan.answer_tokens)).steady_tokens_per_s
        for _ in range(plan.tries)
    ]
    return 1000 * streams / statistics.median(rates)


def write_report(report: GrowthReport, directory: Path) -> list[Path]:
    """Writes the three files and returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"growth.{suffix}" for suffix in ("json", "md", "png")]
    document = asdict(report) | {"sentences": report.sentences()}
    paths[0].write_text(json.dumps(without_nan(document), indent=1) + "\n")
    paths[1].write_text(markdown(report))
    if report.curves:
        _plot(report.curves, paths[2])
    return [path for path in paths if path.exists()]


def markdown(report: GrowthReport) -> str:
    """Returns a page: machine, sentences, one table a curve."""
    machine, rates = report.machine, report.rates
    sections = [
        f"# How times grow on {report.model}",
        f"Machine: {machine.cpu}, {machine.cores} cores ({machine.instruction_set}); moemesh {machine.commit}; load "
        f"average {machine.load_average} at the start. Measured in this run: {rates.read_bytes_per_s / 1e9:.1f} GB/s "
        f"read with one thread, {rates.read_bytes_per_s_all / 1e9:.1f} with {rates.cores}; "
        f"{rates.linear_flop_per_s / 1e9:.0f} and {rates.linear_flop_per_s_all / 1e9:.0f} GFLOP/s of bf16 linears. "
        "Differences under 7% mean nothing.",
        *report.sentences(),
    ]
    if report.curves:
        sections.append("![plot](growth.png)")
    for curve in report.curves:
        rows = [[f"{point.size:g}", f"{point.cost:,.1f}", f"{point.cost / point.size:,.2f}"] for point in curve.points]
        sections.append(table_of([curve.grows_with, f"{curve.name}, {curve.unit}", "of it for each"], rows))
    return "\n\n".join(text if text.startswith("|") else textwrap.fill(text, 120) for text in sections) + "\n"


def _plot(curves: Sequence[Curve], path: Path) -> None:
    import matplotlib

    # No display on a server.
    matplotlib.use("agg")
    # Published with types for half of its calls.
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    names = list(dict.fromkeys(curve.grows_with for curve in curves))
    figure, panels = pyplot.subplots(1, len(names), figsize=(4.5 * len(names), 4), layout="constrained", squeeze=False)
    for axes, grows_with in zip(panels[0], names, strict=True):
        for curve in [curve for curve in curves if curve.grows_with == grows_with]:
            sizes, costs = [point.size for point in curve.points], [point.cost for point in curve.points]
            (line,) = axes.plot(sizes, costs, "o-", label=f"{curve.name}, {curve.unit}")
            linear = [costs[0] * size / sizes[0] for size in sizes]
            axes.plot(sizes, linear, ":", color=line.get_color(), label="linear")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.set_xlabel(grows_with)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse_plan(arguments: Sequence[str] | None) -> Plan:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth", description=__doc__)
    parser.add_argument("--model", choices=sorted(SIZES), default="bench", help="of all parts but the long prompt")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--answer-tokens", type=int, default=64, help="2 or more")
    parser.add_argument("--tries", type=int, default=3, help="the tables show medians")
    parser.add_argument("--long-prompt-tokens", type=int, default=10_240)
    parser.add_argument("--pair-requests", type=int, default=8, help="of each client")
    parser.add_argument("--quick", action="store_true", help="one try, short answers, ends of curves: does it all run?")
    parser.add_argument("--models-dir", type=Path, default=Path("state/bench-models"))
    parser.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"))
    parsed = parser.parse_args(arguments)
    if parsed.answer_tokens < 2 or parsed.tries < 1:
        parser.error("--answer-tokens must be 2 or more, --tries 1 or more")

    def sizes(chosen: Sequence[int]) -> tuple[int, ...]:
        ascending = sorted(set(chosen))
        return tuple(ascending[:2] if parsed.quick else ascending)

    return Plan(
        model=parsed.model,
        parts=tuple(parsed.parts),
        streams=sizes(parsed.streams),
        contexts=sizes(parsed.contexts),
        experts=sizes(parsed.experts),
        stages=sizes(parsed.stages),
        answer_tokens=min(parsed.answer_tokens, 16) if parsed.quick else parsed.answer_tokens,
        tries=1 if parsed.quick else parsed.tries,
        long_prompt_tokens=parsed.long_prompt_tokens // 10 if parsed.quick else parsed.long_prompt_tokens,
        pair_requests=2 if parsed.quick else parsed.pair_requests,
        models_dir=parsed.models_dir,
        output_dir=parsed.output_dir,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was written."""
    plan = parse_plan(arguments)
    for path in write_report(run(plan), plan.output_dir):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
