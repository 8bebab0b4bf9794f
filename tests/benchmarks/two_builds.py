"""What one build costs beside another: CPU seconds a token, tokens/s and TTFT of two checkouts, in interleaved pairs.

    python -m tests.benchmarks.two_builds --before ../before --after . --pairs 20

Each pair measures both builds once, one after the other, and the next pair in the other order. A measurement starts a
mesh by the checkout's own command, warms it up, and sends a number of streams at once; both builds of a pair get the
same prompts. Prints medians, the median of the pairs' ratios (after : before) and its 95% interval by bootstrap.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import httpx

from compose.demo_checkpoint import DEMO_CHECKPOINT
from tests.benchmarks.checkout_mesh import THIS_CHECKOUT, checkout_mesh, command_of, commit_of
from tests.benchmarks.figures import round_figures
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.serve_benchmark import PromptSource
from tests.benchmarks.streaming_client import run_round

SMALLEST_VOCABULARY = 400
"""Random prompts take ids that every model here has."""
WARM_UP_TOKENS = 16
RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class BuildFigures:
    """One measurement of one build."""

    cpu_ms_a_token: float
    """Of all processes of the mesh, the supervisor included, over completion tokens; prompts included."""
    steady_tokens_per_s: float
    overall_tokens_per_s: float
    ttft_ms: float
    """The median over the streams."""


LESS_IS_BETTER = {
    "cpu_ms_a_token": True,
    "steady_tokens_per_s": False,
    "overall_tokens_per_s": False,
    "ttft_ms": True,
}
NAMES = {
    "cpu_ms_a_token": "CPU ms a token",
    "steady_tokens_per_s": "tokens/s, steady",
    "overall_tokens_per_s": "tokens/s, overall",
    "ttft_ms": "TTFT, ms",
}


@dataclass(frozen=True)
class Pair:
    """Two measurements, one right after the other."""

    before: BuildFigures
    after: BuildFigures


@dataclass(frozen=True)
class Comparison:
    """One figure of both sides over all pairs."""

    figure: str
    before: float
    after: float
    """These two are medians."""
    ratio: float
    """The median of the pairs' ratios, after : before."""
    low: float
    high: float
    """The interval of `ratio`."""
    less_is_better: bool

    @property
    def verdict(self) -> str:
        """Returns `better`, `worse`, or, where the interval holds 1, `no difference`."""
        if self.low <= 1 <= self.high:
            return "no difference"
        return "better" if (self.high < 1) == self.less_is_better else "worse"


