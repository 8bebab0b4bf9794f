"""A mesh on two hosts beside one on one host, on the same cores: tokens a second and the time to the first token.

    make bench-hosts BENCH_ARGS="--rounds 3"

The second host is a network namespace behind a switch, with a folder of its own in place of the mesh's, in a mount
namespace of its own: no shared memory, no Unix socket, plain tcp. Router and stages, and the client, stay on the first
one, this machine; the expert nodes are on the second, and load the same files. On one host all is as it ships. Each
round starts both in turn, in the other order each time. Needs root and `ip`. Writes a table, a plot and all figures.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import statistics
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from chaos.targets.local_target import free_port
from chaos.targets.on_host import NAMESPACE_VARIABLE, OWN_FOLDER_VARIABLE
from chaos.targets.played_hosts import MAX_NODES_OF_A_KIND, PlayedHosts
from common.processes.supervisor import LocalMesh
from tests.benchmarks.figures import median, round_figures
from tests.benchmarks.machine import Machine, describe_machine
from tests.benchmarks.make_bench_model import SIZES, make_bench_model
from tests.benchmarks.peers.engines import HttpEngine
from tests.benchmarks.report import table_of, write_files
from tests.benchmarks.serve_benchmark import READY_WITHIN_S, PromptSource

ONE, TWO = "one host", "two hosts"
GOALS = {1: 0.75, 16: 0.9}
"""By streams: what two hosts are to make of the tokens a second of one."""
WARM_UP_TOKENS = 16
SERVED_NAME = "hosts"


@dataclass(frozen=True)
class HostsFigures:
    """One mesh in one round."""

    tokens_per_s: dict[int, float]
    """By streams, while all decode."""
    ttft_ms: float
    """The median over single prompts."""


@dataclass(frozen=True)
class Ratio:
    """Two hosts to one, taken within each round."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class HostsReport:
    """What a run found: an entry a round."""

    machine: Machine
    model: str
    settings: dict[str, str]
    prompt_tokens: int
    answer_tokens: int
    rounds: dict[str, list[HostsFigures]]

    @property
    def streams(self) -> tuple[int, ...]:
        return tuple(self.rounds[ONE][0].tokens_per_s)

    def speeds(self, hosts: str, streams: int) -> list[float]:
        """Returns tokens a second, an entry a round."""
        return [figures.tokens_per_s[streams] for figures in self.rounds[hosts]]

    def sentences(self) -> list[str]:
        """Returns which goals are met."""
        found = []
        for streams, goal in GOALS.items():
            if streams in self.streams:
                ratio = ratio_of(self.speeds(TWO, streams), self.speeds(ONE, streams)).middle
                is_met = "met" if ratio >= goal else "not met"
                found.append(f"Two hosts at x{streams}: {ratio:.2f} of one; the goal of {goal} is {is_met}.")
        return found


