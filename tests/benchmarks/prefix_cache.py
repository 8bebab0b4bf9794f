"""What the prefix cache brings where a prompt was seen before, and what it costs where none was.

    make bench-cache
    make bench-cache BENCH_ARGS="--parts hits --tries 3"

Hits: a mesh gets each prompt twice, and the second time to the first token is held against the first one. Misses: pairs
of a mesh with the cache and one without, each started anew, the next pair in the other order; both of a pair get the
same prompts, which share nothing. Ratios are taken within a pair; they are medians with a 95% interval by bootstrap.
Writes a table and all figures.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmarks.figures import median_figures, round_figures
from tests.benchmarks.machine import Machine, describe_machine
from tests.benchmarks.make_bench_model import SIZES, make_bench_model
from tests.benchmarks.peers.engines import HttpEngine, mesh_engine
from tests.benchmarks.peers.table import is_time
from tests.benchmarks.report import write_files
from tests.benchmarks.serve_benchmark import PromptSource
from tests.benchmarks.streaming_client import Answer
from tests.benchmarks.two_builds import Comparison, compare_figure, table

PARTS = ("hits", "misses")
BOUNDS = {1024: 0.15, 16_384: 0.03}
"""By prompt tokens: how long a first token may take, of what it takes without a hit."""
ON, OFF = "on", "off"
WARM_UP_PROMPT_TOKENS = 64
WARM_UP_TOKENS = 8
LONE_STREAM_TRIES = 3
"""A single stream is soon done."""


@dataclass(frozen=True)
class Hits:
    """Prompts of one length, each sent twice; an entry a prompt."""

    prompt_tokens: int
    cold_ms: list[float]
    warm_ms: list[float]
    found_tokens: list[int]
    """Of the second time."""


@dataclass(frozen=True)
class CacheReport:
    """What a run found; empty where a part was not run."""

    machine: Machine
    model: str
    settings: dict[str, str]
    """Of all meshes, but for the cache."""
    hits: list[Hits]
    prompt_tokens: int
    """Of prompts that share nothing."""
    answer_tokens: int
    misses: dict[str, list[dict[str, float]]]
    """By whether the cache is on: figures by name, an entry a pair."""

    def hit_comparisons(self) -> list[Comparison]:
        """Returns the first time of each length beside the second."""
        return [
            compare_figure(f"TTFT of {each.prompt_tokens:,}, ms", each.cold_ms, each.warm_ms, True, random.Random(0))
            for each in self.hits
        ]

    def miss_comparisons(self) -> list[Comparison]:
        """Returns figures without the cache beside those with it."""
        without, cached = self.misses[OFF], self.misses[ON]
        return [
            compare_figure(
                name,
                [figures[name] for figures in without],
                [figures[name] for figures in cached],
                is_time(name),
                random.Random(0),
            )
            for name in (without[0] if without else ())
        ]

    def sentences(self) -> list[str]:
        """Returns which bounds are met."""
        found = []
        for hits, row in zip(self.hits, self.hit_comparisons(), strict=True):
            if bound := BOUNDS.get(hits.prompt_tokens):
                is_met = "met" if row.ratio <= bound else "not met"
                found.append(
                    f"A prompt of {hits.prompt_tokens:,} tokens, seen before: {row.ratio:.3f} of its time to the first "
                    f"token; the bound of {bound} is {is_met}."
                )
        if rows := self.miss_comparisons():
            slower = ", ".join(row.figure for row in rows if row.verdict == "worse")
            found.append(f"Without a hit the cache makes {slower or 'nothing'} slower.")
        return found


def measure_hits(checkpoint: Path, source: PromptSource, parsed: argparse.Namespace) -> list[Hits]:
    """All lengths in turn in each try. Raises RuntimeError where nothing was found the second time."""
    hits = [Hits(length, [], [], []) for length in parsed.hits]
    with mesh_engine(checkpoint, settings_of(parsed) | {"PREFIX_CACHE": ON}) as engine:
        engine.run_round(source.take(1, WARM_UP_PROMPT_TOKENS), WARM_UP_TOKENS)
        for _ in range(parsed.tries):
            for each in hits:
                (prompt,) = source.take(1, each.prompt_tokens)
                cold, warm = (asyncio.run(engine.ask(prompt, 1, seed=0)) for _ in range(2))
                if not warm.num_cached_tokens:
                    raise RuntimeError(f"nothing was found of a prompt of {each.prompt_tokens} tokens")
                each.cold_ms.append(_ttft_ms(cold))
                each.warm_ms.append(_ttft_ms(warm))
                each.found_tokens.append(warm.num_cached_tokens)
    return hits


def _ttft_ms(answer: Answer) -> float:
    return 1000 * (answer.times.arrivals[0][0] - answer.times.sent_s)


def measure_misses(checkpoint: Path, parsed: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Both in turn in each pair, with a line about each as soon as it is there."""
    settings, found = settings_of(parsed), {ON: list[dict[str, float]](), OFF: list[dict[str, float]]()}
    for number in range(parsed.pairs):
        for cache in (OFF, ON) if number % 2 == 0 else (ON, OFF):
            # The same prompts for both, and others for each pair.
            source = PromptSource(SIZES[parsed.model].vocabulary, seed=number)
            with mesh_engine(checkpoint, settings | {"PREFIX_CACHE": cache}) as engine:
                figures = _figures_of(engine, source, parsed)
            found[cache].append(figures)
            words = ", ".join(f"{name} {value:.1f}" for name, value in figures.items())
            print(f"pair {number + 1}, cache {cache}: {words}", flush=True)
    return found


