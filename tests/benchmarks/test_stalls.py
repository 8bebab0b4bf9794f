"""The table of stalls, from reports that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.stalls import as_table, router_starts_s, rows_of


def fault(number: int, kind: str, gap_s: float, *victims: tuple[str, str], applied_s: float = 0.0) -> dict[str, Any]:
    kinds, roles = [{"kind": kind} for kind, _ in victims], [role for _, role in victims]
    return {
        "number": number,
        "kind": kind,
        "gap_p99_s": gap_s,
        "victims": kinds,
        "roles": roles,
        "applied_s": applied_s,
    }


def test_faults_are_put_together_by_kind_and_by_what_their_victims_were() -> None:
    holders = [fault(number, "pause", 0.3 + number / 100, ("stage", f"holder of 0/{number}")) for number in range(2)]
    pair = fault(5, "kill", 0.6, ("expert", "expert"), ("stage", "mirror of 0/1"))
    kept, broken = sorted(rows_of([*holders, pair], {}), key=lambda row: row.times, reverse=True)
    assert (kept.fault, kept.victims, kept.times, kept.is_kept) == ("pause", "holder", 2, True)
    assert (broken.victims, broken.is_kept) == ("expert + mirror", False)
    assert "exceeded" in as_table([kept, broken])


def test_what_a_killed_router_costs_is_told_without_the_start_of_its_process(tmp_path: Path) -> None:
    log = tmp_path / "router-0.log"
    stamps = ["2026-01-01T00:00:00Z", "2026-01-01T00:00:11.200000Z"]
    log.write_text("".join(json.dumps({"event": "listening", "timestamp": stamp}) + "\n" for stamp in stamps))
    report = {"faults": [fault(3, "kill", 1.5, ("router", ""), applied_s=10.0)]}
    starts_s = router_starts_s(report, log, 1767225600.0)
    assert abs(starts_s[3] - 1.2) < 1e-6
    (row,) = rows_of(report["faults"], starts_s)
    assert row.victims == "router, less its start"
    assert row.p99_s == pytest.approx(0.3)
    (without,) = rows_of(report["faults"], {})
    assert (without.victims, without.bound_s) == ("router", None)
