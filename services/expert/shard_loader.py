"""The shards that the router wants held: load what is missing off the message loop, drop the rest, report."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import structlog
import torch

from common.checkpoint.model_config import ModelConfig
from common.checkpoint.weights import CheckpointWeights
from common.compute.device import HOST, Device
from common.compute.device_errors import refusal_to_load
from common.compute.native_library import NativeKernels
from common.errors import MoemeshError
from common.messages import AssignShards, Hello, ShardsReady, TensorFrame
from common.node.control_link import ControlLink
from common.node.loader_thread import LoaderThread
from common.topology import ShardId
from common.wire.array import array_to_frame, frame_to_array
from common.wire.tensor import DTYPES
from services.expert.shard_store import ShardStore

PROGRESS_INTERVAL_S = 0.2
LOADS_AHEAD = 8
"""Shards that the loader's thread has in hand, so that it need not wait for the loop between two small ones."""
RETRY_S = 5.0


@dataclass(slots=True)
class ShardAssignment:
    """What the router wants held, and how far that is."""

    version: int
    router_term: int = 0
    wanted: frozenset[ShardId] = frozenset()
    missing: deque[ShardId] = field(default_factory=deque)
    """Shards still to be loaded, in that order."""
    urgent: set[ShardId] = field(default_factory=set)
    """Those of the missing ones that no other node can be asked for."""
    retry_at_s: dict[ShardId, float] = field(default_factory=dict)
    """Shards that could not be loaded, and when to try again: a full disk or memory may have room by then."""
    reported: bool = False
    next_report_s: float = 0.0


