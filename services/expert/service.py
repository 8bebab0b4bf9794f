"""The expert process: one loop that receives calls, runs what is queued a layer at a time, and answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import structlog
import torch
import zmq
from torch import Tensor

from common.array import array_to_frame, frame_to_array
from common.compute.native_library import NativeKernels
from common.errors import ExecutionError, MoemeshError, NotReadyError, ProtocolError
from common.messages import (
    AssignShards,
    CancelCall,
    Dispatch,
    ExpertRows,
    Failed,
    Header,
    Heartbeat,
    Message,
    ShardsReady,
    TensorFrame,
)
from common.model_config import ModelConfig
from common.node import ControlLink, HeldState
from common.tensor import DTYPES, tensor_to_frame
from common.topology import ShardId
from common.transport import Full, RoutingSocket, Transport
from common.weights import CheckpointWeights
from services.expert.calls import CallQueue, WaitingCall, answer_calls, check_call
from services.expert.shard_store import ShardStore

POLL_MS = 50
LEAVE_DEADLINE_S = 15.0
PROGRESS_INTERVAL_S = 0.2
LOADS_AHEAD = 8
"""Shards that the loader's thread has in hand, so that it need not wait for the loop between two small ones."""
RETRY_S = 5.0


@dataclass(slots=True)
class Assignment:
    """What the router wants held, and how far that is."""

    version: int
    wanted: frozenset[ShardId] = frozenset()
    missing: deque[ShardId] = field(default_factory=deque)
    """In the order in which they are loaded."""
    urgent: set[ShardId] = field(default_factory=set)
    """Those of the missing ones that nobody else can be asked for."""
    retry_at_s: dict[ShardId, float] = field(default_factory=dict)
    """Shards that could not be loaded, and when to try again: a full disk or memory may have room by then."""
    reported: bool = False
    next_report_s: float = 0.0


@dataclass(slots=True)
class Counters:
    """What heartbeats carry."""

    busy_seconds: float = 0.0
    calls: int = 0
    rows: int = 0
    dropped: int = 0
    cancelled: int = 0
    queue_seconds: float = 0.0