def ratio_of(twos: Sequence[float], ones: Sequence[float]) -> Ratio:
    """Returns the median of the rounds' ratios, with the lowest and the highest."""
    ratios = [two / one for two, one in zip(twos, ones, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


@contextmanager
def mesh_on(hosts: str, checkpoint: Path, settings: Mapping[str, str]) -> Iterator[HttpEngine]:
    """Starts a mesh on one host or on two, waits until it is ready, and ends it.

    Raises TargetError where hosts cannot be played, DeadlineError or NodeLostError where the mesh does not start.
    """
    state_dir = Path(tempfile.mkdtemp(prefix="hosts-"))
    environment = {"MODEL": str(checkpoint.resolve()), "PORT": "0", "SERVED_NAME": SERVED_NAME, **settings}
    try:
        if hosts == ONE:
            with LocalMesh(environment, state_dir) as mesh:
                mesh.wait_ready(READY_WITHIN_S)
                yield HttpEngine(mesh.url, {"model": SERVED_NAME})
        else:
            with PlayedHosts(1) as played, _mesh_on_two(played, environment, state_dir) as mesh:
                mesh.wait_ready(READY_WITHIN_S)
                yield HttpEngine(mesh.url, {"model": SERVED_NAME})
    finally:
        shutil.rmtree(state_dir, ignore_errors=True)


def _mesh_on_two(played: PlayedHosts, environment: Mapping[str, str], state_dir: Path) -> LocalMesh:
    first = {"CONTROL": f"tcp://{played.own_address}:{free_port()}", "ADVERTISE_HOST": played.own_address}
    second = {
        "HOST_LABEL": "second",
        "STATE_DIR": str(state_dir / "second"),
        "ADVERTISE_HOST": played.address(0),
        NAMESPACE_VARIABLE: played.namespace(0),
        OWN_FOLDER_VARIABLE: str(state_dir),
    }
    return LocalMesh(
        {**environment, **first},
        state_dir,
        modules={"expert": "chaos.targets.on_host services.expert"},
        places={f"expert-{number}": second for number in range(MAX_NODES_OF_A_KIND)},
    )


def measure(hosts: str, checkpoint: Path, source: PromptSource, parsed: argparse.Namespace) -> HostsFigures:
    """A mesh that is started for it."""
    with mesh_on(hosts, checkpoint, settings_of(parsed)) as engine:
        for streams in parsed.streams:
            engine.run_round(source.take(streams, parsed.prompt_tokens), WARM_UP_TOKENS)
        waits_ms = []
        for _ in range(parsed.prompts):
            (stream,) = engine.run_round(source.take(1, parsed.prompt_tokens), 1)
            waits_ms.append(1000 * (stream.arrivals[0][0] - stream.sent_s))
        speeds = {}
        for streams in parsed.streams:
            timed = engine.run_round(source.take(streams, parsed.prompt_tokens), parsed.answer_tokens)
            speeds[streams] = round_figures(timed).steady_tokens_per_s
    return HostsFigures(speeds, statistics.median(waits_ms))


def settings_of(parsed: argparse.Namespace) -> dict[str, str]:
    """Returns those of both meshes."""
    return dict(setting.split("=", 1) for setting in parsed.set)


def run(parsed: argparse.Namespace) -> HostsReport:
    """Both in turn in each round, with a line about each as soon as it is there."""
    machine = describe_machine()
    checkpoint = make_bench_model(parsed.models_dir / f"{parsed.model}-bfloat16", parsed.model, "bfloat16")
    source = PromptSource(SIZES[parsed.model].vocabulary)
    rounds: dict[str, list[HostsFigures]] = {ONE: [], TWO: []}
    for number in range(parsed.rounds):
        for hosts in (ONE, TWO) if number % 2 == 0 else (TWO, ONE):
            figures = measure(hosts, checkpoint, source, parsed)
            rounds[hosts].append(figures)
            speeds = ", ".join(f"x{streams} {speed:.1f}" for streams, speed in figures.tokens_per_s.items())
            print(f"round {number + 1}, {hosts}: {speeds} tokens/s, TTFT {figures.ttft_ms:.0f} ms", flush=True)
    return HostsReport(machine, parsed.model, settings_of(parsed), parsed.prompt_tokens, parsed.answer_tokens, rounds)


def write_report(report: HostsReport, directory: Path) -> list[Path]:
    """Writes the three files and returns their paths."""
    document = asdict(report) | {"sentences": report.sentences()}
    return write_files(directory, "hosts", document, markdown(report), partial(_plot, report))


def markdown(report: HostsReport) -> str:
    """Returns a page: machine, goals, a table."""
    machine = report.machine
    settings = ", ".join(f"`{name}={value}`" for name, value in sorted(report.settings.items())) or "the defaults"
    sections = [
        f"# {report.model} on one host and on two",
        f"Mesh with {settings}, through HTTP. Prompts of {report.prompt_tokens} tokens, answers of "
        f"{report.answer_tokens}; medians of {len(report.rounds[ONE])} rounds, ratios within each round. Both have the "
        "same cores. On two hosts the expert nodes are on the second one, over tcp.",
        f"Machine: {machine.cpu}, {machine.cores} cores ({machine.instruction_set}); moemesh {machine.commit}; load "
        f"average {machine.load_average} at the start. Differences under 7% mean nothing.",
        *report.sentences(),
        "![plot](hosts.png)",
        table_of(["", ONE, TWO, "ratio", "lowest", "highest"], _rows(report)),
    ]
    return "\n\n".join(text if text.startswith("|") else textwrap.fill(text, 120) for text in sections) + "\n"


def _rows(report: HostsReport) -> list[list[str]]:
    rows = [
        _row(f"x{streams}, tokens/s", report.speeds(ONE, streams), report.speeds(TWO, streams))
        for streams in report.streams
    ]
    ones, twos = ([figures.ttft_ms for figures in report.rounds[hosts]] for hosts in (ONE, TWO))
    return [*rows, _row(f"TTFT of {report.prompt_tokens} tokens, ms", ones, twos)]


def _row(name: str, ones: Sequence[float], twos: Sequence[float]) -> list[str]:
    ratio = ratio_of(twos, ones)
    numbers = (f"{median(ones):.1f}", f"{median(twos):.1f}")
    return [name, *numbers, f"{ratio.middle:.2f}", f"{ratio.low:.2f}", f"{ratio.high:.2f}"]


def _plot(report: HostsReport, path: Path) -> None:
    import matplotlib

    # No display on a server.
    matplotlib.use("agg")
    # Published with types for half of its calls.
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for hosts, style in ((ONE, "o-"), (TWO, "s--")):
        speeds = [median(report.speeds(hosts, streams)) for streams in report.streams]
        axes.plot(report.streams, speeds, style, label=hosts)
    axes.set_xscale("log", base=2)
    axes.set_xticks(report.streams, [str(streams) for streams in report.streams])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("concurrency")
    axes.set_title(f"{report.model}: steady tokens/s")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was found and what was written."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.hosts", description=__doc__)
    parser.add_argument("--model", choices=sorted(SIZES), default="bench")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--answer-tokens", type=int, default=96, help="2 or more")
    parser.add_argument("--prompts", type=int, default=5, help="of which the median is the TTFT of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of both meshes")
    parser.add_argument("--models-dir", type=Path, default=Path("state/bench-models"))
    parser.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"))
    parsed = parser.parse_args(arguments)
    if min(parsed.rounds, parsed.prompts, *parsed.streams) < 1 or parsed.answer_tokens < 2:
        parser.error("--rounds, --prompts and --streams must be 1 or more, --answer-tokens 2 or more")
    report = run(parsed)
    paths = write_report(report, parsed.output_dir)
    print("\n".join([*report.sentences(), *map(str, paths)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
