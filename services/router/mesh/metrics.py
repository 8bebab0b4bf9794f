"""Prometheus metrics of the mesh, read from its last status at each scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from common.messages import StageHeartbeat
from services.router.mesh.status import MeshStatus
from services.router.scheduling.blocks.prefix_cache import PrefixCounters
from services.router.scheduling.snapshot import WAIT_BOUNDS_S, WaitTimes


class MeshCollector(Collector):
    """Registered once; `status` gives the newest status."""

    def __init__(self, status: Callable[[], MeshStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Yields all families; see docs/metrics.md for what each means."""
        status = self._status()
        yield from _requests(status)
        yield from _pipelines(status)
        yield from _hops(status)
        yield from _nodes(status)


def _requests(status: MeshStatus) -> Iterator[Metric]:
    scheduler, counters = status.scheduler, status.scheduler.counters
    yield GaugeMetricFamily("moemesh_ready", "1 if a token can be made end to end", int(status.readiness.ready))
    yield GaugeMetricFamily("moemesh_requests_waiting", "Requests in the queue", scheduler.num_waiting)
    yield GaugeMetricFamily("moemesh_requests_running", "Requests on a pipeline", scheduler.num_running)
    ended = CounterMetricFamily("moemesh_requests_ended", "Requests that ended", labels=["how"])
    ended.add_metric(["finished"], counters.requests_finished)
    ended.add_metric(["cancelled"], counters.requests_cancelled)
    ended.add_metric(["failed"], counters.requests_failed)
    yield ended
    for name, text, value in (
        ("moemesh_steps_planned", "Steps sent to pipelines", counters.steps_planned),
        ("moemesh_steps_planned_ahead", "Steps planned before their tokens were known", counters.steps_planned_ahead),
        ("moemesh_steps_with_drafts", "Steps in which tokens were guessed", counters.steps_with_drafts),
        ("moemesh_drafts_planned", "Guessed tokens sent to pipelines", counters.drafts_planned),
        ("moemesh_drafts_accepted", "Guessed tokens that were right", counters.drafts_accepted),
        ("moemesh_drafts_rejected", "Guessed tokens that came to nothing", counters.drafts_rejected),
        ("moemesh_tokens_planned", "Tokens computed by pipelines, prefill and decode", counters.tokens_planned),
        ("moemesh_tokens_generated", "Tokens sampled", counters.tokens_generated),
        ("moemesh_tokens_recomputed", "Cached tokens given up and computed again", counters.tokens_recomputed),
        ("moemesh_tokens_replayed", "Cached tokens rebuilt on one slot's new holder", counters.tokens_replayed),
        (
            "moemesh_requests_adopted",
            "Requests that kept their cache over a router's restart",
            counters.requests_adopted,
        ),
        ("moemesh_preemptions", "Requests sent back to the queue for want of KV blocks", counters.preemptions),
        ("moemesh_failed_steps", "Steps that a stage could not do", counters.failed_steps),
        (
            "moemesh_prefix_tokens_asked",
            "Prompt tokens that were looked for in the cache",
            counters.prefixes.tokens_asked,
        ),
        ("moemesh_prefix_blocks_entered", "KV blocks that became findable", counters.prefixes.blocks_entered),
        ("moemesh_prefix_blocks_evicted", "Cached KV blocks given to others", counters.prefixes.blocks_evicted),
        (
            "moemesh_session_blocks_saved",
            "Those of them that went to the session tier",
            counters.prefixes.tier.blocks_saved,
        ),
        (
            "moemesh_session_blocks_dropped",
            "KV blocks that found no room in the session tier, or left it",
            counters.prefixes.tier.blocks_dropped,
        ),
    ):
        yield CounterMetricFamily(name, text, value)
    yield from _found(counters.prefixes)
    yield _waits(counters.waits)


def _found(prefixes: PrefixCounters) -> Iterator[Metric]:
    tokens = CounterMetricFamily("moemesh_prefix_tokens_found", "Prompt tokens that were in the cache", labels=["tier"])
    blocks = CounterMetricFamily(
        "moemesh_prefix_blocks_found", "Cached KV blocks that requests went on with", labels=["tier"]
    )
    for family, found, restored in (
        (tokens, prefixes.tokens_found, prefixes.tier.tokens_restored),
        (blocks, prefixes.blocks_found, prefixes.tier.blocks_restored),
    ):
        family.add_metric(["pool"], found - restored)
        family.add_metric(["session"], restored)
        yield family


def _waits(waits: WaitTimes) -> Metric:
    bounds = [*(str(float(bound_s)) for bound_s in WAIT_BOUNDS_S), "+Inf"]
    return HistogramMetricFamily(
        "moemesh_request_queue_seconds",
        "From the arrival of a choice in the queue to its first place on a pipeline",
        buckets=list(zip(bounds, accumulate(waits.counts), strict=True)),
        sum_value=waits.total_s,
    )


