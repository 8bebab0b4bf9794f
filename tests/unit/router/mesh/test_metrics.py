"""Metrics as Prometheus reads them, from one status."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from common.ids import Generation, PipelineId
from common.messages import ExpertHeartbeat, StageHeartbeat
from common.topology import NodeKind
from services.router.control.membership import NodeState
from services.router.control.readiness import Redundancy
from services.router.engine import Readiness
from services.router.mesh.metrics import MeshCollector
from services.router.mesh.status import HopTotals, MeshStatus, NodeStatus
from services.router.scheduling.snapshot import SchedulerCounters, SchedulerSnapshot, WaitTimes
from tests.support.router.mesh_shapes import node

BEAT = StageHeartbeat(1.5, 4, 40, 3, 2, calls=6, call_seconds=0.75, call_bytes=600, resent=2)
EXPERT_BEAT = ExpertHeartbeat(1.5, 5, 40, 3, 2, queue_seconds=0.25, answer_bytes=400)


def scraped(status: MeshStatus) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    registry = CollectorRegistry()
    registry.register(MeshCollector(lambda: status))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def test_a_mesh_that_has_not_begun_has_all_its_numbers() -> None:
    values = scraped(MeshStatus(Readiness(False, "begins")))
    assert values[("moemesh_ready", ())] == 0
    assert values[("moemesh_tokens_generated_total", ())] == 0
    assert values[("moemesh_requests_ended_total", (("how", "finished"),))] == 0
    assert values[("moemesh_hop_seconds_count", (("link", "stage_to_expert"),))] == 0


def test_every_number_is_where_its_name_says() -> None:
    counters = SchedulerCounters(requests_finished=5, requests_failed=1, tokens_generated=77, failed_steps=2)
    stage, expert = node("s"), node("e", NodeKind.EXPERT)
    status = replace(
        MeshStatus(Readiness(False, "")),
        readiness=Readiness(True, ""),
        scheduler=SchedulerSnapshot(3, 2, 100, (), counters),
        nodes=(
            NodeStatus(stage, NodeState.ALIVE, BEAT, None),
            NodeStatus(expert, NodeState.SUSPECT, replace(EXPERT_BEAT, queued=9), None),
            NodeStatus(node("t"), NodeState.ALIVE, None, None),
        ),
        num_blocks={PipelineId(0): 30, PipelineId(1): 12},
        hops=HopTotals(8, 4.0, 123, calls=6, call_seconds=0.75, dropped=2),
        placement_version=11,
        redundancy=Redundancy(complete_mirrors=1, missing_mirrors=2, missing_copies=4, copies_to_load=5),
        generations={PipelineId(0): Generation(6)},
    )
    values = scraped(status)
    assert values[("moemesh_ready", ())] == 1
    assert values[("moemesh_requests_waiting", ())] == 3
    assert values[("moemesh_requests_running", ())] == 2
    assert values[("moemesh_requests_ended_total", (("how", "failed"),))] == 1
    assert values[("moemesh_tokens_generated_total", ())] == 77
    assert values[("moemesh_kv_blocks", ())] == 42
    assert values[("moemesh_missing_copies", ())] == 4
    assert values[("moemesh_copies_to_load", ())] == 5
    assert (values[("moemesh_mirrors_complete", ())], values[("moemesh_mirrors_missing", ())]) == (1, 2)
    assert values[("moemesh_placement_version", ())] == 11
    assert values[("moemesh_hop_seconds_count", (("link", "pipeline"),))] == 8
    assert values[("moemesh_hop_seconds_sum", (("link", "pipeline"),))] == 4.0
    assert values[("moemesh_hop_bytes_total", (("link", "pipeline"),))] == 123
    assert values[("moemesh_dropped_messages_total", ())] == 2
    assert values[("moemesh_nodes", (("kind", "stage"), ("state", "alive")))] == 2
    assert values[("moemesh_nodes", (("kind", "expert"), ("state", "suspect")))] == 1
    assert values[("moemesh_node_busy_seconds_total", (("kind", "stage"), ("node", "s")))] == 1.5
    assert values[("moemesh_node_queued", (("kind", "expert"), ("node", "e")))] == 9


def test_waits_are_a_cumulative_histogram() -> None:
    waits = WaitTimes()
    for wait_s in (0.005, 0.3, 0.4, 1000.0):
        waits.note(wait_s)
    status = MeshStatus(Readiness(False, ""))
    values = scraped(replace(status, scheduler=replace(status.scheduler, counters=SchedulerCounters(waits=waits))))
    buckets = {
        dict(labels)["le"]: value for (name, labels), value in values.items() if name.endswith("queue_seconds_bucket")
    }
    assert (buckets["0.005"], buckets["0.25"], buckets["0.5"], buckets["60.0"], buckets["+Inf"]) == (1, 1, 3, 3, 4)
    assert values[("moemesh_request_queue_seconds_count", ())] == 4
    assert values[("moemesh_request_queue_seconds_sum", ())] == pytest.approx(1000.705)


def test_names_of_counters_and_no_others_end_in_total() -> None:
    registry = CollectorRegistry()
    registry.register(MeshCollector(lambda: MeshStatus(Readiness(False, ""))))
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total"), sample.name


def test_what_the_dead_have_counted_stays_counted_and_the_living_are_not_counted_twice() -> None:
    totals = HopTotals(pipeline_steps=1)
    totals.keep(BEAT)
    totals.keep(EXPERT_BEAT)
    totals.keep(None)
    assert (totals.calls, totals.call_seconds, totals.call_bytes) == (6, 0.75, 600)
    assert (totals.answers, totals.queue_seconds, totals.answer_bytes) == (5, 0.25, 400)
    assert (totals.pipeline_steps, totals.resent, totals.dropped) == (1, 2, 4)
    living = (NodeStatus(node("u"), NodeState.ALIVE, BEAT, None),)
    assert totals.snapshot(living).calls == 12
    assert totals.snapshot(living).calls == 12
    assert totals.calls == 6


def test_what_stages_and_expert_nodes_count_of_their_calls_has_a_metric_each() -> None:
    totals = HopTotals()
    beat = replace(
        BEAT,
        hedged=5,
        hedge_wins=3,
        late_answers=2,
        suspicions=1,
        degraded_rows=8,
        rank_degree=2,
        reduce_seconds=1.5,
        reduces=30,
    )
    totals.keep(beat)
    totals.keep(replace(EXPERT_BEAT, cancelled=4))
    values = scraped(replace(MeshStatus(Readiness(False, "")), hops=totals))
    assert values[("moemesh_expert_hedges_total", ())] == 5
    assert values[("moemesh_expert_hedge_wins_total", ())] == 3
    assert values[("moemesh_expert_late_answers_total", ())] == 2
    assert values[("moemesh_expert_calls_cancelled_total", ())] == 4
    assert values[("moemesh_expert_suspicions_total", ())] == 1
    assert values[("moemesh_tp_reduce_seconds_count", ())] == 30
    assert values[("moemesh_tp_reduce_seconds_sum", ())] == 1.5
    assert values[("moemesh_degraded_rows_total", ())] == 8
