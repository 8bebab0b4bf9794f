"""How long streams stand still at each kind of loss: the chaos suite `stalls`, as a table of its faults.

    python -m tests.benchmarks.stalls                      # a local mesh, about 6 minutes
    python -m tests.benchmarks.stalls --target docker      # containers that run already: cuts, too

Each row is one kind of fault and of victim; each fault gives one figure, the extra gap of its streams (docs/chaos.md).
Writes the run's report, `stalls.json` and `stalls.md` to the output folder. Ends with status 1 where a bound is
exceeded or a token is wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from chaos.verdicts.verdict import percentile

ROUTER_EXCESS_S = 0.4
"""What a router that was killed may cost beyond the start of its process."""


@dataclass(frozen=True)
class Row:
    """All faults of one kind on one kind of victim."""

    fault: str
    victims: str
    times: int
    median_s: float
    p99_s: float
    bound_s: float | None
    """None: nothing is promised."""

    @property
    def is_kept(self) -> bool:
        return self.bound_s is None or self.p99_s <= self.bound_s


BOUNDS_S: Mapping[tuple[str, str], float] = {
    **{(kind, "expert"): 0.15 for kind in ("kill", "pause", "cut", "cpu_quota")},
    ("kill", "holder"): 0.25,
    ("pause", "holder"): 0.5,
    ("cut", "holder"): 0.5,
    **{(kind, f"expert + {role}"): 0.5 for kind in ("kill", "pause", "cut") for role in ("holder", "mirror")},
}


def rows_of(faults: Iterable[Mapping[str, Any]], starts_s: Mapping[int, float]) -> list[Row]:
    """`faults` as report.json has them; `starts_s`: by fault, how long a router that was killed took to listen again.

    What a killed router costs is told without that.
    """
    gaps: dict[tuple[str, str], list[float]] = {}
    for fault in faults:
        place = str(fault["kind"]), victims_of(fault)
        if place[1] == "router" and fault["number"] in starts_s:
            place = place[0], "router, less its start"
        gaps.setdefault(place, []).append(max(0.0, fault["gap_p99_s"] - starts_s.get(fault["number"], 0.0)))
    bounds = {**BOUNDS_S, ("kill", "router, less its start"): ROUTER_EXCESS_S}
    return [
        Row(kind, victims, len(found), statistics.median(found), percentile(found, 0.99), bounds.get((kind, victims)))
        for (kind, victims), found in sorted(gaps.items())
    ]


def victims_of(fault: Mapping[str, Any]) -> str:
    """`holder`, `mirror`, `expert`, `router`, or several of them."""
    roles = fault["roles"] or [""] * len(fault["victims"])
    words = [
        str(role).split(" of ")[0] or str(victim["kind"]) for victim, role in zip(fault["victims"], roles, strict=True)
    ]
    return " + ".join(sorted(words))


def router_starts_s(report: Mapping[str, Any], log: Path, began_unix_s: float) -> dict[int, float]:
    """By fault that killed the router: from the kill until the next one listened."""
    listened_s = [
        datetime.fromisoformat(line["timestamp"]).timestamp() - began_unix_s
        for line in _json_lines(log)
        if line.get("event") == "listening"
    ]
    found = {}
    for fault in report["faults"]:
        later_s = [at_s for at_s in listened_s if at_s > fault["applied_s"]]
        if fault["kind"] == "kill" and victims_of(fault) == "router" and later_s:
            found[fault["number"]] = min(later_s) - fault["applied_s"]
    return found


def as_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        f"| {row.fault} of {row.victims} | {row.times} | {row.median_s:.2f} | {row.p99_s:.2f} | "
        f"{'-' if row.bound_s is None else f'{row.bound_s:.2f}'} | {'' if row.is_kept else 'exceeded'} |"
        for row in rows
    ]
    head = "| fault | times | extra gap, median s | p99 s | bound s | |"
    return "\n".join([head, "| --- | --- | --- | --- | --- | --- |", *lines])


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(errors="replace").splitlines() if line.startswith("{")]


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="local")
    parser.add_argument("--suite", default="stalls")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("state/stalls"))
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "chaos", "run", "--target", arguments.target, "--suite", arguments.suite]
    command += ["--seed", str(arguments.seed), "--output", str(arguments.output), "--timing", "report"]
    status = subprocess.run(command, check=False).returncode
    if not (arguments.output / "report.json").exists():
        return status or 1
    report = json.loads((arguments.output / "report.json").read_text())
    began_unix_s = next(
        line["began_unix_s"] for line in _json_lines(arguments.output / "history.jsonl") if "began_unix_s" in line
    )
    starts_s = router_starts_s(report, arguments.output / "logs" / "router-0.log", began_unix_s)
    rows = rows_of(report["faults"], starts_s)
    figures = {"rows": [asdict(row) for row in rows], "router_starts_s": sorted(starts_s.values())}
    (arguments.output / "stalls.json").write_text(json.dumps(figures, indent=2) + "\n")
    (arguments.output / "stalls.md").write_text(as_table(rows) + "\n")
    print(f"\n{as_table(rows)}")
    if starts_s:
        said = ", ".join(f"{start_s:.2f}" for start_s in sorted(starts_s.values()))
        print(f"\na router that was killed listens again after {said} s")
    return status or int(not all(row.is_kept for row in rows))


if __name__ == "__main__":
    sys.exit(main())
