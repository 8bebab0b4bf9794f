"""What a stage says in its heartbeats: what it has done since start, and what it believes to be."""

from __future__ import annotations

from dataclasses import dataclass

from common.messages import Heartbeat
from services.stage.experts.client import ExpertClient
from services.stage.slot.mirror_link import MirrorLink
from services.stage.slot.stage_worker import SlotKeeper


@dataclass(slots=True)
class Counters:
    """What the loop itself counts, since start."""

    busy_seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    dropped: int = 0
    """Messages of an old term, generation, lease or role."""


def describe_stage(
    counters: Counters,
    keeper: SlotKeeper,
    experts: ExpertClient,
    mirror_link: MirrorLink,
    role_number: int,
    router_term: int,
) -> Heartbeat:
    """`role_number` of the last role that it was told, 0 for none; `router_term` of the router that it listens to."""
    slot, mirror = keeper.slot, keeper.mirror
    return Heartbeat(
        busy_seconds=counters.busy_seconds,
        steps=counters.steps,
        rows=counters.rows,
        queued=slot.executor.num_running if slot is not None else 0,
        dropped=counters.dropped + experts.late_answers,
        bytes_sent=keeper.bytes_sent + experts.nodes.bytes_sent + mirror_link.bytes_sent,
        hop_bytes=experts.nodes.bytes_sent,
        hop_seconds=experts.wait_seconds,
        hops=experts.answered,
        resent=experts.resent_calls,
        hedged=experts.hedged_calls,
        hedge_wins=experts.hedge_wins,
        late=experts.late_answers,
        suspicions=experts.num_suspicions,
        degraded_rows=experts.degraded_rows,
        other_class_rows=experts.other_class_rows,
        rank_degree=keeper.rank_degree,
        reduce_seconds=keeper.reduces[0],
        reduces=keeper.reduces[1],
        role_number=role_number,
        role_state=keeper.state_of(role_number),
        lease_term=keeper.lease_term,
        kv_mark=slot.held.marks.mark if slot is not None else 0,
        broken_stream=mirror.broken_stream if mirror is not None else 0,
        feed_number=mirror_link.feed_number,
        placement_version=experts.nodes.version_of(router_term),
    )
