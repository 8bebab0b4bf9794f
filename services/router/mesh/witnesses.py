"""What connections and pulses say of nodes: who opened, closed, refuses, or is silent. In the mesh thread."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set

import structlog

from common.ids import NodeId
from common.node.silence import EARLY, PATIENT, SilenceSettings, SilenceWatch
from common.topology import NodeDescription
from common.wire.transport import LinkEvent
from services.router.control.membership import Membership, MembershipChange
from services.router.mesh.sockets import MeshClient

WAIT_MS = 50
ALONE = "nobody is taken for dead: this host may be what is cut off, or what stood still"
LATE = "many come back late: this host's own link loses packets, so that nodes are given longer"
SUSPICIOUS_S = 0.06
"""Longer than from one ping to the next."""
SUSPENSE_MS = 10
"""While a node is behind: a turn that comes 40 ms later sees a loss 40 ms later."""


class Witnesses:
    """`look` is called in each turn of the loop."""

    def __init__(self, client: MeshClient, membership: Membership, log: structlog.stdlib.BoundLogger) -> None:
        self._client = client
        self._membership = membership
        self._log = log
        self._watch = SilenceWatch(SilenceSettings())
        self._told: frozenset[NodeId] = frozenset()
        self._was_alone = self._was_late = False
        self._is_suspense = False

    @property
    def wait_ms(self) -> int:
        """How long the loop may wait for a socket to say something."""
        return SUSPENSE_MS if self._is_suspense else WAIT_MS

    def look(
        self,
        now_s: float,
        nodes: Mapping[NodeId, NodeDescription],
        replaceable: Callable[[Set[NodeId]], Sequence[NodeId]],
    ) -> list[MembershipChange]:
        """What has changed by them. `replaceable`: of nodes that are silent, those in whose place somebody goes on at
        once. There a wrong death costs little, and a right one saves much."""
        changes: list[MembershipChange] = []
        opened, closed = self._membership.lifeline_opened, self._membership.lifeline_closed
        witnesses = {LinkEvent.CONNECTED: opened, LinkEvent.CLOSED: closed}
        for node_id, event in self._client.lifeline_events():
            if (node := nodes.get(node_id)) is not None:
                witness = witnesses.get(event, self._membership.lifeline_refused)
                changes += witness(node_id, node.incarnation, now_s)
        self._exchange_pulses(now_s, nodes)
        self._membership.is_alone, self._membership.is_late = self._watch.is_alone, self._watch.is_late
        early, long = (frozenset(map(NodeId, self._watch.silent(nodes, patience))) for patience in (EARLY, PATIENT))
        self._tell(early)
        for node_id in sorted({*replaceable(early), *long}):
            changes += self._membership.pulse_lost(node_id, nodes[node_id].incarnation)
        return changes

    def answered(self, node_ids: Iterable[NodeId], ago_s: float) -> None:
        """These have all had a part in a step that was sent so long ago and has come back."""
        for node_id in node_ids:
            self._watch.answered(node_id, ago_s)

    def forget(self, node_id: NodeId) -> None:
        """It is gone; one that is not known is no error."""
        self._watch.forget(node_id)

    def _exchange_pulses(self, now_s: float, nodes: Collection[NodeId]) -> None:
        is_due = self._watch.turn(now_s)
        for node_id, ping in self._client.echoes():
            if node_id in nodes:  # one that was declared dead may still answer
                self._watch.echoed(node_id, ping)
        self._is_suspense = any(self._watch.silence_s(node_id) > SUSPICIOUS_S for node_id in nodes)
        if is_due:
            self._client.ping(nodes, self._watch.last_ping)

    def _tell(self, silent: frozenset[NodeId]) -> None:
        for node_id in sorted(silent - self._told):
            silent_s, explained_s = self._watch.silence_s(node_id), self._watch.explained_s(node_id, EARLY)
            self._log.info("node_silent", node=node_id, silent_s=round(silent_s, 3), explained_s=explained_s)
        self._told = silent
        if self._watch.is_alone and not self._was_alone:
            self._log.warning("all_nodes_silent", detail=ALONE)
        if self._watch.is_late and not self._was_late:
            self._log.warning("many_nodes_late", detail=LATE)
        self._was_alone, self._was_late = self._watch.is_alone, self._watch.is_late
