"""The bounds of the prefix cache, on figures that are made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks.machine import Machine
from tests.benchmarks.prefix_cache import OFF, ON, CacheReport, Hits, write_report

MACHINE = Machine("cpu", 2, 4.0, "AVX512", "avx2", "6.1", "3.11", "2.13", "5.2", "abc", 0.1)
HITS = [Hits(1024, [200.0, 220.0], [20.0, 22.0], [992, 992]), Hits(16_384, [9000.0], [360.0], [16_352])]


def report(hits: list[Hits], off: list[float], on: list[float]) -> CacheReport:
    misses = {OFF: [{"TTFT x1, ms": value} for value in off], ON: [{"TTFT x1, ms": value} for value in on]}
    return CacheReport(MACHINE, "bench", {"PP": "1"}, hits, 256, 96, misses)


def test_a_hit_is_held_against_the_bound_of_its_length() -> None:
    assert report(HITS, [], []).sentences() == [
        "A prompt of 1,024 tokens, seen before: 0.100 of its time to the first token; the bound of 0.15 is met.",
        "A prompt of 16,384 tokens, seen before: 0.040 of its time to the first token; the bound of 0.03 is not met.",
    ]


def test_a_length_without_a_bound_is_measured_and_not_judged() -> None:
    found = report([replace(HITS[0], prompt_tokens=2048)], [], [])
    assert found.sentences() == []
    assert found.hit_comparisons()[0].ratio == pytest.approx(0.1)


def test_what_the_cache_makes_slower_is_named() -> None:
    off = [100.0 + number for number in range(20)]
    assert report([], off, [1.1 * value for value in off]).sentences() == [
        "Without a hit the cache makes TTFT x1, ms slower."
    ]
    equal = report([], off, [value * (1.02 if number % 2 else 0.98) for number, value in enumerate(off)])
    assert equal.sentences() == ["Without a hit the cache makes nothing slower."]


def test_the_page_has_a_table_for_each_part_that_was_run(tmp_path: Path) -> None:
    json_path, page_path = write_report(report(HITS, [100.0, 100.0], [100.0, 100.0]), tmp_path)
    page = page_path.read_text()
    assert "Tokens that were found the second time: 992 of 1,024, 16,352 of 16,384." in page
    assert "| TTFT of 16,384, ms | 9,000 | 360 | 0.040 |" in page
    assert "| TTFT x1, ms | 100 | 100 | 1.000 | 1.000 to 1.000 | no difference |" in page
    assert [row["verdict"] for row in json.loads(json_path.read_text())["comparisons"]] == [
        "better",
        "better",
        "no difference",
    ]
    assert "Prompts that share nothing" not in write_report(report(HITS, [], []), tmp_path)[1].read_text()
