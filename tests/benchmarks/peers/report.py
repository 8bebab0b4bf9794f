"""What a run found, as JSON for machines, a page of tables and a plot."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.limits import decode_limit, prefill_limit
from tests.benchmarks.machine import Machine
from tests.benchmarks.make_bench_model import SIZES
from tests.benchmarks.peers.contenders import Contender
from tests.benchmarks.peers.engines import Engine
from tests.benchmarks.peers.sitting import Load, Sitting, columns_of
from tests.benchmarks.peers.table import Row, markdown_table, ratios
from tests.benchmarks.rates import Rates
from tests.benchmarks.report import table_of, write_files


@dataclass(frozen=True)
class PeersReport:
    """Everything."""

    machine: Machine
    rates: Rates
    model: str
    load: Load
    contenders: list[Contender[Engine]]
    """Those of which there are sittings."""
    sittings: dict[str, list[Sitting]]
    """By contender's name, one a round."""
    absent: dict[str, str]
    """Who could not be measured, or not to the end, and why."""
    minutes: float

    def rows(self) -> list[Row]:
        """Returns the figures as the tables have them."""
        return [
            Row(each.name, each.is_peer, each.weights, columns_of(self.sittings[each.name], self.load))
            for each in self.contenders
        ]

    def limits(self) -> dict[str, float]:
        """Returns what reading the weights, and computing the products, of this run's rates allow."""
        sizes = SIZES[self.model]
        bandwidth = max(self.rates.read_bytes_per_s, self.rates.read_bytes_per_s_all)
        flop_per_s = max(self.rates.linear_flop_per_s, self.rates.linear_flop_per_s_all)
        return {f"steady x{c}": decode_limit(sizes, c, bandwidth) for c in self.load.concurrencies} | {
            f"prefill {length}": prefill_limit(sizes, length, flop_per_s) for length in self.load.prefill_tokens
        }


def write_report(report: PeersReport, directory: Path) -> list[Path]:
    """Writes the three files and returns their paths."""
    return write_files(directory, f"peers-{report.model}", document(report), markdown(report), partial(_plot, report))


def document(report: PeersReport) -> dict[str, Any]:
    """Returns it all as JSON has it."""
    rows = report.rows()
    keys = sorted({key for row in rows for key in row.figures})
    return {
        "machine": asdict(report.machine),
        "rates": asdict(report.rates),
        "model": report.model,
        "load": asdict(report.load),
        "minutes": report.minutes,
        "limits": report.limits(),
        "rows": [asdict(row) for row in rows],
        "ratios_to_best_bf16_peer": ratios(rows, keys),
        "used": {each.name: each.used for each in report.contenders},
        "absent": report.absent,
        "sittings": {name: [asdict(sitting) for sitting in rounds] for name, rounds in report.sittings.items()},
    }


def markdown(report: PeersReport) -> str:
    """Returns a page: machine, limits, four tables, what was used."""
    machine, rates, load, rows = report.machine, report.rates, report.load, report.rows()
    rounds = max((len(sittings) for sittings in report.sittings.values()), default=0)
    steady, overall = ([f"{kind} x{c}" for c in load.concurrencies] for kind in ("steady", "overall"))
    prefill = [f"prefill {length}" for length in load.prefill_tokens]
    limits = report.limits()
    sections = [
        f"# The mesh beside peers on {report.model}",
        f"The same bf16 weights for all but rows that name a quantization. Prompts of {load.prompt_tokens} random "
        f"tokens that no cache has seen, answers of {load.answer_tokens}, temperature 1; rounds: {rounds}, medians; "
        f"each engine alone and in turn. In brackets: how many times as fast as the best bf16 peer. The run took "
        f"{report.minutes:.0f} minutes.",
        f"Machine: {machine.cpu}, {machine.cores} cores ({machine.instruction_set}), {machine.memory_gib} GiB, Linux "
        f"{machine.kernel}; moemesh {machine.commit}; load average {machine.load_average} at the start. Differences "
        "under 7% mean nothing.",
        f"Measured in this run: {rates.read_bytes_per_s / 1e9:.1f} GB/s read with one thread, "
        f"{rates.read_bytes_per_s_all / 1e9:.1f} with {rates.cores}; {rates.linear_flop_per_s / 1e9:.0f} "
        f"GFLOP/s of bf16 linears with one thread, {rates.linear_flop_per_s_all / 1e9:.0f} with {rates.cores}. The "
        "limits follow: a step reads its distinct weights once, and a prompt's products run at that rate.",
        f"CPU flags: {machine.flags}.",
        f"![plot](peers-{report.model}.png)",
        "## Tokens a second while all streams decode",
        markdown_table(rows, steady, limits),
        "## Tokens a second with prompts included",
        markdown_table(rows, overall, limits),
        "## Prompt tokens a second, one prompt alone",
        markdown_table(rows, prefill, limits),
        f"## Milliseconds to the first token, {load.crowd} prompts of {load.crowd_prompt_tokens} at once",
        markdown_table(rows, ["TTFT p50", "TTFT p95"], limits),
        "## What was used",
        table_of(["engine", "version and settings"], [[each.name, each.used] for each in report.contenders]),
    ]
    if report.absent:
        sections += ["## Not measured", *(f"- {name}: {reason}" for name, reason in report.absent.items())]
    return "\n\n".join(text if text.startswith("|") else textwrap.fill(text, 120) for text in sections) + "\n"


def _plot(report: PeersReport, path: Path) -> None:
    import matplotlib

    # No display on a server.
    matplotlib.use("agg")
    # Published with types for half of its calls.
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, panels = pyplot.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    load, rows, limits = report.load, report.rows(), report.limits()
    for axes, kind in zip(panels[:2], ("steady", "overall"), strict=True):
        keys = [f"{kind} x{c}" for c in load.concurrencies]
        for row in rows:
            style = "s--" if row.is_peer else "o-"
            axes.plot(load.concurrencies, [row.figures[key] for key in keys], style, label=row.name)
        if kind == "steady":
            axes.plot(load.concurrencies, [limits[key] for key in keys], "k:", label="limit by bytes")
            axes.legend(fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(load.concurrencies, [str(c) for c in load.concurrencies])
        axes.set_xlabel("streams")
        axes.set_title(f"{kind} tokens/s")
        axes.grid(alpha=0.3)
    _bars(panels[2], rows, [f"prefill {length}" for length in load.prefill_tokens])
    figure.suptitle(f"{report.model}, {report.machine.cores} cores of {report.machine.cpu}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axes: Any, rows: Sequence[Row], keys: Sequence[str]) -> None:
    width = 0.8 / len(keys)
    for number, key in enumerate(keys):
        places = [index + number * width for index in range(len(rows))]
        axes.bar(places, [row.figures[key] for row in rows], width, label=key)
    axes.set_xticks(range(len(rows)), [row.name for row in rows], rotation=30, ha="right", fontsize=8)
    axes.set_title("prompt tokens/s")
    axes.legend(fontsize=8)
