"""The figures as JSON for machines, a table for readers and a plot."""

from __future__ import annotations

import importlib
import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.figures import RoundFigures
from tests.benchmarks.hops import HopFigures
from tests.benchmarks.machine import Machine


@dataclass(frozen=True)
class LevelReport:
    """One concurrency: medians over the repeats, and the repeats."""

    concurrency: int
    mesh: RoundFigures
    transformers: RoundFigures
    mesh_rounds: list[RoundFigures]
    transformers_rounds: list[RoundFigures]
    client_cpu_share: float
    """Of one core: what the client itself took away from the mesh."""
    hops: list[HopFigures]


@dataclass(frozen=True)
class PrefillReport:
    """One prompt by itself: medians of the time to its first token."""

    prompt_tokens: int
    mesh_s: float
    transformers_s: float


@dataclass(frozen=True)
class ProcessReport:
    """One process of the mesh after the last round."""

    name: str
    resident_bytes: int
    private_bytes: int


@dataclass(frozen=True)
class BenchmarkReport:
    """Everything that a run found."""

    machine: Machine
    model: str
    num_parameters: int
    dtype: str
    settings: dict[str, str]
    prompt_tokens: int
    max_tokens: int
    repeats: int
    peer_threads: int
    levels: list[LevelReport]
    prefills: list[PrefillReport]
    processes: list[ProcessReport]

    @property
    def name(self) -> str:
        """Of its files."""
        settings = "".join(f"-{name.lower()}-{value}" for name, value in sorted(self.settings.items()))
        return f"serving-{self.model}-{self.dtype}{settings}"


def write_report(report: BenchmarkReport, directory: Path) -> list[Path]:
    """Writes the three files and returns their paths."""
    return write_files(directory, report.name, asdict(report), markdown(report), partial(_plot, report))


