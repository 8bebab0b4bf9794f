"""Drafts beside none: tokens a second of a stream whose drafts are right at a known rate, and of prompt lookup.

    make bench-drafts BENCH_ARGS="--pairs 20 --mesh PP=1"

Drafts are recorded answers that err at the rate. Each pair streams one prompt twice from one mesh, once with
`drafts: off`, in the other order each time. What distinct bytes allow: with k drafts at rate r a step is expected to
make 1 + r + ... + r^k tokens, and reads the distinct weights of 1 + k rows; the best k counts, 0 among them. Beside it
stands what rows really take, by the router's own measure. Writes a table, a plot and all figures.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import random
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
from urllib.parse import urlsplit

import httpx

from common.processes.supervisor import LocalMesh
from services.router.scheduling.drafts.step_times import Manner
from tests.benchmarks.figures import round_figures
from tests.benchmarks.limits import step_weight_bytes
from tests.benchmarks.machine import Machine, describe_machine
from tests.benchmarks.make_bench_model import SIZES, BenchSizes, make_bench_model
from tests.benchmarks.recorded_drafts import Recording, read_steps
from tests.benchmarks.report import table_of, write_files
from tests.benchmarks.serve_benchmark import READY_WITHIN_S, PromptSource
from tests.benchmarks.streaming_client import run_round
from tests.benchmarks.two_builds import bootstrap_interval
from tests.support.served.metrics_text import read_metrics

GOAL = 0.9
"""Of what distinct bytes allow."""
RECORDED_PROMPTS = 5
WARM_UP_PAIRS = 1
SERVED_NAME = "drafts"
LEAST_STEPS = 5
"""Of a size, for its median to be told."""


@dataclass(frozen=True)
class Text:
    """What is asked: prompts, and how answers are drawn."""

    name: str
    prompts: list[list[int]]
    fields: dict[str, Any]


@dataclass(frozen=True)
class CaseFigures:
    """One source of drafts on one mesh."""

    mesh: str
    source: str
    rate: float | None
    """Of recorded answers; None: prompt lookup."""
    off_tokens_per_s: list[float]
    on_tokens_per_s: list[float]
    """An entry a pair."""
    accepted: int
    rejected: int
    ratio: float
    """The median of the pairs' ratios, on : off."""
    low: float
    high: float
    """Its 95% interval, by bootstrap."""
    allowed: float | None
    """What distinct bytes allow; not known where the rate is not."""
    step_ms: dict[str, dict[int, float]]
    """Median times of steps by manner and rows."""

    @property
    def sentence(self) -> str:
        """Returns what was found, and which goals are met."""
        found = f"{self.mesh}, {self.source}: {self.ratio:.3f} of no drafts ({self.low:.3f} to {self.high:.3f})"
        found += "; it is slower." if self.high < 1 else "; it is not slower."
        if self.allowed is not None:
            is_met = "met" if self.ratio >= GOAL * self.allowed else "not met"
            found += f" Distinct bytes allow {self.allowed:.2f}; the goal of {GOAL} of that is {is_met}."
        return found


@dataclass(frozen=True)
class DraftsReport:
    """What a run found."""

    machine: Machine
    model: str
    most_drafts: int
    prompt_tokens: int
    answer_tokens: int
    pairs: int
    cases: list[CaseFigures]


def expected_tokens(rate: float, num_drafts: int) -> float:
    """Returns how many tokens a step with so many drafts makes."""
    return sum(rate**place for place in range(num_drafts + 1))


def allowed_speedup(sizes: BenchSizes, rate: float, most_drafts: int) -> float:
    """Returns how many times as fast as without drafts the best number of drafts is, if a step takes as long as its
    distinct weights take to be read."""
    one = step_weight_bytes(sizes, 1)
    return max(
        expected_tokens(rate, count) * one / step_weight_bytes(sizes, 1 + count) for count in range(most_drafts + 1)
    )


