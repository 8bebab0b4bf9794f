"""What /metrics says, summed over labels. Pure."""

from __future__ import annotations

PREFIX = "moemesh_"
_LEFT_OUT = ("_bucket", "_created")


def sum_metrics(text: str) -> dict[str, float]:
    """Sums by sample name of the mesh's own metrics, without the buckets of histograms. Lines that are none are
    passed over."""
    sums: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith(PREFIX):
            continue
        series, _, value = line.rpartition(" ")
        name = series.partition("{")[0]
        if name.endswith(_LEFT_OUT):
            continue
        try:
            sums[name] = sums.get(name, 0.0) + float(value)
        except ValueError:
            continue
    return sums


def is_whole(now: dict[str, float], before: dict[str, float]) -> bool:
    """Whether the mesh is ready and has as many nodes, pipelines and copies as it had. What it had not told before
    is not asked for."""
    if now.get("moemesh_ready", 1.0) != 1.0:
        return False
    enough = ("moemesh_nodes", "moemesh_pipelines_open", "moemesh_mirrors_complete")
    if any(now.get(name, 0.0) < before[name] for name in enough if name in before):
        return False
    missing = "moemesh_missing_copies"
    return now.get(missing, 0.0) <= before.get(missing, now.get(missing, 0.0))
