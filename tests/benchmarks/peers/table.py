"""Rows of figures, each also as a ratio to the best peer that reads the same weights. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.benchmarks.report import table_of


@dataclass(frozen=True)
class Row:
    """One engine's figures by key; a key that is missing was not measured."""

    name: str
    is_peer: bool
    weights: str
    figures: Mapping[str, float]


def is_time(key: str) -> bool:
    """Whether less is better."""
    return key.startswith(("TTFT", "TPOT", "seconds"))


def best_of_peers(rows: Sequence[Row], key: str) -> float:
    """Returns the best figure among peers on bf16 weights; NaN if there is none."""
    found = [row.figures[key] for row in rows if row.is_peer and row.weights == "bf16" and key in row.figures]
    numbers = [figure for figure in found if not math.isnan(figure)]
    if not numbers:
        return math.nan
    return min(numbers) if is_time(key) else max(numbers)


def ratio_to(best: float, figure: float, key: str) -> float:
    """Returns how many times as fast as the best it is: above 1 is better, of times too."""
    return best / figure if is_time(key) else figure / best


def ratios(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, dict[str, float]]:
    """Returns them by row and key, for what was measured."""
    return {
        row.name: {key: ratio_to(best_of_peers(rows, key), row.figures[key], key) for key in keys if key in row.figures}
        for row in rows
    }


def markdown_table(rows: Sequence[Row], keys: Sequence[str], limits: Mapping[str, float]) -> str:
    """Returns one line a row, cells as `figure (ratio)`, and below them the limits of keys that have one."""
    found = ratios(rows, keys)
    lines = [[row.name, *(_cell(row, key, found[row.name]) for key in keys)] for row in rows]
    if any(key in limits for key in keys):
        lines.append(["limit", *(_number(limits[key]) if key in limits else "" for key in keys)])
    return table_of(["", *keys], lines)


def _cell(row: Row, key: str, ratio_by_key: Mapping[str, float]) -> str:
    if key not in row.figures or math.isnan(row.figures[key]):
        return "-"
    ratio = ratio_by_key[key]
    return _number(row.figures[key]) + ("" if math.isnan(ratio) else f" ({ratio:.2f})")


def _number(value: float) -> str:
    return f"{value:,.0f}"