@contextmanager
def mesh_with(
    settings: Mapping[str, str], checkpoint: Path, recording: Recording | None, folder: Path
) -> Iterator[LocalMesh]:
    """Starts a mesh, whose router drafts what is recorded, and ends it. Without a recording nothing is drafted."""
    state_dir = Path(tempfile.mkdtemp(prefix="drafts-"))
    environment = {"MODEL": str(checkpoint.resolve()), "PORT": "0", "SERVED_NAME": SERVED_NAME, **settings}
    modules = {}
    if recording is not None:
        path = folder / "recording.json"
        path.write_text(json.dumps(asdict(recording)))
        modules["router"] = f"tests.benchmarks.recorded_drafts {path}"
    try:
        with LocalMesh(environment, state_dir, modules=modules) as mesh:
            mesh.wait_ready(READY_WITHIN_S)
            yield mesh
    finally:
        shutil.rmtree(state_dir, ignore_errors=True)


def body_of(text: Text, number: int, answer_tokens: int, **fields: Any) -> dict[str, Any]:
    """Returns the request of one prompt."""
    prompt = text.prompts[number % len(text.prompts)]
    common = {"model": SERVED_NAME, "prompt": prompt, "max_tokens": answer_tokens, "ignore_eos": True}
    return common | text.fields | fields


def answer_of(mesh: LocalMesh, body: Mapping[str, Any]) -> list[int]:
    """Returns the tokens of an answer that is not streamed."""
    asked = {**body, "return_token_ids": True}
    reply = httpx.post(f"{mesh.url}/v1/completions", json=asked, timeout=600, trust_env=False)
    return list(reply.raise_for_status().json()["choices"][0]["token_ids"])


def tokens_per_s(mesh: LocalMesh, body: Mapping[str, Any]) -> float:
    """Returns the speed of one stream from its first token to its last."""
    address = urlsplit(mesh.url)
    timed = asyncio.run(run_round(address.hostname or "127.0.0.1", address.port or 80, [dict(body)]))
    if timed.streams[0].num_tokens != body["max_tokens"]:
        raise RuntimeError(f"asked for {body['max_tokens']} tokens, got {timed.streams[0].num_tokens}")
    return round_figures(timed.streams).steady_tokens_per_s


def drafts_of(mesh: LocalMesh) -> tuple[int, int]:
    """Returns how many drafts were accepted and rejected so far."""
    metrics = read_metrics(httpx.get(f"{mesh.url}/metrics", trust_env=False).text)
    accepted, rejected = (metrics.value(f"moemesh_drafts_{how}_total") for how in ("accepted", "rejected"))
    return int(accepted), int(rejected)


