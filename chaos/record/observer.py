"""Looks at the mesh from outside while it is hurt: readiness, metrics, which processes run, what they hold."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from chaos.record.history import (
    Abandoned,
    Asked,
    Ended,
    Event,
    HarnessLate,
    MetricsSeen,
    NodesSeen,
    ProcessSeen,
    RequestFailed,
    Tokens,
)
from chaos.record.roles import Role, read_roles
from chaos.target import Node, Target, TargetError

PREFIX = "moemesh_"
_LEFT_OUT = ("_bucket", "_created")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
LOOK_EVERY_S = 0.25
RECORD_EVERY_S = 1.0
TICK_S = 0.05
LATE_FROM_S = 0.1
"""A harness that comes less late is not noted: the shortest bound on a gap is 0.15 s."""
WHOLE_FOR_S = 1.0
"""The mesh must look whole for this long, since a death is noticed only after a moment."""


@dataclass(slots=True)
class Progress:
    """Knows when each stream last got a token, and which are in mid-answer, from the events of the record."""

    last_token_s: dict[int, float] = field(default_factory=dict)
    _streams: dict[str, int] = field(default_factory=dict)
    _streaming: set[str] = field(default_factory=set)

    def see(self, event: Event) -> None:
        """Notes one more event."""
        match event:
            case Asked():
                self._streams[event.operation] = event.stream
            case Tokens():
                self.last_token_s[self._streams[event.operation]] = event.at_s
                self._streaming.add(event.operation)
            case Ended() | RequestFailed() | Abandoned():
                self._streaming.discard(event.operation)
                del self._streams[event.operation]
            case _:
                pass

    @property
    def num_streaming(self) -> int:
        """It counts the answers that have begun and not ended."""
        return len(self._streaming)

    def all_since(self, at_s: float, num_streams: int) -> bool:
        """Returns whether every stream has got a token since then."""
        return sum(last_s >= at_s for last_s in self.last_token_s.values()) >= num_streams


@dataclass(slots=True)
class Observer:
    """Looks at a mesh: `watch` runs beside the load, and the rest answers questions."""

    http: httpx.AsyncClient
    target: Target
    record: Callable[[Event], None]
    clock: Callable[[], float]
    nodes: list[Node] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    whole_since_s: float | None = None
    """The mesh has looked whole without a break since then; None while it does not."""
    _baseline: dict[str, float] = field(default_factory=dict)
    _num_nodes: int = 0
    _recorded_s: float = float("-inf")

    async def watch(self) -> None:
        """Looks again and again, until it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def watch_harness(self) -> None:
        """Notes when this process itself comes late, until it is cancelled."""
        while True:
            due_s = self.clock() + TICK_S
            await asyncio.sleep(TICK_S)
            now_s = self.clock()
            if now_s - due_s >= LATE_FROM_S:
                self.record(HarnessLate(now_s, now_s - due_s))

    async def look(self) -> None:
        """Looks once which processes run and what /metrics says; a missing answer counts as an empty one."""
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
            self.record(MetricsSeen(now_s, self.metrics))

    async def look_at_nodes(self) -> list[Node]:
        """Returns the processes that run now, by name; what is new goes into the record."""
        try:
            nodes = await asyncio.to_thread(self.target.nodes)
        except TargetError:
            return self.nodes  # an engine that is busy; the next look is soon
        if nodes != self.nodes:
            self.record(NodesSeen(self.clock(), tuple(nodes)))
        self.nodes = nodes
        return nodes

    async def look_at_roles(self) -> dict[str, Role]:
        """Returns what the router says that each node is for, by name; nothing where it does not say it."""
        try:
            reply = await self.http.get(f"{self.target.url}/mesh")
            return read_roles(reply.json(), self.nodes)
        except (httpx.TransportError, TargetError, ValueError):
            return {}

    async def set_baseline(self) -> None:
        """Looks at the mesh, which is called whole from now on when it has all that it has now."""
        await self.look()
        self._baseline, self._num_nodes = dict(self.metrics), len(self.nodes)

    def sample_processes(self) -> int:
        """Puts all processes into the record and returns how many could be looked at."""
        samples = [sample_process(node, self.clock()) for node in self.nodes]
        for sample in samples:
            if sample is not None:
                self.record(sample)
        return sum(sample is not None for sample in samples)

    def record_metrics(self) -> None:
        """Puts into the record what the last look has seen."""
        self.record(MetricsSeen(self.clock(), self.metrics))

    async def wait_ready(self, timeout_s: float) -> str:
        """Returns "" once /ready says 200, or else, after the timeout, what it said last."""
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
        """Returns when the mesh became whole for good after that time, or None if it did not within the timeout."""
        deadline_s = self.clock() + timeout_s
        while self.clock() < deadline_s:
            since_s = self.whole_since_s
            if since_s is not None and self.clock() - max(since_s, after_s) >= WHOLE_FOR_S:
                return max(since_s, after_s)
            await asyncio.sleep(0.05)
        return None

    async def wait_quiet(self, timeout_s: float) -> bool:
        """Returns whether, within the timeout, nothing runs, waits or holds a block any more."""
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


def sum_metrics(text: str) -> dict[str, float]:
    """Returns the text of /metrics as sums over labels, without the buckets of histograms.

    Only the mesh's own metrics are there, and lines that are none are passed over.
    """
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
    """Returns whether the mesh is ready and has as many nodes, pipelines and copies as it had.

    What it had not told before is not asked for.
    """
    if now.get("moemesh_ready", 1.0) != 1.0:
        return False
    enough = ("moemesh_nodes", "moemesh_pipelines_open", "moemesh_mirrors_complete")
    if any(now.get(name, 0.0) < before[name] for name in enough if name in before):
        return False
    missing = "moemesh_missing_copies"
    return now.get(missing, 0.0) <= before.get(missing, now.get(missing, 0.0))


def sample_process(node: Node, at_s: float) -> ProcessSeen | None:
    """Returns what the kernel says of a process, or None where it is gone or not ours to see, or there is no /proc."""
    folder = Path(f"/proc/{node.pid}")
    try:
        resident_pages = int((folder / "statm").read_text().split()[1])
        links = [_link(descriptor) for descriptor in (folder / "fd").iterdir()]
    except OSError:
        return None
    num_sockets = sum(link.startswith("socket:") for link in links)
    return ProcessSeen(
        at_s, node.name, node.kind, node.pid, resident_pages * _PAGE_BYTES, len(links) - num_sockets, num_sockets
    )


def _link(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except FileNotFoundError:
        return ""  # closed since the folder was read
