"""Prometheus metrics of the journal, read when somebody scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from services.router.journal.journal import JournalCounts


class JournalCollector(Collector):
    """Registered once; `counts` gives the newest counts."""

    def __init__(self, counts: Callable[[], JournalCounts]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """All families; see docs/metrics.md for what each means."""
        counts = self._counts()
        commits = SummaryMetricFamily("moemesh_journal_commit_seconds", "Commits of the journal, with their time")
        commits.add_metric([], counts.commits, counts.commit_s)
        yield commits
        yield CounterMetricFamily(
            "moemesh_journal_failed_commits", "Commits that the disk did not take", counts.failed_commits
        )
        yield GaugeMetricFamily(
            "moemesh_journal_writing", "0 while the disk takes nothing and new requests are refused", counts.is_writing
        )
        yield GaugeMetricFamily(
            "moemesh_journal_unwritten_steps", "Steps that wait in memory for the disk", counts.steps_unwritten
        )
        yield GaugeMetricFamily(
            "moemesh_journal_stuck_seconds",
            "How long the journal's disk has not answered; 0 while it does",
            counts.stuck_s,
        )
        yield CounterMetricFamily(
            "moemesh_journal_rewrites",
            "Times that the journal's files were gone and were written anew",
            counts.rewrites,
        )
        yield CounterMetricFamily(
            "moemesh_requests_restored",
            "Unfinished requests that were in the journal at start",
            counts.restored_requests,
        )