def measure(
    name: str, text: Text, answers: Sequence[Sequence[int]], rate: float | None, checkpoint: Path, parsed: Any
) -> CaseFigures:
    """Measures one source on a mesh that is started for it. Raises RuntimeError if drafts change an answer."""
    settings = dict(setting.split("=", 1) for setting in name.split(",") if setting)
    folder = Path(tempfile.mkdtemp(prefix="recording-"))
    steps_path = folder / "steps.txt"
    known = [] if rate is None else [[list(p), list(a)] for p, a in zip(text.prompts, answers, strict=True)]
    off: list[float] = []
    on: list[float] = []
    try:
        recording = Recording(known, rate or 0.0, str(steps_path))
        with mesh_with(settings | {"DRAFT_TOKENS": str(parsed.most)}, checkpoint, recording, folder) as mesh:
            for number in range(-WARM_UP_PAIRS, parsed.pairs):
                plain = body_of(text, number, parsed.answer_tokens, drafts="off")
                drafted = body_of(text, number, parsed.answer_tokens)
                order = ((off, plain), (on, drafted))
                for speeds, body in order if number % 2 == 0 else order[::-1]:
                    speeds.append(tokens_per_s(mesh, body))
            accepted, rejected = drafts_of(mesh)
            if answer_of(mesh, body_of(text, 0, parsed.answer_tokens)) != list(answers[0]):
                raise RuntimeError("drafts have changed an answer")
        steps = read_steps(steps_path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    off, on = off[WARM_UP_PAIRS:], on[WARM_UP_PAIRS:]
    ratios = [with_drafts / without for with_drafts, without in zip(on, off, strict=True)]
    low, high = bootstrap_interval(ratios, random.Random(0))
    return CaseFigures(
        mesh=name or "as it ships",
        source=f"prompt lookup, {text.name}" if rate is None else f"right at {rate}",
        rate=rate,
        off_tokens_per_s=off,
        on_tokens_per_s=on,
        accepted=accepted,
        rejected=rejected,
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        allowed=None if rate is None else allowed_speedup(SIZES[parsed.model], rate, parsed.most),
        step_ms=medians_ms(steps),
    )


def medians_ms(steps: Mapping[tuple[Manner, int], Sequence[float]]) -> dict[str, dict[int, float]]:
    """Returns median times of the sizes that there were enough steps of, by manner and rows."""
    found: dict[str, dict[int, float]] = {}
    for (manner, num_rows), seconds in sorted(steps.items(), key=lambda item: (item[0][0].value, item[0][1])):
        if len(seconds) >= LEAST_STEPS:
            found.setdefault(manner.value, {})[num_rows] = 1000 * statistics.median(seconds)
    return found


def texts(source: PromptSource, prompt_tokens: int) -> tuple[Text, Text]:
    """Returns one that never repeats itself but by chance, and one that repeats what it says: as large a bias as there
    is towards a few tokens leaves a random model no choice."""
    prompts = source.take(RECORDED_PROMPTS, prompt_tokens)
    (chosen,) = source.take(1, 8)
    bias = dict.fromkeys(map(str, chosen), 100)
    return (
        Text("text that does not repeat", prompts, {"temperature": 1.0, "seed": 1}),
        Text("text that repeats", source.take(RECORDED_PROMPTS, prompt_tokens), {"temperature": 0, "logit_bias": bias}),
    )


def run(parsed: argparse.Namespace) -> DraftsReport:
    """All sources on all meshes, with a line about each as soon as it is there."""
    machine = describe_machine()
    checkpoint = make_bench_model(parsed.models_dir / f"{parsed.model}-bfloat16", parsed.model, "bfloat16")
    random_text, repeating_text = texts(PromptSource(SIZES[parsed.model].vocabulary), parsed.prompt_tokens)
    answers: dict[str, list[list[int]]] = {}
    with mesh_with({"PP": "1"}, checkpoint, None, Path()) as mesh:
        for text in (random_text, repeating_text):
            bodies = [body_of(text, number, parsed.answer_tokens) for number in range(RECORDED_PROMPTS)]
            answers[text.name] = [answer_of(mesh, body) for body in bodies]
    cases: list[CaseFigures] = []
    wanted = [(random_text, rate) for rate in parsed.rates]
    if parsed.lookup:
        wanted += [(random_text, None), (repeating_text, None)]
    for name in parsed.mesh:
        for text, rate in wanted:
            cases.append(measure(name, text, answers[text.name], rate, checkpoint, parsed))
            print(cases[-1].sentence, flush=True)
    return DraftsReport(
        machine, parsed.model, parsed.most, parsed.prompt_tokens, parsed.answer_tokens, parsed.pairs, cases
    )


def write_report(report: DraftsReport, directory: Path) -> list[Path]:
    """Writes the three files and returns their paths."""
    document = asdict(report) | {"sentences": [case.sentence for case in report.cases]}
    return write_files(directory, "drafts", document, markdown(report), partial(_plot, report))


def markdown(report: DraftsReport) -> str:
    """Returns a page: machine, goals, tables."""
    machine = report.machine
    sections = [
        f"# Drafts on {report.model}",
        f"One stream through HTTP, prompts of {report.prompt_tokens} tokens, answers of {report.answer_tokens}, at "
        f"most {report.most_drafts} drafts in a step; {report.pairs} pairs with and without drafts from the same mesh. "
        "Answers are equal, token by token.",
        f"Machine: {machine.cpu}, {machine.cores} cores ({machine.instruction_set}); moemesh {machine.commit}; load "
        f"average {machine.load_average} at the start.",
        *(case.sentence for case in report.cases),
        "![plot](drafts.png)",
        table_of(["mesh", "drafts", "off", "on", "ratio", "95% interval", "bytes allow", "accepted"], _rows(report)),
        "Steps by rows, with drafts: median ms, times that of a row that is planned ahead, and what their bytes are "
        "times those of one.",
        table_of(["mesh", "drafts", "rows", "ms", "ratio", "bytes"], _step_rows(report)),
    ]
    return "\n\n".join(text if text.startswith("|") else textwrap.fill(text, 120) for text in sections) + "\n"


def _rows(report: DraftsReport) -> list[list[str]]:
    return [
        [
            case.mesh,
            case.source,
            f"{statistics.median(case.off_tokens_per_s):.1f}",
            f"{statistics.median(case.on_tokens_per_s):.1f}",
            f"{case.ratio:.3f}",
            f"{case.low:.3f} to {case.high:.3f}",
            "-" if case.allowed is None else f"{case.allowed:.2f}",
            f"{case.accepted} of {case.accepted + case.rejected}",
        ]
        for case in report.cases
    ]


def _step_rows(report: DraftsReport) -> list[list[str]]:
    sizes, found = SIZES[report.model], []
    for case in report.cases:
        one_ms = case.step_ms.get(Manner.AHEAD.value, {}).get(1)
        for num_rows, step_ms in case.step_ms.get(Manner.DRAFTED.value, {}).items():
            ratio = "-" if one_ms is None else f"{step_ms / one_ms:.2f}"
            of_bytes = step_weight_bytes(sizes, num_rows) / step_weight_bytes(sizes, 1)
            found.append([case.mesh, case.source, str(num_rows), f"{step_ms:.2f}", ratio, f"{of_bytes:.2f}"])
    return found


def _plot(report: DraftsReport, path: Path) -> None:
    import matplotlib

    # No display on a server.
    matplotlib.use("agg")
    # Published with types for half of its calls.
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    rated = [case for case in report.cases if case.rate is not None]
    for mesh, style in zip(dict.fromkeys(case.mesh for case in rated), ("o-", "s--", "^:"), strict=False):
        of_mesh = [case for case in rated if case.mesh == mesh]
        axes.plot([case.rate for case in of_mesh], [case.ratio for case in of_mesh], style, label=mesh)
    allowed = {case.rate: case.allowed for case in rated}
    axes.plot(list(allowed), list(allowed.values()), "k-.", label="distinct bytes allow")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("drafts that are right")
    axes.set_title(f"{report.model}: tokens/s with drafts : without")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was found and what was written."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.drafts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=sorted(SIZES), default="bench")
    parser.add_argument("--mesh", nargs="+", default=["", "PP=1"], metavar="NAME=VALUE,...", help="settings of each")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.5, 0.8, 0.95], help="at which drafts are right")
    parser.add_argument("--no-lookup", dest="lookup", action="store_false", help="leave prompt lookup out")
    parser.add_argument("--most", type=int, default=15, help="drafts in a step")
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--answer-tokens", type=int, default=256, help="2 or more")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--models-dir", type=Path, default=Path("state/bench-models"))
    parser.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"))
    parsed = parser.parse_args(arguments)
    if min(parsed.pairs, parsed.most, parsed.prompt_tokens) < 1 or parsed.answer_tokens < 2:
        parser.error("--pairs, --most and --prompt-tokens must be 1 or more, --answer-tokens 2 or more")
    report = run(parsed)
    print("\n".join(map(str, write_report(report, parsed.output_dir))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
