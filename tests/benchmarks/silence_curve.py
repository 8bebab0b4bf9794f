"""How soon a stopped node is seen, against how often one that lives is taken for stopped: from a recorded trace. Pure.

    python -m tests.benchmarks.oversubscription --minutes 60 --trace trace.txt
    python -m tests.benchmarks.silence_curve trace.txt

Every rule is held against the same silences: nothing has to run again for another threshold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.node.silence import EARLY, MEMORY_S, PATIENT, Patience, RecentLongest

CONSTANTS_S = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)
FACTORS = (1.25, 1.5, 2.0, 3.0)
SHORTEST_S = (0.12, 0.15, 0.2, 0.25, 0.3)


@dataclass(frozen=True)
class Silence:
    """One that ended with an echo: nobody was dead."""

    at_s: float
    link: str
    seconds: float
    """Without an echo."""
    unanswered_s: float
    """Without an echo or an answer: what is judged."""


@dataclass(frozen=True)
class RuleOutcome:
    """What a rule would have made of a trace."""

    rule: str
    false_deaths: int
    false_deaths_an_hour: float
    """Of the mesh, not of a link."""
    detection_mean_s: float
    """From the first ping that others echo and a stopped node does not; a ping interval and a turn come on top."""
    detection_p99_s: float
    judged_share: float
    """Of the silences, those at which the link was judged at all."""


def read_trace(lines: Iterable[str]) -> list[Silence]:
    """Lines of `recording_router`."""
    found = [line.split() for line in lines]
    return [Silence(float(at), link, float(seconds), float(unanswered)) for at, link, seconds, unanswered in found]


def constant_rule(trace: Sequence[Silence], threshold_s: float) -> RuleOutcome:
    """Every link after the same time."""
    count = sum(silence.unanswered_s > threshold_s for silence in trace)
    name = f"constant {threshold_s:g} s"
    return RuleOutcome(name, count, count / _hours(trace), threshold_s, threshold_s, 1.0)


def adaptive_rule(trace: Sequence[Silence], patience: Patience) -> RuleOutcome:
    """Each link by what it has shown, as `SilenceWatch` does it."""
    shown: dict[str, RecentLongest] = {}
    counts: dict[str, int] = {}
    allowed_s: list[float] = []
    deaths = 0
    for silence in trace:
        longest = shown.setdefault(silence.link, RecentLongest(MEMORY_S))
        counts[silence.link] = counts.get(silence.link, 0) + 1
        explained_s = patience.explained_s(counts[silence.link], longest.value_s)
        if explained_s is not None:
            allowed_s.append(explained_s)
            deaths += silence.unanswered_s > explained_s
        longest.add(silence.at_s, silence.seconds)
    allowed_s.sort()
    return RuleOutcome(
        f"{patience.factor:g} x longest, {patience.shortest_s:g} to {patience.longest_s:g} s",
        deaths,
        deaths / _hours(trace),
        sum(allowed_s) / max(1, len(allowed_s)),
        allowed_s[int(0.99 * (len(allowed_s) - 1))] if allowed_s else 0.0,
        len(allowed_s) / max(1, len(trace)),
    )


def curve(trace: Sequence[Silence]) -> list[RuleOutcome]:
    """All rules."""
    early = [replace(EARLY, factor=factor, shortest_s=shortest_s) for factor in FACTORS for shortest_s in SHORTEST_S]
    return [constant_rule(trace, threshold_s) for threshold_s in CONSTANTS_S] + [
        adaptive_rule(trace, patience) for patience in (*early, PATIENT)
    ]


def as_table(outcomes: Sequence[RuleOutcome]) -> str:
    """Markdown."""
    rows = [
        f"| {o.rule} | {o.false_deaths} | {o.false_deaths_an_hour:.2f} | {o.detection_mean_s:.2f} | "
        f"{o.detection_p99_s:.2f} | {o.judged_share:.0%} |"
        for o in outcomes
    ]
    head = (
        "| rule | false deaths | an hour | detection, mean s | p99 s | judged |\n| --- | --- | --- | --- | --- | --- |"
    )
    return "\n".join([head, *rows])


def _hours(trace: Sequence[Silence]) -> float:
    return max(1e-9, (trace[-1].at_s - trace[0].at_s) / 3600) if trace else 1.0


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with arguments.trace.open() as lines:
        trace = read_trace(lines)
    outcomes = curve(trace)
    if arguments.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
    else:
        longest_s = sorted((silence.unanswered_s for silence in trace), reverse=True)[:10]
        print(f"{len(trace)} silences in {_hours(trace):.2f} hours; the longest: {longest_s}\n")
        print(as_table(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
