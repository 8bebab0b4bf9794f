"""What a run found, as JSON for machines, a page of tables and a plot."""

from __future__ import annotations

import importlib
import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.agents.conversations import Traffic, count_equal
from tests.benchmarks.agents.figures import WHOLE, cached_share, columns_of, name_of, ttft_ms, turn_groups, turns_of
from tests.benchmarks.agents.playing import Played
from tests.benchmarks.machine import Machine
from tests.benchmarks.peers.contenders import Contender
from tests.benchmarks.peers.engines import HttpEngine
from tests.benchmarks.peers.table import Row, markdown_table
from tests.benchmarks.rates import Rates
from tests.benchmarks.report import table_of, write_files


@dataclass(frozen=True)
class AgentsReport:
    """Everything."""

    machine: Machine
    rates: Rates
    model: str
    traffic: Traffic
    time_limit_s: float
    """Of one engine in one round."""
    contenders: list[Contender[HttpEngine]]
    """Those that have played."""
    played: dict[str, list[Played]]
    """By contender's name, one a round."""
    absent: dict[str, str]
    """Who could not be measured, or not to the end, and why."""
    minutes: float

    def rows(self) -> list[Row]:
        """Returns the figures as the tables have them."""
        return [
            Row(each.name, each.is_peer, each.weights, columns_of(self.played[each.name], self.traffic))
            for each in self.contenders
        ]

    def sentences(self) -> list[str]:
        """Returns whether all meshes said the same, and who was stopped."""
        meshes = [each.name for each in self.contenders if not each.is_peer]
        found = []
        for name in meshes[1:]:
            both = zip(self.played[meshes[0]], self.played[name], strict=False)
            counts = [count_equal(_answers(first), _answers(second)) for first, second in both]
            equal, common = (sum(column) for column in zip(*counts, strict=True))
            found.append(f"{equal} of {common} answers of `{name}` are those of `{meshes[0]}`, token for token.")
        for name, rounds in self.played.items():
            turns = sum(len(conversation) for played in rounds for conversation in played)
            planned = len(rounds) * self.traffic.conversations * self.traffic.turns
            if turns < planned:
                found.append(f"`{name}` answered {turns} of {planned} turns in its time; its tokens/s are of these.")
        return found


def _answers(played: Played) -> list[list[tuple[int, ...]]]:
    return [[turn.answer.token_ids for turn in conversation] for conversation in played]


def write_report(report: AgentsReport, directory: Path) -> list[Path]:
    """Writes the three files and returns their paths."""
    return write_files(directory, f"agents-{report.model}", document(report), markdown(report), partial(_plot, report))


def document(report: AgentsReport) -> dict[str, Any]:
    """Returns it all as JSON has it; of the answers their times and counts, by round, conversation and turn."""
    return {
        "machine": asdict(report.machine),
        "rates": asdict(report.rates),
        "model": report.model,
        "traffic": asdict(report.traffic),
        "time_limit_s": report.time_limit_s,
        "minutes": report.minutes,
        "rows": [asdict(row) for row in report.rows()],
        "sentences": report.sentences(),
        "used": {each.name: each.used for each in report.contenders},
        "absent": report.absent,
        "turns": {name: [_columns(played) for played in rounds] for name, rounds in report.played.items()},
    }


def _columns(played: Played) -> dict[str, list[str]]:
    """One line a conversation: a number a line would make a file that nobody opens."""
    return {
        "prompt_tokens": [" ".join(str(turn.prompt_tokens) for turn in turns) for turns in played],
        "cached_tokens": [" ".join(str(turn.answer.num_cached_tokens) for turn in turns) for turns in played],
        "answer_tokens": [" ".join(str(turn.answer.times.num_tokens) for turn in turns) for turns in played],
        "ttft_ms": [" ".join(f"{ttft_ms(turn):.1f}" for turn in turns) for turns in played],
    }