def bootstrap_interval(
    values: Sequence[float], source: random.Random, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Returns the percentile interval of the median (Efron and Tibshirani, An Introduction to the Bootstrap, 13.3)."""
    medians = sorted(median(source.choices(values, k=len(values))) for _ in range(resamples))
    tail = int((1 - confidence) / 2 * resamples)
    return medians[tail], medians[-1 - tail]


def compare(pairs: Sequence[Pair], source: random.Random) -> list[Comparison]:
    """Returns one comparison for each figure."""
    found = []
    for field in fields(BuildFigures):
        before = [float(getattr(pair.before, field.name)) for pair in pairs]
        after = [float(getattr(pair.after, field.name)) for pair in pairs]
        found.append(compare_figure(field.name, before, after, LESS_IS_BETTER[field.name], source))
    return found


def compare_figure(
    figure: str, before: Sequence[float], after: Sequence[float], less_is_better: bool, source: random.Random
) -> Comparison:
    """Returns the comparison of one figure, an entry a pair; ratios are taken within a pair."""
    ratios = [new / old for old, new in zip(before, after, strict=True)]
    low, high = bootstrap_interval(ratios, source)
    return Comparison(figure, median(before), median(after), median(ratios), low, high, less_is_better)


def table(comparisons: Sequence[Comparison], sides: tuple[str, str] = ("before", "after")) -> str:
    """Returns Markdown."""
    lines = [f"| figure | {' | '.join(sides)} | ratio | 95% interval | |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {NAMES.get(row.figure, row.figure)} | {_number(row.before)} | {_number(row.after)} | {row.ratio:.3f} | "
        f"{row.low:.3f} to {row.high:.3f} | {row.verdict} |"
        for row in comparisons
    ]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def measure(checkout: Path, settings: Mapping[str, str], prompts: list[list[int]], tokens: int) -> BuildFigures:
    """Measures a mesh that is started for it."""
    with checkout_mesh(checkout, settings) as mesh:
        address = urlsplit(mesh.url)
        host, port = address.hostname or "127.0.0.1", address.port or 80
        model = httpx.get(f"{mesh.url}/v1/models", trust_env=False).json()["data"][0]["id"]
        common = {"model": model, "temperature": 0, "ignore_eos": True}
        bodies = [common | {"prompt": prompt} for prompt in prompts]
        asyncio.run(run_round(host, port, [body | {"max_tokens": WARM_UP_TOKENS} for body in bodies]))
        cpu_s = mesh.cpu_s()
        timed = asyncio.run(run_round(host, port, [body | {"max_tokens": tokens} for body in bodies]))
        cpu_s = mesh.cpu_s() - cpu_s
    num_tokens = sum(stream.num_tokens for stream in timed.streams)
    if num_tokens != tokens * len(prompts):
        raise RuntimeError(f"asked for {tokens * len(prompts)} tokens, got {num_tokens}")
    figures = round_figures(timed.streams)
    return BuildFigures(
        cpu_ms_a_token=1000 * cpu_s / num_tokens,
        steady_tokens_per_s=figures.steady_tokens_per_s,
        overall_tokens_per_s=figures.overall_tokens_per_s,
        ttft_ms=1000 * figures.ttft_s,
    )


def run(parsed: argparse.Namespace) -> list[Pair]:
    """Measures all pairs; every second one begins with the build that is new."""
    source, pairs = PromptSource(SMALLEST_VOCABULARY), []
    settings = {"MODEL": str(parsed.model.resolve()), **dict(setting.split("=", 1) for setting in parsed.set)}
    for number in range(parsed.pairs):
        prompts = source.take(parsed.streams, parsed.prompt_tokens)
        order = ("before", "after") if number % 2 == 0 else ("after", "before")
        figures = {name: measure(getattr(parsed, name), settings, prompts, parsed.tokens) for name in order}
        pairs.append(Pair(**figures))
        print(f"pair {number + 1}: {_in_short(pairs[-1])}", flush=True)
    return pairs


def _in_short(pair: Pair) -> str:
    return ", ".join(
        f"{name} {figures.cpu_ms_a_token:.3f} CPU ms a token, {figures.steady_tokens_per_s:.0f} tokens/s"
        for name, figures in (("before", pair.before), ("after", pair.after))
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the module says."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.two_builds", description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="a checkout with its own .venv")
    parser.add_argument("--after", type=Path, default=THIS_CHECKOUT, help="another one; default: this one")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--model", type=Path, default=DEMO_CHECKPOINT, help="folder of a checkpoint")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of both meshes")
    parser.add_argument("--output", type=Path, help="also write JSON there")
    parsed = parser.parse_args(arguments)
    if min(parsed.pairs, parsed.streams, parsed.prompt_tokens) < 1 or parsed.tokens < 2:
        parser.error("--pairs, --streams and --prompt-tokens must be 1 or more, --tokens 2 or more")
    for checkout in (parsed.before, parsed.after):
        command_of(checkout)
    machine, commits = describe_machine(), {"before": commit_of(parsed.before), "after": commit_of(parsed.after)}
    pairs = run(parsed)
    comparisons = compare(pairs, random.Random(0))
    if parsed.output:
        load = {"streams": parsed.streams, "prompt_tokens": parsed.prompt_tokens, "tokens": parsed.tokens}
        document = {
            "machine": asdict(machine),
            "commits": commits,
            "load": load | {"model": parsed.model.name, "settings": parsed.set},
            "comparisons": [asdict(row) | {"verdict": row.verdict} for row in comparisons],
            "pairs": [asdict(pair) for pair in pairs],
        }
        parsed.output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(comparisons))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