def write_files(
    directory: Path, name: str, document: Mapping[str, Any], page: str, plot: Callable[[Path], None] | None = None
) -> list[Path]:
    """Writes all figures, a page, and what `plot` draws, as files of this name. Returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.{suffix}" for suffix in ("json", "md", "png")]
    paths[0].write_text(json.dumps(without_nan(document), indent=1) + "\n")
    paths[1].write_text(page)
    if plot is None:
        return paths[:2]
    plot(paths[2])
    return paths


def without_nan(value: Any) -> Any:
    """JSON knows no NaN."""
    match value:
        case dict():
            return {key: without_nan(item) for key, item in value.items()}
        case list() | tuple():
            return [without_nan(item) for item in value]
        case float() if math.isnan(value):
            return None
    return value


def markdown(report: BenchmarkReport) -> str:
    """A page: machine, tokens a second, latencies, prefill, hops, memory."""
    machine = report.machine
    settings = ", ".join(f"`{name}={value}`" for name, value in sorted(report.settings.items())) or "the defaults"
    sections = [
        f"# Serving {report.model} in {report.dtype}",
        f"{report.num_parameters / 1e6:.0f} M parameters, random weights. Mesh with {settings}, through HTTP "
        f"streaming. transformers: `generate()` with a static batch, {report.peer_threads} threads, no HTTP. "
        f"Prompts of {report.prompt_tokens} tokens, answers of {report.max_tokens}; medians of {report.repeats} "
        "rounds, both in turn.",
        f"Machine: {machine.cpu}, {machine.cores} cores ({machine.instruction_set}), {machine.memory_gib} GiB, "
        f"Linux {machine.kernel}, Python {machine.python}, torch {machine.torch}, transformers {machine.transformers}; "
        f"moemesh {machine.commit}; load average {machine.load_average} at the start. "
        "Differences under 7% mean nothing.",
        f"![plot]({report.name}.png)",
        "## Tokens a second",
        "Steady: while every stream decodes. Overall: from the first request to the last token, prompts included.",
        table_of(
            [
                "concurrency",
                "mesh steady",
                "transformers",
                "ratio",
                "mesh overall",
                "transformers",
                "ratio",
                "client CPU",
            ],
            [_throughput_row(level) for level in report.levels],
        ),
        "## Latency",
        "TTFT: request sent to first token, median of the streams (longest). TPOT: between tokens of one stream.",
        table_of(
            ["concurrency", "mesh TTFT ms", "transformers", "ratio", "mesh TPOT ms", "transformers", "ratio"],
            [_latency_row(level) for level in report.levels],
        ),
    ]
    if report.prefills:
        header = ["prompt tokens", "mesh tokens/s", "transformers", "ratio"]
        sections += [
            "## Prefill of one prompt",
            table_of(header, [_prefill_row(prefill) for prefill in report.prefills]),
        ]
    sections += ["## Hops", *_hop_sections(report), "## Memory", _memory_table(report.processes)]
    wrapped = [text if text.startswith("|") else textwrap.fill(text, 120, break_long_words=False) for text in sections]
    return "\n\n".join(wrapped) + "\n"


def _throughput_row(level: LevelReport) -> list[str]:
    ours, theirs = level.mesh, level.transformers
    return [
        str(level.concurrency),
        f"{ours.steady_tokens_per_s:.1f}",
        f"{theirs.steady_tokens_per_s:.1f}",
        f"{ours.steady_tokens_per_s / theirs.steady_tokens_per_s:.2f}",
        f"{ours.overall_tokens_per_s:.1f}",
        f"{theirs.overall_tokens_per_s:.1f}",
        f"{ours.overall_tokens_per_s / theirs.overall_tokens_per_s:.2f}",
        f"{level.client_cpu_share:.1%}",
    ]


def _latency_row(level: LevelReport) -> list[str]:
    ours, theirs = level.mesh, level.transformers
    return [
        str(level.concurrency),
        f"{ours.ttft_s * 1e3:.0f} ({ours.last_ttft_s * 1e3:.0f})",
        f"{theirs.ttft_s * 1e3:.0f}",
        f"{ours.ttft_s / theirs.ttft_s:.2f}",
        f"{ours.tpot_s * 1e3:.1f}",
        f"{theirs.tpot_s * 1e3:.1f}",
        f"{ours.tpot_s / theirs.tpot_s:.2f}",
    ]


def _prefill_row(prefill: PrefillReport) -> list[str]:
    return [
        str(prefill.prompt_tokens),
        f"{prefill.prompt_tokens / prefill.mesh_s:.0f}",
        f"{prefill.prompt_tokens / prefill.transformers_s:.0f}",
        f"{prefill.transformers_s / prefill.mesh_s:.2f}",
    ]


def _hop_sections(report: BenchmarkReport) -> list[str]:
    header = ["concurrency", "link", "hops", "hops a token", "mean ms", "mean KiB"]
    rows = [
        [
            str(level.concurrency),
            hop.link,
            str(hop.hops),
            f"{hop.hops_per_token:.2f}",
            f"{hop.mean_s * 1e3:.3f}",
            f"{hop.mean_bytes / 1024:.1f}",
        ]
        for level in report.levels
        for hop in level.hops
    ]
    if not rows:
        return ["The mesh counted no hops."]
    return ["Messages between processes in one round, as the mesh itself counts them.", table_of(header, rows)]


def _memory_table(processes: Sequence[ProcessReport]) -> str:
    rows = [
        [process.name, f"{process.resident_bytes / 2**20:.0f}", f"{process.private_bytes / 2**20:.0f}"]
        for process in processes
    ]
    return table_of(["process", "resident MiB", "of it private MiB"], rows)


def table_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plot(report: BenchmarkReport, path: Path) -> None:
    import matplotlib

    # No display on a server.
    matplotlib.use("agg")
    # Published with types for half of its calls.
    pyplot: Any = importlib.import_module("matplotlib.pyplot")

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panel_figures = (
        ("steady tokens/s", "steady_tokens_per_s", 1.0),
        ("time to first token, ms", "ttft_s", 1e3),
        ("time per output token, ms", "tpot_s", 1e3),
    )
    concurrencies = [level.concurrency for level in report.levels]
    for axes, (title, name, scale) in zip(panels, panel_figures, strict=True):
        ours = [getattr(level.mesh, name) * scale for level in report.levels]
        theirs = [getattr(level.transformers, name) * scale for level in report.levels]
        axes.plot(concurrencies, ours, "o-", label="moemesh, HTTP")
        axes.plot(concurrencies, theirs, "s--", label="transformers")
        axes.set_xscale("log", base=2)
        axes.set_xticks(concurrencies, [str(concurrency) for concurrency in concurrencies])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("concurrency")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(f"{report.model}, {report.dtype}, {report.machine.cores} cores of {report.machine.cpu}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