def _pipelines(status: MeshStatus) -> Iterator[Metric]:
    scheduler, redundancy = status.scheduler, status.redundancy
    for name, text, value in (
        ("moemesh_pipelines_open", "Pipelines that take steps", len(scheduler.pipelines)),
        ("moemesh_kv_blocks", "KV blocks of all open pipelines", sum(status.num_blocks.values())),
        ("moemesh_kv_blocks_free", "KV blocks that no sequence holds", scheduler.num_free_blocks),
        ("moemesh_kv_blocks_cached", "KV blocks that hold a beginning to be found", scheduler.num_cached_blocks),
        ("moemesh_session_slots", "KV blocks that the session tiers have room for", scheduler.num_tier_slots),
        ("moemesh_session_slots_used", "KV blocks that are in there", scheduler.num_kept_blocks),
        ("moemesh_steps_in_flight", "Steps sent and not answered", scheduler.num_steps_in_flight),
        ("moemesh_missing_copies", "Safety copies of experts without room", redundancy.missing_copies),
        ("moemesh_copies_to_load", "Safety copies of experts that are not loaded yet", redundancy.copies_to_load),
        ("moemesh_mirrors_complete", "Slots whose mirror could take over now", redundancy.complete_mirrors),
        ("moemesh_mirrors_missing", "Slots that should have such a mirror", redundancy.missing_mirrors),
        ("moemesh_pipelines_suspended", "Pipelines that wait for a holder", status.suspended_pipelines),
        ("moemesh_placement_version", "Version of the expert placement", status.placement_version),
    ):
        yield GaugeMetricFamily(name, text, value)
    generations = GaugeMetricFamily("moemesh_pipeline_generation", "Grows when assigned anew", labels=["pipeline"])
    for pipeline, generation in sorted(status.generations.items()):
        generations.add_metric([str(pipeline)], generation)
    yield generations


def _hops(status: MeshStatus) -> Iterator[Metric]:
    hops = status.hops
    links = (
        ("pipeline", hops.pipeline_steps, hops.pipeline_seconds, hops.pipeline_bytes),
        ("stage_to_expert", hops.calls, hops.call_seconds, hops.call_bytes),
        ("expert_queue", hops.answers, hops.queue_seconds, hops.answer_bytes),
    )
    seconds = SummaryMetricFamily(
        "moemesh_hop_seconds",
        "Round trips: a step through its pipeline, an expert call until its sum, a call in an expert node's queue",
        labels=["link"],
    )
    sent = CounterMetricFamily("moemesh_hop_bytes", "Bytes sent on a link", labels=["link"])
    for link, count, total_seconds, total_bytes in links:
        seconds.add_metric([link], count, total_seconds)
        sent.add_metric([link], total_bytes)
    yield seconds
    yield sent
    for name, text, value in (
        ("moemesh_expert_calls_resent", "Calls repeated on another copy", hops.resent),
        ("moemesh_expert_hedges", "Calls asked of a further copy, since the first was late", hops.hedged),
        ("moemesh_expert_hedge_wins", "Hedges that answered first", hops.hedge_wins),
        ("moemesh_expert_late_answers", "Answers of expert nodes that were not used any more", hops.late_answers),
        ("moemesh_expert_calls_cancelled", "Calls taken back while they queued", hops.cancelled),
        ("moemesh_expert_suspicions", "Times that a stage took an expert node to hang", hops.suspicions),
        ("moemesh_degraded_rows", "Token rows that went on without one of their experts", hops.degraded_rows),
        ("moemesh_other_class_rows", "Rows of expert calls asked of another numeric class", hops.other_class_rows),
    ):
        yield CounterMetricFamily(name, text, value)
    yield SummaryMetricFamily(
        "moemesh_tp_reduce_seconds",
        "Putting the parts of a stage's ranks together, by its first rank, waits included",
        hops.reduces,
        hops.reduce_seconds,
    )
    yield CounterMetricFamily(
        "moemesh_dropped_messages",
        "Messages of an old term or generation, and results of steps that are not in flight",
        hops.dropped,
    )


def _nodes(status: MeshStatus) -> Iterator[Metric]:
    count = GaugeMetricFamily("moemesh_nodes", "Registered nodes", labels=["kind", "state"])
    busy = CounterMetricFamily("moemesh_node_busy_seconds", "Time spent computing", labels=["node", "kind"])
    rows = CounterMetricFamily("moemesh_node_rows", "Rows computed", labels=["node", "kind"])
    queued = GaugeMetricFamily("moemesh_node_queued", "Steps or calls waiting", labels=["node", "kind"])
    ranks = GaugeMetricFamily("moemesh_stage_ranks", "Ranks of a stage that work together", labels=["node"])
    numbers: Counter[tuple[str, str]] = Counter()
    for node in status.nodes:
        kind, name = node.description.kind.value, node.description.node_id
        numbers[kind, node.state.value] += 1
        if node.heartbeat is not None:
            busy.add_metric([name, kind], node.heartbeat.busy_seconds)
            rows.add_metric([name, kind], node.heartbeat.rows)
            queued.add_metric([name, kind], node.heartbeat.queued)
            if isinstance(node.heartbeat, StageHeartbeat):
                ranks.add_metric([name], node.heartbeat.rank_degree)
    for (kind, state), number in numbers.items():
        count.add_metric([kind, state], number)
    yield from (count, busy, rows, queued, ranks)
