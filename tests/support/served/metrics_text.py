"""Reads what /metrics prints."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class MetricsSnapshot:
    """Values by sample name and sorted labels."""

    samples: dict[tuple[str, Labels], float]

    def value(self, name: str) -> float:
        """The sum over all labels. Raises KeyError if nothing has this name."""
        found = [value for (sample, _), value in self.samples.items() if sample == name]
        if not found:
            raise KeyError(f"/metrics has no {name}")
        return sum(found)

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """Sums by the value of one label; empty if nothing has this name."""
        sums: dict[str, float] = {}
        for (sample, labels), value in self.samples.items():
            if sample == name:
                key = dict(labels).get(label, "")
                sums[key] = sums.get(key, 0.0) + value
        return sums

    def since(self, earlier: MetricsSnapshot) -> MetricsSnapshot:
        """What was added; samples that are new count from 0."""
        return MetricsSnapshot({key: value - earlier.samples.get(key, 0.0) for key, value in self.samples.items()})


def read_metrics(text: str) -> MetricsSnapshot:
    """From Prometheus' text format."""
    return MetricsSnapshot(
        {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    )
