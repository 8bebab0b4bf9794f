"""Time and bytes between processes, from what the mesh counts about its own links."""

from __future__ import annotations

from dataclasses import dataclass

from tests.support.served.metrics_text import MetricsSnapshot

LINK_LABEL = "link"


@dataclass(frozen=True)
class HopFigures:
    """One link over a span of time."""

    link: str
    hops: int
    mean_s: float
    mean_bytes: float
    hops_per_token: float


def hop_figures(span: MetricsSnapshot, num_tokens: int) -> list[HopFigures]:
    """Of every link that carried something, by name; empty if the mesh counts no links."""
    seconds = span.by_label("moemesh_hop_seconds_sum", LINK_LABEL)
    counts = span.by_label("moemesh_hop_seconds_count", LINK_LABEL)
    # A histogram's sum or a plain counter: both say how many bytes went over the link.
    sizes = span.by_label("moemesh_hop_bytes_sum", LINK_LABEL) or span.by_label("moemesh_hop_bytes_total", LINK_LABEL)
    return [
        HopFigures(
            link=link,
            hops=int(count),
            mean_s=seconds[link] / count,
            mean_bytes=sizes.get(link, float("nan")) / count,
            hops_per_token=count / num_tokens,
        )
        for link, count in sorted(counts.items())
        if count > 0
    ]