class ExpertService:
    """One expert node. `run` returns when `should_stop` says so and the router lets it go."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Path,
        kernels: NativeKernels | None,
        transport: Transport,
        control: ControlLink,
        calls: RoutingSocket,
        log: structlog.stdlib.BoundLogger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._kernels = kernels
        self._transport = transport
        self._control = control
        self._socket = calls
        self._log = log
        self._clock = clock
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")
        self._store: ShardStore | None = None
        self._weights: CheckpointWeights | None = None
        self._assignment = Assignment(version=0)
        self._loading: deque[tuple[ShardId, Future[None]]] = deque()
        self._queue = CallQueue()
        self._counters = Counters()
        control.describe_held = self._describe_held

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Serve until told to stop. Raises the router's refusal of this node."""
        poller = zmq.Poller()
        for socket in (self._control.socket.raw, self._control.socket.monitor, self._socket.raw):
            if socket is not None:
                poller.register(socket, zmq.POLLIN)
        leave_by_s: float | None = None
        while not self._control.leave_acknowledged or len(self._queue):
            now_s = self._clock()
            if should_stop():
                if leave_by_s is None:
                    self._log.info("leaving")
                    self._control.leave("stopped")
                    leave_by_s = now_s + LEAVE_DEADLINE_S
                if now_s >= leave_by_s or not self._control.registered:
                    break
            poller.poll(0 if len(self._queue) else (5 if self._loading else POLL_MS))
            now_s = self._clock()
            self._take_control(now_s)
            self._load_next(now_s)
            self._take_calls(now_s)
            self._answer_layer(now_s)
            self._control.beat(now_s, self._load)
        self._loader.shutdown(wait=False, cancel_futures=True)

    # ---- control and shards

    def _take_control(self, now_s: float) -> None:
        for message, header in self._control.receive(now_s):
            try:
                if not isinstance(message, AssignShards):
                    raise ProtocolError(f"an expert node does not take {type(message).__name__}")
                self._assign(message)
            except MoemeshError as error:
                self._log.error("control_message_refused", kind=type(message).__name__, reason=str(error))
                self._control.fail(error, header)

    def _assign(self, message: AssignShards) -> None:
        welcome = self._control.settings
        shape = (self._config.num_layers, self._config.num_experts, welcome.num_slices)
        bitmap = frame_to_array(message.shards, "uint8", shape, "AssignShards.shards")
        dtype = DTYPES[welcome.dtype]
        if (
            self._store is None
            or self._weights is None
            or (self._store.num_slices, self._weights.dtype)
            != (
                welcome.num_slices,
                dtype,
            )
        ):
            self._store = ShardStore(self._config, welcome.num_slices, self._kernels)
            self._weights = CheckpointWeights(self._checkpoint, dtype)
        wanted = frozenset(ShardId(*place) for place in np.argwhere(bitmap).tolist())
        for shard in self._store:
            if shard not in wanted:
                self._store.drop(shard)
        in_hand = {shard for shard, _ in self._loading}
        absent = wanted.difference(self._store)
        urgent = {shard for shard in absent if bitmap[shard] > 1}
        missing = deque(sorted(absent - in_hand, key=lambda shard: (shard not in urgent, shard)))
        self._assignment = Assignment(message.version, wanted, missing, urgent)
        self._log.info(
            "shards_assigned", version=message.version, wanted=len(wanted), missing=len(absent), urgent=len(urgent)
        )

    def _load_next(self, now_s: float) -> None:
        """One shard after another, in the loader's thread, so that calls for the others are answered meanwhile."""
        if self._store is None or self._weights is None:
            return
        assignment = self._assignment
        while self._loading and self._loading[0][1].done():
            self._loaded(*self._loading.popleft())
        for shard in [shard for shard, retry_at_s in assignment.retry_at_s.items() if now_s >= retry_at_s]:
            del assignment.retry_at_s[shard]
            assignment.missing.append(shard)
        while assignment.missing and len(self._loading) < LOADS_AHEAD:
            shard = assignment.missing.popleft()
            self._loading.append((shard, self._loader.submit(self._store.load, self._weights, shard)))
        complete = not self._loading and not assignment.missing and not assignment.retry_at_s
        if not assignment.reported and (complete or now_s >= assignment.next_report_s):
            assignment.next_report_s = now_s + PROGRESS_INTERVAL_S
            assignment.reported = self._report(complete) and complete

    def _loaded(self, shard: ShardId, future: Future[None]) -> None:
        assert self._store is not None
        try:
            future.result()
        except (MoemeshError, ValueError, RuntimeError, MemoryError) as error:
            self._log.error("shard_not_loaded", shard=list(shard), reason=str(error))
            self._control.fail(error if isinstance(error, MoemeshError) else ExecutionError(str(error)))
            self._assignment.retry_at_s[shard] = self._clock() + RETRY_S
            return
        if shard not in self._assignment.wanted:
            self._store.drop(shard)
        if shard in self._assignment.urgent:
            self._assignment.urgent.remove(shard)
            if not self._assignment.urgent:
                self._assignment.next_report_s = 0.0  # calls wait for these

    def _describe_held(self) -> HeldState:
        """For a router that may have been restarted."""
        return HeldState() if self._store is None else HeldState(shards=self._bitmap(self._store))

    def _bitmap(self, store: ShardStore) -> TensorFrame:
        held = np.zeros((self._config.num_layers, self._config.num_experts, store.num_slices), dtype=np.uint8)
        for shard in store:
            held[shard] = 1
        return array_to_frame(held)

    def _report(self, complete: bool) -> bool:
        assert self._store is not None
        if complete:
            self._log.info("shards_ready", held=len(self._store), mapped_bytes=self._store.weight_bytes)
        return self._control.send(
            ShardsReady(self._assignment.version, complete, self._bitmap(self._store), self._store.weight_bytes)
        )

    # ---- calls

    def _take_calls(self, now_s: float) -> None:
        while (received := self._socket.receive()) is not None:
            identity, message, header = received
            if isinstance(message, CancelCall):
                self._counters.cancelled += self._queue.cancel(identity, message.calls)
                continue
            number = message.call if isinstance(message, Dispatch) else 0
            try:
                if not isinstance(message, Dispatch):
                    raise ProtocolError(f"an expert node's data socket does not take {type(message).__name__}")
                if self._store is None or self._weights is None:
                    raise NotReadyError("no shards are assigned here yet")
                shape = (self._weights.dtype, self._config.hidden_size)
                self._queue.add(check_call(identity, message, header, now_s, self._store, shape))
            except MoemeshError as error:
                self._answer(identity, Failed(error.code, str(error), number), header)

    def _answer_layer(self, now_s: float) -> None:
        if not len(self._queue) or self._store is None:
            return
        calls, expired = self._queue.take_layer(now_s)
        self._counters.dropped += expired
        if not calls:
            return
        began_s = self._clock()
        try:
            with torch.inference_mode():
                answers = answer_calls(calls, self._store)
        except (MoemeshError, ValueError, RuntimeError) as error:
            code = error.code if isinstance(error, MoemeshError) else ExecutionError.code
            self._log.error("calls_failed", layer=calls[0].header.layer, reason=str(error))
            for call in calls:
                self._answer(call.identity, Failed(code, str(error), call.number), call.header)
            return
        compute_seconds = self._clock() - began_s
        self._counters.busy_seconds += compute_seconds
        for call, rows in zip(calls, answers, strict=True):
            self._send_rows(call, rows, compute_seconds, began_s - call.arrived_s)

    def _send_rows(self, call: WaitingCall, rows: Tensor, compute_seconds: float, queue_seconds: float) -> None:
        self._counters.calls += 1
        self._counters.rows += call.routing.shape[1]
        self._counters.queue_seconds += queue_seconds
        answer = ExpertRows(call.number, tensor_to_frame(rows), compute_seconds, max(0.0, queue_seconds))
        self._answer(call.identity, answer, call.header)

    def _answer(self, identity: bytes, message: Message, header: Header) -> None:
        try:
            self._socket.send(identity, message, header)
        except Full:
            self._counters.dropped += 1  # the stage is gone: nobody waits for this answer

    def _load(self) -> Heartbeat:
        counters = self._counters
        return Heartbeat(
            busy_seconds=counters.busy_seconds,
            steps=counters.calls,
            rows=counters.rows,
            queued=len(self._queue),
            dropped=counters.dropped,
            bytes_sent=self._socket.bytes_sent,
            hop_bytes=self._socket.bytes_sent,
            hop_seconds=counters.queue_seconds,
            hops=counters.calls,
            resent=0,
            late=counters.cancelled,
        )