def markdown(report: AgentsReport) -> str:
    """Returns a page: machine, what was found, four tables, what was used."""
    machine, rates, traffic, rows = report.machine, report.rates, report.traffic, report.rows()
    groups = turn_groups(traffic.turns)
    rounds = max((len(played) for played in report.played.values()), default=0)
    sections = [
        f"# Conversations of agents on {report.model}",
        f"{traffic.conversations} conversations at a time of {traffic.turns} turns, which begin with the same "
        f"{traffic.system_tokens:,} tokens. A turn adds a message of {_range(traffic.message_tokens)} tokens to all "
        f"that was said, and is answered with {_range(traffic.answer_tokens)} tokens at temperature 1; "
        f"{_range(traffic.think_s)} s after the answer comes the next turn. Prompts are token ids; rounds: {rounds}; "
        "each engine alone and in turn, and new in each round. In brackets: how many times as fast as the best peer. "
        f"The run took {report.minutes:.0f} minutes.",
        f"Machine: {machine.cpu}, {machine.cores} cores ({machine.instruction_set}), {machine.memory_gib} GiB, Linux "
        f"{machine.kernel}; moemesh {machine.commit}; load average {machine.load_average} at the start. Measured in "
        f"this run: {rates.read_bytes_per_s_all / 1e9:.1f} GB/s read with {rates.cores} threads, "
        f"{rates.linear_flop_per_s_all / 1e9:.0f} GFLOP/s of bf16 linears. Differences under 7% mean nothing.",
        *report.sentences(),
        f"![plot](agents-{report.model}.png)",
        "## All turns",
        "Seconds are from the first message to the end of the last answer, with the times of thinking; tokens are "
        "those of answers, over that time. TTFT and TPOT are in milliseconds.",
        markdown_table(rows, list(WHOLE), {}),
        *_by_group(rows, "p50", groups),
        *_by_group(rows, "p95", groups),
        "## Prompt tokens that were found in the cache, as the engine counts them",
        table_of(
            ["", *map(name_of, groups)],
            [[row.name, *(_percent(cached_share(report.played[row.name], group)) for group in groups)] for row in rows],
        ),
        "## What was used",
        table_of(["engine", "version and settings"], [[each.name, each.used] for each in report.contenders]),
    ]
    if report.absent:
        sections += ["## Not measured", *(f"- {name}: {reason}" for name, reason in report.absent.items())]
    return "\n\n".join(text if text.startswith("|") else textwrap.fill(text, 120) for text in sections) + "\n"


def _by_group(rows: Sequence[Row], quantile: str, groups: Sequence[range]) -> tuple[str, str]:
    title = f"TTFT {quantile}"
    keys = [f"{title} {name_of(group)}" for group in groups]
    # The heading says what all columns are.
    return f"## {title}, milliseconds", markdown_table(rows, keys, {}).replace(f" {title} ", " ")


def _range(ends: tuple[float, float]) -> str:
    return f"{ends[0]} to {ends[1]}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def _plot(report: AgentsReport, path: Path) -> None:
    import matplotlib

    # No display on a server.
    matplotlib.use("agg")
    # Published with types for half of its calls.
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for each in report.contenders:
        rounds, style = report.played[each.name], "s--" if each.is_peer else "o-"
        waits_ms, shares, numbers = [], [], []
        for number in range(1, report.traffic.turns + 1):
            one = range(number, number + 1)
            if waits := [ttft_ms(turn) for turn in turns_of(rounds, one)]:
                numbers.append(number)
                waits_ms.append(statistics.median(waits))
                shares.append(100 * cached_share(rounds, one))
        panels[0].plot(numbers, waits_ms, style, label=each.name)
        panels[1].plot(numbers, shares, style, label=each.name)
    for axes, title in zip(panels, ("TTFT p50, ms", "prompt tokens found in the cache, %"), strict=True):
        axes.set_xlabel("turn")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{report.traffic.conversations} conversations on {report.model}, {report.machine.cores} cores")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
