"""Looks at the mesh from outside while it is hurt: readiness, metrics, who runs, what processes hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from chaos.record.history import Abandoned, Asked, Ended, Event, Failed, MetricsSample, NodesSeen, Tokens
from chaos.record.metrics_text import is_whole, sum_metrics
from chaos.record.process_table import sample_process
from chaos.record.roles import Role, read_roles
from chaos.target import Node, Target, TargetError

LOOK_EVERY_S = 0.25
RECORD_EVERY_S = 1.0
WHOLE_FOR_S = 1.0
"""The mesh must look whole for so long: a death is noticed only after a moment."""


@dataclass(slots=True)
class Progress:
    """When each stream last got a token, and who is in mid-answer; fed with the events of the record."""

    last_token_s: dict[int, float] = field(default_factory=dict)
    _streams: dict[str, int] = field(default_factory=dict)
    _streaming: set[str] = field(default_factory=set)

    def see(self, event: Event) -> None:
        """One more event."""
        match event:
            case Asked():
                self._streams[event.operation] = event.stream
            case Tokens():
                self.last_token_s[self._streams[event.operation]] = event.at_s
                self._streaming.add(event.operation)
            case Ended() | Failed() | Abandoned():
                self._streaming.discard(event.operation)
                del self._streams[event.operation]
            case _:
                pass

    @property
    def num_streaming(self) -> int:
        """Answers that have begun and not ended."""
        return len(self._streaming)

    def all_since(self, at_s: float, num_streams: int) -> bool:
        """Whether every stream has got a token since then."""
        return sum(last_s >= at_s for last_s in self.last_token_s.values()) >= num_streams


@dataclass(slots=True)
class Observer:
    """`watch` runs beside the load; the rest answers questions."""

    http: httpx.AsyncClient
    target: Target
    record: Callable[[Event], None]
    clock: Callable[[], float]
    nodes: list[Node] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    whole_since_s: float | None = None
    """Since when the mesh has looked whole without a break; None while it does not."""
    _baseline: dict[str, float] = field(default_factory=dict)
    _num_nodes: int = 0
    _recorded_s: float = float("-inf")

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Once: who runs, and what /metrics says; an answer that does not come is an empty one."""
        await self.look_at_nodes()
        try:
            reply = await self.http.get(f"{self.target.url}/metrics")
            self.metrics = sum_metrics(reply.text) if reply.status_code == 200 else {}
            answers = reply.status_code == 200
        except (httpx.TransportError, TargetError):
            self.metrics, answers = {}, False
        now_s = self.clock()
        is_fine = answers and len(self.nodes) >= self._num_nodes and is_whole(self.metrics, self._baseline)
        if not is_fine:
            self.whole_since_s = None
        elif self.whole_since_s is None:
            self.whole_since_s = now_s
        if now_s - self._recorded_s >= RECORD_EVERY_S:
            self._recorded_s = now_s
            self.record(MetricsSample(now_s, self.metrics))

    async def look_at_nodes(self) -> list[Node]:
        """Who runs now, by name; what is new goes into the record."""
        try:
            nodes = await asyncio.to_thread(self.target.nodes)
        except TargetError:
            return self.nodes  # an engine that is busy; the next look is soon
        if nodes != self.nodes:
            self.record(NodesSeen(self.clock(), tuple(nodes)))
        self.nodes = nodes
        return nodes

    async def look_at_roles(self) -> dict[str, Role]:
        """What the router says that each node is for, by name; nothing where it does not say it."""
        try:
            reply = await self.http.get(f"{self.target.url}/mesh")
            return read_roles(reply.json(), self.nodes)
        except (httpx.TransportError, TargetError, ValueError):
            return {}

    async def take_baseline(self) -> None:
        """What `whole` means from now on."""
        await self.look()
        self._baseline, self._num_nodes = dict(self.metrics), len(self.nodes)

    def sample_processes(self) -> int:
        """Into the record; how many processes could be looked at."""
        samples = [sample_process(node, self.clock()) for node in self.nodes]
        for sample in samples:
            if sample is not None:
                self.record(sample)
        return sum(sample is not None for sample in samples)

    def record_metrics(self) -> None:
        """What the last look saw, now."""
        self.record(MetricsSample(self.clock(), self.metrics))

    async def wait_ready(self, timeout_s: float) -> str:
        """Empty once /ready says 200; else, after the timeout, what it said last."""
        deadline_s = self.clock() + timeout_s
        while True:
            try:
                reply = await self.http.get(f"{self.target.url}/ready")
                said = reply.text[:500]
                if reply.status_code == 200:
                    return ""
            except httpx.TransportError as error:
                said = str(error) or type(error).__name__
            if self.clock() > deadline_s:
                return said or "nothing"
            await asyncio.sleep(LOOK_EVERY_S)

    async def wait_whole(self, after_s: float, timeout_s: float) -> float | None:
        """When the mesh became whole for good after that time; None if it did not within the timeout."""
        deadline_s = self.clock() + timeout_s
        while self.clock() < deadline_s:
            since_s = self.whole_since_s
            if since_s is not None and self.clock() - max(since_s, after_s) >= WHOLE_FOR_S:
                return max(since_s, after_s)
            await asyncio.sleep(0.05)
        return None

    async def wait_quiet(self, timeout_s: float) -> bool:
        """Whether nothing runs, waits or holds a block within the timeout."""
        deadline_s = self.clock() + timeout_s
        while True:
            await self.look()
            busy = [self.metrics.get(f"moemesh_requests_{what}") for what in ("running", "waiting")]
            free, total = self.metrics.get("moemesh_kv_blocks_free"), self.metrics.get("moemesh_kv_blocks")
            if self.metrics and not any(busy) and free == total:
                return True
            if self.clock() > deadline_s:
                return False
            await asyncio.sleep(LOOK_EVERY_S)
