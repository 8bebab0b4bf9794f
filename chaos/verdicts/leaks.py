"""Whether anything stays behind after a run: blocks, requests, memory, open files, sockets. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from chaos.record.history import Event, MetricsSeen, PhaseBegan, ProcessSeen
from chaos.suite_fields import Count, NotNegative, Section
from chaos.verdicts.verdict import Verdict, verdict_of

BACK_TO_ZERO = (
    "moemesh_requests_running",
    "moemesh_requests_waiting",
    "moemesh_steps_in_flight",
    "moemesh_tokens_reserved",
)
"""They must be 0 when there are no requests. One that a build does not have is not looked at, but for the first two."""
REQUIRED = BACK_TO_ZERO[:2]


class LeakBounds(Section):
    """How far a process may be above the baseline, which is that after the undisturbed requests."""

    rss_share: NotNegative = 0.35
    rss_mib: Count = 96
    """Growth up to either of them is not a leak: allocators keep what they have had."""
    files: Count = 16
    sockets: Count = 16


def leak_verdicts(events: Sequence[Event], bounds: LeakBounds, sees_processes: bool) -> list[Verdict]:
    """Judges the mesh, and its processes where the target lets us look at them."""
    verdicts = [_mesh_verdict(events)]
    if sees_processes:
        verdicts.append(_process_verdict(events, bounds))
    return verdicts


def _mesh_verdict(events: Sequence[Event]) -> Verdict:
    samples = [event for event in _of_phase(events, "end") if isinstance(event, MetricsSeen)]
    if not samples or not samples[-1].values:
        return verdict_of("leaks_mesh", [], ["/metrics did not answer after the run"], "")
    last = samples[-1].values
    damage, doubts = [], []
    free, total = last.get("moemesh_kv_blocks_free"), last.get("moemesh_kv_blocks")
    if free is None or total is None or total == 0:
        doubts.append("/metrics does not tell the KV blocks, or no pipeline is open")
    elif free != total:
        damage.append(f"{total - free:.0f} of {total:.0f} KV blocks are not free")
    for name in BACK_TO_ZERO:
        if name not in last:
            if name in REQUIRED:
                doubts.append(f"/metrics has no {name}")
        elif last[name] != 0:
            damage.append(f"{name} is {last[name]:g}, not 0")
    return verdict_of(
        "leaks_mesh", damage, doubts, f"all {total or 0:.0f} KV blocks are free and nothing runs or waits"
    )


def _process_verdict(events: Sequence[Event], bounds: LeakBounds) -> Verdict:
    baseline, last = _latest(_of_phase(events, "baseline")), _latest(_of_phase(events, "end"))
    if not baseline or not last:
        return verdict_of("leaks_processes", [], ["the processes were not looked at before and after"], "")
    damage, growth = [], 0
    for name, now in sorted(last.items()):
        # A node may have taken a larger part since: it is compared with the largest of its kind.
        before = [sample for sample in baseline.values() if sample.kind == now.kind]
        if not before:
            continue
        rss = max(sample.rss_bytes for sample in before)
        growth = max(growth, now.rss_bytes - rss)
        if now.rss_bytes > rss + max(bounds.rss_mib << 20, bounds.rss_share * rss):
            damage.append(f"{name}: {now.rss_bytes / 2**20:.0f} MiB, {rss / 2**20:.0f} before the faults")
        for what, value, limit, known in (
            ("open files", now.num_files, bounds.files, max(sample.num_files for sample in before)),
            ("sockets", now.num_sockets, bounds.sockets, max(sample.num_sockets for sample in before)),
        ):
            if value > known + limit:
                damage.append(f"{name}: {value} {what}, {known} before the faults")
    held = f"{len(last)} processes have about the memory, open files and sockets that they had before the faults"
    return verdict_of("leaks_processes", damage, [], held, {"largest_rss_growth_bytes": float(growth)})


def _of_phase(events: Iterable[Event], phase: str) -> Iterable[Event]:
    current = ""
    for event in events:
        if isinstance(event, PhaseBegan):
            current = event.phase
        elif current == phase:
            yield event


def _latest(events: Iterable[Event]) -> dict[str, ProcessSeen]:
    return {event.name: event for event in events if isinstance(event, ProcessSeen)}
