"""Ratios and cells of the tables."""

from __future__ import annotations

import math

from tests.benchmarks.peers.table import Row, best_of_peers, markdown_table, ratio_to, ratios

MESH = Row("mesh", False, "bf16", {"steady x1": 50.0, "TTFT p50": 400.0})
SLOW = Row("slow", True, "bf16", {"steady x1": 40.0, "TTFT p50": 1000.0})
FAST = Row("fast", True, "bf16", {"steady x1": 100.0, "TTFT p50": 200.0})
QUANTIZED = Row("small", True, "q4_0", {"steady x1": 300.0, "TTFT p50": 50.0})
ROWS = [MESH, SLOW, FAST, QUANTIZED]


def test_the_best_peer_is_the_fastest_on_the_same_weights() -> None:
    assert best_of_peers(ROWS, "steady x1") == 100
    assert best_of_peers(ROWS, "TTFT p50") == 200


def test_a_ratio_above_one_is_better_of_rates_and_of_times() -> None:
    assert ratio_to(100, 50, "steady x1") == 0.5
    assert ratio_to(200, 400, "TTFT p50") == 0.5
    assert ratios(ROWS, ["steady x1"])["small"] == {"steady x1": 3.0}


def test_without_peers_there_is_no_ratio() -> None:
    assert math.isnan(best_of_peers([MESH, QUANTIZED], "steady x1"))
    assert "| mesh | 50 |" in markdown_table([MESH, QUANTIZED], ["steady x1"], {})


def test_a_peer_without_a_figure_is_left_out_of_the_best_and_has_an_empty_cell() -> None:
    rows = [MESH, FAST, Row("none", True, "bf16", {}), Row("nan", True, "bf16", {"steady x1": math.nan})]
    assert best_of_peers(rows, "steady x1") == 100
    page = markdown_table(rows, ["steady x1"], {})
    assert "| none | - |" in page
    assert "| nan | - |" in page


def test_limits_are_below_the_keys_that_have_one() -> None:
    lines = markdown_table(ROWS, ["steady x1", "TTFT p50"], {"steady x1": 1600.4}).splitlines()
    assert lines[0] == "|  | steady x1 | TTFT p50 |"
    assert lines[2] == "| mesh | 50 (0.50) | 400 (0.50) |"
    assert lines[-1] == "| limit | 1,600 |  |"
