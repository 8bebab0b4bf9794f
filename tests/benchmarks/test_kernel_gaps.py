"""What counts as standing between kernels, on counters that were worked out by hand."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from common.compute.native_library import NativeKernels, load_native_kernels
from services.stage import process
from services.stage.service import StageService
from tests.benchmarks.kernel_gaps import Gaps, gaps_of, table
from tests.benchmarks.timed_stage import KERNELS, KernelClock
from tests.support.served.metrics_text import read_metrics

COUNTED = """
moemesh_node_rows_total{node="s1",kind="stage"} 100
moemesh_node_rows_total{node="s2",kind="stage"} 100
moemesh_node_rows_total{node="spare",kind="stage"} 0
moemesh_node_rows_total{node="e1",kind="expert"} 4000
moemesh_node_busy_seconds_total{node="s1",kind="stage"} 0.10
moemesh_node_busy_seconds_total{node="s2",kind="stage"} 0.15
moemesh_node_busy_seconds_total{node="spare",kind="stage"} 0
moemesh_node_busy_seconds_total{node="e1",kind="expert"} 0.16
moemesh_node_busy_seconds_total{node="e2",kind="expert"} 0.20
moemesh_hop_seconds_count{link="stage_to_expert"} 1000
moemesh_hop_seconds_sum{link="stage_to_expert"} 0.26
moemesh_hop_seconds_count{link="pipeline"} 100
"""


def test_a_layer_has_its_share_of_the_token_less_the_kernels_of_stages_and_of_the_slower_node() -> None:
    gaps = gaps_of(read_metrics(COUNTED), token_s=0.006, layers=10)
    assert gaps.stage_kernels == pytest.approx(1000 + 1500)
    assert (gaps.call, gaps.node_kernels) == pytest.approx((260, 200))
    assert gaps.of_a_call == pytest.approx(60)
    # 6,000 us less 2,500 on stages less ten times 200 on nodes.
    assert gaps.of_a_layer == pytest.approx(150)


def test_a_mesh_that_counted_no_call_is_refused() -> None:
    with pytest.raises(ValueError, match="no step"):
        gaps_of(read_metrics(""), 0.006, 10)


def test_the_table_has_medians_and_says_whether_the_goal_is_met() -> None:
    found = [Gaps(3000 + more, 1000, 160, 110, layers=10) for more in (0, 100, 900)]
    page = table({"": found})
    assert "| as it ships | 3,100 | 1,000 | 160 | 110 | 50 | 100 |" in page
    assert page.endswith(
        "100 us stand between the kernels of a layer, 50 of them in its expert call; the goal of 75 us is not met."
    )


def test_what_a_timed_stage_replaces_is_what_a_stage_uses() -> None:
    # Under another name it would replace nothing, and time nothing.
    assert vars(process)["load_native_kernels"] is load_native_kernels
    assert vars(process)["StageService"] is StageService


def test_the_kernels_that_are_timed_are_kernels_and_answer_as_before() -> None:
    assert set(KERNELS) <= {field.name for field in fields(NativeKernels)}
    now_s = 0.0

    def work(seconds: float) -> float:
        nonlocal now_s
        now_s += seconds
        return seconds

    values: dict[str, Any] = {field.name: None for field in fields(NativeKernels)}
    kernels = NativeKernels(**values | dict.fromkeys(KERNELS, work) | {"sum_experts": work})
    clock = KernelClock(lambda: now_s)
    timed: Any = clock.timed(kernels)
    assert timed.linear(2.0) == 2.0
    timed.sum_experts(4.0)
    timed.layer_half(1.0)
    assert clock.seconds == 3.0
