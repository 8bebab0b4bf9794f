"""What stands between the kernels of a layer, with one stream: messages, bells, wake-ups, Python, router and client.

    make bench-gaps BENCH_ARGS="--rounds 3"

One request of a one-token prompt, so that all steps are of one row. The kernels of a token come one after the other,
stage by stage; of a layer's expert nodes, which compute side by side, the one that has computed longer counts, over the
whole answer. So where now this node is the slower one and now that one, the difference counts as between kernels.

- of a call: from asking the experts until their sum is there, less the slower node's kernel;
- of a layer: the time of a token, as its reader sees it, less all its kernels, divided by the layers.

A node's time includes checking and copying what it is asked and what it answers, some microseconds. Each round starts
every mesh once, in an order that moves on by one each round. Prints a table of medians.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from common.processes.supervisor import LocalMesh
from tests.benchmarks.figures import round_figures
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.make_bench_model import SIZES, make_bench_model
from tests.benchmarks.report import table_of
from tests.benchmarks.serve_benchmark import READY_WITHIN_S, MeshUnderTest, PromptSource
from tests.support.served.metrics_text import MetricsSnapshot

GOAL_US = 75
PROMPT_TOKENS = 1
WARM_UP_TOKENS = 32
CALLS = "stage_to_expert"


@dataclass(frozen=True)
class Gaps:
    """One answer, all in microseconds."""

    token: float
    """From one token to the next."""
    stage_kernels: float
    """Of a token: of all its stages."""
    call: float
    """Of a layer: from asking its experts until their sum is there."""
    node_kernels: float
    """Of a layer: of the node that has computed longest."""
    layers: int

    @property
    def of_a_call(self) -> float:
        return self.call - self.node_kernels

    @property
    def of_a_layer(self) -> float:
        """The rest of the token, that between two steps too, divided by the layers."""
        return (self.token - self.stage_kernels) / self.layers - self.node_kernels


def gaps_of(span: MetricsSnapshot, token_s: float, layers: int) -> Gaps:
    """From what a mesh has counted while all its steps were of one row.

    Raises ValueError where there was no step, or no expert call.
    """
    rows, stage_s = (_by_node(span, f"moemesh_node_{what}_total", "stage") for what in ("rows", "busy_seconds"))
    node_s = _by_node(span, "moemesh_node_busy_seconds_total", "expert")
    calls = span.by_label("moemesh_hop_seconds_count", "link").get(CALLS, 0)
    worked = {node: count for node, count in rows.items() if count > 0}
    if not calls or not worked:
        raise ValueError("no step with an expert call was counted")
    return Gaps(
        token=1e6 * token_s,
        stage_kernels=1e6 * sum(stage_s[node] / count for node, count in worked.items()),
        call=1e6 * span.by_label("moemesh_hop_seconds_sum", "link")[CALLS] / calls,
        node_kernels=1e6 * max(node_s.values()) / calls,
        layers=layers,
    )


def _by_node(span: MetricsSnapshot, name: str, kind: str) -> dict[str, float]:
    return {
        dict(labels)["node"]: value
        for (sample, labels), value in span.samples.items()
        if sample == name and dict(labels)["kind"] == kind
    }


def measure(settings: Mapping[str, str], checkpoint: Path, source: PromptSource, layers: int, tokens: int) -> Gaps:
    """A mesh that is started for it, whose stages report what their kernels take."""
    state_dir = Path(tempfile.mkdtemp(prefix="gaps-"))
    # A text that happens to repeat itself must not have steps of more rows.
    environment = {"MODEL": str(checkpoint.resolve()), "PORT": "0", "DRAFT_TOKENS": "0", **settings}
    try:
        with LocalMesh(environment, state_dir, modules={"stage": "tests.benchmarks.timed_stage"}) as local:
            local.wait_ready(READY_WITHIN_S)
            mesh = MeshUnderTest(local)
            mesh.run_round(source.take(1, PROMPT_TOKENS), WARM_UP_TOKENS)
            before = mesh.metrics()
            timed = mesh.run_round(source.take(1, PROMPT_TOKENS), tokens)
            return gaps_of(mesh.metrics().since(before), round_figures(timed.streams).tpot_s, layers)
    finally:
        shutil.rmtree(state_dir, ignore_errors=True)


def run(parsed: argparse.Namespace) -> dict[str, list[Gaps]]:
    """By mesh, an entry a round."""
    checkpoint = make_bench_model(parsed.models_dir / f"{parsed.model}-bfloat16", parsed.model, "bfloat16")
    sizes = SIZES[parsed.model]
    source = PromptSource(sizes.vocabulary)
    found: dict[str, list[Gaps]] = {mesh: [] for mesh in parsed.mesh}
    for number in range(parsed.rounds):
        shift = number % len(parsed.mesh)
        for mesh in parsed.mesh[shift:] + parsed.mesh[:shift]:
            settings = dict(setting.split("=", 1) for setting in mesh.split(",") if setting)
            gaps = measure(settings, checkpoint, source, sizes.layers, parsed.answer_tokens)
            found[mesh].append(gaps)
            print(
                f"round {number + 1}: {name_of(mesh)}: {gaps.of_a_layer:.0f} us between a layer's kernels", flush=True
            )
    return found


def name_of(mesh: str) -> str:
    """Returns how a mesh is called in the table."""
    return mesh or "as it ships"


def table(found: Mapping[str, Sequence[Gaps]]) -> str:
    """Markdown: medians over the rounds, in microseconds, and a sentence about the goal for each mesh."""
    header = [
        "mesh",
        "a token",
        "its stages' kernels",
        "a layer's call",
        "slower node's kernel",
        "between, of a call",
        "between, of a layer",
    ]
    names = ("token", "stage_kernels", "call", "node_kernels", "of_a_call", "of_a_layer")
    rows, sentences = [], []
    for mesh, rounds in found.items():
        middle = {name: median(getattr(gaps, name) for gaps in rounds) for name in names}
        rows.append([name_of(mesh), *(f"{middle[name]:,.0f}" for name in names)])
        is_met = "met" if middle["of_a_layer"] <= GOAL_US else "not met"
        sentences.append(
            f"{name_of(mesh)}: {middle['of_a_layer']:.0f} us stand between the kernels of a layer, "
            f"{middle['of_a_call']:.0f} of them in its expert call; the goal of {GOAL_US} us is {is_met}."
        )
    return "\n\n".join(["All in us.", table_of(header, rows), *sentences])


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.kernel_gaps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=sorted(SIZES), default="bench")
    parser.add_argument("--mesh", nargs="+", default=["", "PP=1"], metavar="NAME=VALUE,...", help="settings of each")
    parser.add_argument("--answer-tokens", type=int, default=192, help="2 or more")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models-dir", type=Path, default=Path("state/bench-models"))
    parser.add_argument("--output", type=Path, help="also write JSON there")
    parsed = parser.parse_args(arguments)
    if parsed.rounds < 1 or parsed.answer_tokens < 2:
        parser.error("--rounds must be 1 or more, --answer-tokens 2 or more")
    machine, found = describe_machine(), run(parsed)
    if parsed.output:
        document = {"machine": asdict(machine), "model": parsed.model}
        document["meshes"] = {name_of(mesh): [asdict(gaps) for gaps in rounds] for mesh, rounds in found.items()}
        parsed.output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
