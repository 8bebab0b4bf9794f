"""The expert process: one loop that receives calls, runs what is queued a layer at a time, and answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

import torch
import zmq
from torch import Tensor

from common.compute.device_errors import raise_if_life_ending
from common.errors import ExecutionError, MoemeshError, NotReadyError, ProtocolError
from common.messages import (
    AssignShards,
    CancelCall,
    Dispatch,
    ExpertHeartbeat,
    ExpertRows,
    Failed,
    Header,
    Message,
)
from common.node.loop import POLL_MS, NodeLoop
from common.node.process import NodeProcess
from common.wire.tensor import tensor_to_frame
from common.wire.transport import Full, RoutingSocket
from services.expert.calls import CallQueue, LayerAnswer, WaitingCall, begin_answer, check_call
from services.expert.ring_server import RingCounts, RingServer
from services.expert.shard_loader import ShardLoader

MAX_UNDER_WAY = 2
"""Layers that a device computes or copies: one is on its way back while the next is computed."""


@dataclass(slots=True)
class ExpertCounters:
    """What the loop counts since start; in the words of its heartbeat."""

    busy_seconds: float = 0.0
    steps: int = 0
    """Calls that were answered."""
    rows: int = 0
    dropped: int = 0
    cancelled: int = 0
    queue_seconds: float = 0.0


class ExpertService(NodeLoop[RoutingSocket]):
    """One expert node."""

    def __init__(
        self,
        node: NodeProcess[RoutingSocket],
        shards: ShardLoader,
        clock: Callable[[], float] = time.monotonic,
        rings: RingServer | None = None,
    ) -> None:
        """`rings`: None takes calls as messages only."""
        super().__init__(node, clock)
        self._shards = shards
        self._rings = rings
        self._socket = node.data
        self._queue = CallQueue()
        self._under_way: deque[LayerAnswer] = deque()
        self._last_done_s = 0.0
        self._counters = ExpertCounters()
        node.control.add_held = shards.add_held

    @property
    def _has_to_finish(self) -> bool:
        return bool(len(self._queue) or self._under_way)

    def _sockets(self) -> Iterable[zmq.Socket[bytes] | None]:
        return (self._socket.raw,)

    def _wait_ms(self, now_s: float) -> int:
        return 0 if self._has_to_finish else (5 if self._shards.is_loading else POLL_MS)

    def _work(self, now_s: float) -> None:
        self._shards.poll(now_s)
        if self._rings is not None:
            self._rings.look(self._shards.held.store)
        self._receive_calls(now_s)
        self._begin_layer(now_s)
        self._answer_done()

    def _obey(self, message: Message, header: Header, now_s: float) -> None:
        if not isinstance(message, AssignShards):
            raise ProtocolError(f"an expert node does not handle {type(message).__name__}")
        if not self._shards.assign(message, header.router_term):
            self._counters.dropped += 1

    # ---- calls

    def _receive_calls(self, now_s: float) -> None:
        while (received := self._socket.receive()) is not None:
            identity, message, header = received
            if isinstance(message, CancelCall):
                self._counters.cancelled += self._queue.cancel(identity, message.calls)
                continue
            number = message.call if isinstance(message, Dispatch) else 0
            try:
                if not isinstance(message, Dispatch):
                    raise ProtocolError(f"an expert node does not accept {type(message).__name__}")
                if self._shards.held.store is None:
                    raise NotReadyError("no shards are assigned here yet")
                self._queue.add(check_call(identity, message, header, now_s, self._shards.held.store))
            except MoemeshError as error:
                self._answer(identity, Failed(error.code, str(error), number), header)

    def _begin_layer(self, now_s: float) -> None:
        """Begins what has waited longest. On a processor it is done when this returns."""
        held = self._shards.held
        if not len(self._queue) or held.store is None or len(self._under_way) >= MAX_UNDER_WAY:
            return
        calls, expired = self._queue.pop_layer(now_s)
        self._counters.dropped += expired
        if not calls:
            return
        try:
            with torch.inference_mode():
                answer = begin_answer(calls, held.store, held.device, self._clock())
        except (MoemeshError, ValueError, RuntimeError) as error:
            self._fail_calls(calls, error)
            return
        self._under_way.append(answer)

    def _answer_done(self) -> None:
        """Answers what is done, in the order in which it was begun."""
        while self._under_way:
            answer = self._under_way[0]
            try:
                if not answer.download.is_ready():
                    return
                with torch.inference_mode():
                    rows = answer.collect()
            except (MoemeshError, ValueError, RuntimeError) as error:
                self._under_way.popleft()
                self._fail_calls(answer.calls, error)
                continue
            self._under_way.popleft()
            done_s = self._clock()
            self._counters.busy_seconds += done_s - max(answer.began_s, self._last_done_s)
            self._last_done_s = done_s
            for call, own_rows in zip(answer.calls, rows, strict=True):
                self._send_rows(call, own_rows, answer.began_s - call.arrived_s)

    def _fail_calls(self, calls: list[WaitingCall], error: MoemeshError | ValueError | RuntimeError) -> None:
        raise_if_life_ending(error)
        code = error.code if isinstance(error, MoemeshError) else ExecutionError.code
        self._log.error("calls_failed", layer=calls[0].header.layer, reason=str(error))
        for call in calls:
            self._answer(call.identity, Failed(code, str(error), call.number), call.header)

    def _send_rows(self, call: WaitingCall, rows: Tensor, queue_seconds: float) -> None:
        self._counters.steps += 1
        self._counters.rows += call.routing.shape[1]
        self._counters.queue_seconds += queue_seconds
        self._answer(call.identity, ExpertRows(call.number, tensor_to_frame(rows)), call.header)

    def _answer(self, identity: bytes, message: Message, header: Header) -> None:
        try:
            self._socket.send(identity, message, header)
        except Full:
            self._counters.dropped += 1  # the stage is gone: this answer is not wanted

    def _load(self) -> ExpertHeartbeat:
        own, in_rings = self._counters, RingCounts() if self._rings is None else self._rings.counts()
        own = replace(
            own,
            busy_seconds=own.busy_seconds + in_rings.busy_ns / 1e9,
            steps=own.steps + in_rings.steps,
            rows=own.rows + in_rings.rows,
            dropped=own.dropped + in_rings.refused,
        )
        return ExpertHeartbeat(
            **asdict(own),
            queued=len(self._queue) + sum(len(answer.calls) for answer in self._under_way) + in_rings.in_hand,
            answer_bytes=self._socket.bytes_sent + in_rings.answer_bytes,
            shards_version=self._shards.version,
            shards_reports=self._shards.num_reports,
        )