def _figures_of(engine: HttpEngine, source: PromptSource, parsed: argparse.Namespace) -> dict[str, float]:
    figures = {}
    for streams in parsed.streams:
        engine.run_round(source.take(streams, WARM_UP_PROMPT_TOKENS), WARM_UP_TOKENS)
        rounds = [
            round_figures(engine.run_round(source.take(streams, parsed.prompt_tokens), parsed.answer_tokens))
            for _ in range(LONE_STREAM_TRIES if streams == 1 else 1)
        ]
        medians = median_figures(rounds)
        figures[f"TTFT x{streams}, ms"] = 1000 * medians.ttft_s
        figures[f"tokens/s x{streams}, steady"] = medians.steady_tokens_per_s
    return figures


def settings_of(parsed: argparse.Namespace) -> dict[str, str]:
    """Returns those of all meshes."""
    return dict(setting.split("=", 1) for setting in parsed.set)


def run(parsed: argparse.Namespace) -> CacheReport:
    """The parts that are asked for."""
    machine = describe_machine()
    checkpoint = make_bench_model(parsed.models_dir / f"{parsed.model}-bfloat16", parsed.model, "bfloat16")
    source = PromptSource(SIZES[parsed.model].vocabulary)
    return CacheReport(
        machine=machine,
        model=parsed.model,
        settings=settings_of(parsed),
        hits=measure_hits(checkpoint, source, parsed) if "hits" in parsed.parts else [],
        prompt_tokens=parsed.prompt_tokens,
        answer_tokens=parsed.answer_tokens,
        misses=measure_misses(checkpoint, parsed) if "misses" in parsed.parts else {ON: [], OFF: []},
    )


def write_report(report: CacheReport, directory: Path) -> list[Path]:
    """Writes both files and returns their paths."""
    comparisons = [*report.hit_comparisons(), *report.miss_comparisons()]
    document = asdict(report) | {
        "sentences": report.sentences(),
        "comparisons": [asdict(row) | {"verdict": row.verdict} for row in comparisons],
    }
    return write_files(directory, f"cache-{report.model}", document, markdown(report))


def markdown(report: CacheReport) -> str:
    """Returns a page: machine, bounds, a table for each part."""
    machine = report.machine
    settings = ", ".join(f"`{name}={value}`" for name, value in sorted(report.settings.items())) or "the defaults"
    sections = [
        f"# The prefix cache on {report.model}",
        f"Mesh with {settings}, through HTTP. Machine: {machine.cpu}, {machine.cores} cores "
        f"({machine.instruction_set}); moemesh {machine.commit}; load average {machine.load_average} at the start.",
        *report.sentences(),
    ]
    if report.hits:
        found = ", ".join(f"{min(each.found_tokens):,} of {each.prompt_tokens:,}" for each in report.hits)
        sections += [
            f"## The same prompt twice, {len(report.hits[0].cold_ms)} times",
            f"Tokens that were found the second time: {found}.",
            table(report.hit_comparisons(), ("first time", "second")),
        ]
    if report.misses[ON]:
        sections += [
            f"## Prompts that share nothing, {len(report.misses[ON])} pairs",
            f"Prompts of {report.prompt_tokens} tokens, answers of {report.answer_tokens}; TTFT is the median of the "
            "streams.",
            table(report.miss_comparisons(), ("cache off", "cache on")),
        ]
    return "\n\n".join(text if text.startswith("|") else textwrap.fill(text, 120) for text in sections) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the page and what was written."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.prefix_cache", description=__doc__)
    parser.add_argument("--model", choices=sorted(SIZES), default="bench")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--hits", type=int, nargs="+", default=list(BOUNDS), help="lengths of prompts, 64 or more")
    parser.add_argument("--tries", type=int, default=7, help="prompts of each length")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of prompts that share nothing")
    parser.add_argument("--answer-tokens", type=int, default=96, help="2 or more")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all meshes")
    parser.add_argument("--models-dir", type=Path, default=Path("state/bench-models"))
    parser.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"))
    parsed = parser.parse_args(arguments)
    if min(parsed.tries, parsed.pairs, parsed.prompt_tokens, *parsed.streams, parsed.answer_tokens - 1) < 1:
        parser.error("answers need 2 tokens or more, and there is 1 or more of everything else")
    paths = write_report(run(parsed), parsed.output_dir)
    print(paths[1].read_text())
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