class HeldShards:
    """The shards that an expert process holds, and what it loads them with. They outlive an incarnation."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Path,
        kernels: NativeKernels | None = None,
        device: Device = HOST,
        thread: LoaderThread | None = None,
    ) -> None:
        """`device`: where the shards are."""
        self.config = config
        self.checkpoint = checkpoint
        self.device = device
        self.thread = thread or LoaderThread()
        self.kernels = kernels
        self.store: ShardStore | None = None
        """None before the router has said how experts are cut."""

    def cut(self, num_slices: int, dtype: torch.dtype) -> ShardStore:
        """Returns the store for experts that are cut so, in this dtype: the one that there is, or an empty one in its
        place."""
        if self.store is None or (self.store.num_slices, self.store.dtype) != (num_slices, dtype):
            self.store = ShardStore(self.config, num_slices, dtype, self.kernels)
        return self.store


class ShardLoader:
    """Holds what the newest assignment wants. The owner calls `poll` in each round of its loop."""

    def __init__(
        self,
        held: HeldShards,
        control: ControlLink,
        log: structlog.stdlib.BoundLogger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`held` may have shards of an incarnation before this one, whose load ends before another begins."""
        self.held = held
        self._control = control
        self._log = log
        self._clock = clock
        self._weights: CheckpointWeights | None = None
        """None before its index has been read."""
        self._opening: Future[CheckpointWeights] | None = None
        self._open_at_s = 0.0
        # Nothing is wanted or let go before the router says so.
        self._assignment = ShardAssignment(version=0, reported=True)
        self.num_reports = 0
        """Reports made so far, which may have been lost."""
        self._loading: deque[tuple[ShardId, Future[None]]] = deque()

    @property
    def is_loading(self) -> bool:
        """Returns whether the loader has something in hand."""
        return self._opening is not None or bool(self._loading)

    @property
    def version(self) -> int:
        """Returns the version of what this router has assigned; 0: nothing yet."""
        return self._assignment.version if self._assignment.router_term == self._control.router_term else 0

    def assign(self, message: AssignShards, router_term: int) -> bool:
        """Holds these shards from now on; told again, says once more what is held. False for an older assignment, which
        changes nothing. Raises ProtocolError, NotReadyError."""
        stamp, newest = (router_term, message.version), (self._assignment.router_term, self._assignment.version)
        if stamp == newest:
            self._assignment.reported, self._assignment.next_report_s = False, 0.0
        elif stamp > newest:
            self._replace_assignment(message, router_term)
        return stamp >= newest

    def _replace_assignment(self, message: AssignShards, router_term: int) -> None:
        num_slices, dtype = self._control.settings.num_slices, DTYPES[self._control.settings.dtype]
        shape = (self.held.config.num_layers, self.held.config.num_experts, num_slices)
        bitmap = frame_to_array(message.shards, "uint8", shape, "AssignShards.shards")
        former, store = self.held.store, self.held.cut(num_slices, dtype)
        if store is not former:
            self._weights, self._opening, self._open_at_s = None, None, 0.0
        wanted = frozenset(ShardId(*place) for place in np.argwhere(bitmap).tolist())
        in_hand = {shard for shard, _ in self._loading}
        absent = wanted.difference(store)
        urgent = {shard for shard in absent if bitmap[shard] > 1}
        missing = deque(sorted(absent - in_hand, key=lambda shard: (shard not in urgent, shard)))
        self._assignment = ShardAssignment(message.version, router_term, wanted, missing, urgent)
        self._drop_unwanted(store)
        self._log.info(
            "shards_assigned", version=message.version, wanted=len(wanted), missing=len(absent), urgent=len(urgent)
        )

    def poll(self, now_s: float) -> None:
        """Loads one shard after another, in the loader's thread, so that calls for the others are answered meanwhile.

        Raises DeadlineError for a disk that hangs: the router waits for this node's shards, and others could load them.
        """
        self.held.thread.check()
        store = self.held.store
        if store is None:
            return
        assignment, weights = self._assignment, self._open_weights(store.dtype, now_s)
        while self._loading and self._loading[0][1].done():
            self._loaded(store, *self._loading.popleft())
        for shard in [shard for shard, retry_at_s in assignment.retry_at_s.items() if now_s >= retry_at_s]:
            del assignment.retry_at_s[shard]
            assignment.missing.append(shard)
        while weights is not None and assignment.missing and len(self._loading) < LOADS_AHEAD:
            shard = assignment.missing.popleft()
            self._loading.append((shard, self.held.thread.submit(store.load, weights, shard)))
        complete = not self._loading and not assignment.missing and not assignment.retry_at_s
        if not assignment.reported and (complete or now_s >= assignment.next_report_s):
            self._drop_unwanted(store)  # also what an incarnation before this one was still loading
            assignment.next_report_s = now_s + PROGRESS_INTERVAL_S
            assignment.reported = self._report(store, complete) and complete
            if complete and weights is not None:
                self.held.thread.submit(weights.close)  # pages of its files would count as this process's memory

    def add_held(self, hello: Hello) -> Hello:
        """Adds what a router that may have been restarted is told."""
        store = self.held.store
        return hello if store is None else replace(hello, held_shards=self._bitmap(store))

    def close(self) -> None:
        """Gives up what is loading."""
        self.held.thread.give_up()

    def _open_weights(self, dtype: torch.dtype, now_s: float) -> CheckpointWeights | None:
        """Returns None while the checkpoint's index is read, in the loader's thread too: its disk may be slow, or
        fail."""
        if self._weights is None and self._opening is None and now_s >= self._open_at_s:
            held = self.held
            self._opening = held.thread.submit(CheckpointWeights, held.checkpoint, dtype, held.device.place)
        elif self._opening is not None and self._opening.done():
            opening, self._opening = self._opening, None
            try:
                self._weights = opening.result()
            except MoemeshError as error:
                self._log.error("checkpoint_not_opened", reason=str(error))
                self._control.fail(error)
                self._open_at_s = now_s + RETRY_S
        return self._weights

    def _loaded(self, store: ShardStore, shard: ShardId, future: Future[None]) -> None:
        """Notes that a load has ended. What is wanted, and in which store, may have changed since it began, even
        twice."""
        assignment = self._assignment
        is_wanted = shard in assignment.wanted
        try:
            future.result()
        except (MoemeshError, ValueError, RuntimeError, MemoryError) as error:
            refusal = refusal_to_load(error)
            self._log.error("shard_not_loaded", shard=list(shard), reason=str(refusal))
            self._control.fail(refusal)
            if is_wanted:
                assignment.retry_at_s[shard] = self._clock() + RETRY_S
            return
        if not is_wanted:
            store.drop(shard)
        elif store.find(shard) is None:
            assignment.missing.appendleft(shard)  # it was dropped again meanwhile, or went into an older store
        elif shard in assignment.urgent:
            assignment.urgent.remove(shard)
            if not assignment.urgent:
                assignment.next_report_s = 0.0  # calls wait for these

    def _drop_unwanted(self, store: ShardStore) -> None:
        store.drop(*(shard for shard in store if shard not in self._assignment.wanted))

    def _bitmap(self, store: ShardStore) -> TensorFrame:
        config = self.held.config
        held = np.zeros((config.num_layers, config.num_experts, store.num_slices), dtype=np.uint8)
        for shard in store:
            held[shard] = 1
        return array_to_frame(held)

    def _report(self, store: ShardStore, complete: bool) -> bool:
        if complete:
            self._log.info("shards_ready", held=len(store))
        self.num_reports += 1
        held = self._bitmap(store)
        digests, projections = np.zeros(held.shape, dtype=np.int32), np.zeros(held.shape, dtype=np.float32)
        for shard in store:
            digests[shard], projections[shard] = store.probe(shard)
        return self._control.send(
            ShardsReady(
                self.version,
                complete,
                held,
                self.num_reports,
                array_to_frame(digests),
                array_to_frame(projections),
            )
        )
