"""The stage process: one loop over control, steps, expert answers and micro-batches. I/O here, arithmetic elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import structlog
import torch
import zmq

from common.array import array_to_frame
from common.compute.native_library import NativeKernels
from common.endpoints import choose_endpoint
from common.errors import DeadlineError, ExecutionError, MoemeshError, ProtocolError
from common.ids import Generation, LeaseTerm, PipelineId, SlotIndex
from common.messages import (
    AssignStage,
    Header,
    Heartbeat,
    Message,
    PublishPlacement,
    StageReady,
    Step,
    StepResult,
    Unassign,
)
from common.model_config import ModelConfig
from common.node import ControlLink
from common.tensor import DTYPES, frame_to_tensor, tensor_to_frame
from common.topology import LayerRange, StageRole, StageSlot
from common.transport import Full, MessageSocket, Transport
from common.weights import CheckpointWeights
from services.stage.attention_kernel import KV_BLOCK_TOKENS, LayerKvCache, allocate_kv_cache
from services.stage.executor import Executor, Finished, WantsExperts
from services.stage.expert_client import ExpertClient
from services.stage.loading import load_stage
from services.stage.micro_batch import BlockTables, read_micro_batch
from services.stage.model.decoder import StageModel
from services.stage.model.sampling import sample

POLL_MS = 50
LEAVE_DEADLINE_S = 15.0


@dataclass(slots=True)
class LoadedLayers:
    """Weights and KV cache of a layer range, kept while only generations change."""

    layers: LayerRange
    model: StageModel
    bytes_read: int
    caches: list[LayerKvCache]
    """Their content means nothing in a new generation; the memory stays."""

    def caches_of(self, num_blocks: int, config: ModelConfig, dtype: torch.dtype) -> list[LayerKvCache]:
        """Caches of so many blocks, the ones that are here if they have that size."""
        if not self.caches or self.caches[0].num_blocks != num_blocks:
            self.caches = allocate_kv_cache(
                len(self.model.layers), num_blocks, config.num_kv_heads, config.head_dim, dtype
            )
        return self.caches


@dataclass(slots=True)
class Slot:
    """The slot that this stage serves now."""

    role: StageRole
    executor: Executor
    tables: BlockTables
    downstream: MessageSocket


class StageService:
    """One stage. `run` returns when `should_stop` says so and the router lets it go."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Path,
        num_positions: int,
        kernels: NativeKernels | None,
        transport: Transport,
        control: ControlLink,
        steps: MessageSocket,
        ipc_token: str,
        log: structlog.stdlib.BoundLogger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._num_positions = num_positions
        self._kernels = kernels
        self._transport = transport
        self._control = control
        self._steps = steps
        self._ipc_token = ipc_token
        self._log = log
        self._clock = clock
        self._experts = ExpertClient(transport, ipc_token, log)
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")
        self._loaded: LoadedLayers | None = None
        self._loading: tuple[AssignStage, Header, Future[LoadedLayers]] | None = None
        self._slot: Slot | None = None
        self._unsent: deque[tuple[Message, Header, float]] = deque()
        """Messages that the downstream did not take yet, with their deadlines; bounded by the steps in flight."""
        self._busy_seconds = 0.0
        self._num_steps = 0
        self._num_rows = 0
        self._dropped = 0
        self._bytes_sent = 0
        self._poller = zmq.Poller()

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Serve until told to stop. Raises the router's refusal of this node."""
        self._watch_sockets()
        leave_by_s: float | None = None
        while not self._control.leave_acknowledged:
            now_s = self._clock()
            if should_stop():
                leave_by_s = leave_by_s or self._begin_leaving(now_s)
                if now_s >= leave_by_s or not self._control.registered:
                    break
            has_work = self._slot is not None and self._slot.executor.has_work
            self._poller.poll(0 if has_work else POLL_MS)
            now_s = self._clock()
            self._take_control(now_s)
            self._finish_loading()
            self._take_steps(now_s)
            self._experts.receive(now_s)
            self._experts.check_deadlines(now_s)
            self._send_unsent(now_s)
            if self._slot is not None and self._slot.executor.has_work:
                self._run_one(self._slot)
            self._control.beat(now_s, self._load)
        self._loader.shutdown(wait=False, cancel_futures=True)

    # ---- control

    def _begin_leaving(self, now_s: float) -> float:
        self._log.info("leaving")
        self._control.leave("stopped")
        return now_s + LEAVE_DEADLINE_S

    def _take_control(self, now_s: float) -> None:
        for message, header in self._control.receive(now_s):
            try:
                if isinstance(message, AssignStage):
                    self._assign(message, header)
                elif isinstance(message, Unassign):
                    self._leave_slot()
                elif isinstance(message, PublishPlacement):
                    self._take_placement(message, now_s)
                else:
                    raise ProtocolError(f"a stage does not take {type(message).__name__}")
            except MoemeshError as error:
                self._log.error("control_message_refused", kind=type(message).__name__, reason=str(error))
                self._control.fail(error, header)

    def _take_placement(self, message: PublishPlacement, now_s: float) -> None:
        assert self._control.welcome is not None
        self._experts.combine = self._control.welcome.combine
        if self._experts.take_placement(message, self._control.welcome.num_slices):
            self._watch_sockets()
            self._experts.retry_stranded(now_s)

    def _assign(self, message: AssignStage, header: Header) -> None:
        if not 0 <= message.first_layer < message.stop_layer <= self._config.num_layers:
            raise ProtocolError(f"layers [{message.first_layer}, {message.stop_layer}) are not in this model")
        self._leave_slot()
        layers = LayerRange(message.first_layer, message.stop_layer)
        if self._loaded is not None and self._loaded.layers == layers and self._loading is None:
            self._try_slot(message, header, self._loaded)
            return
        self._loaded = None
        role = _role(message, header)
        self._log.info("loading_layers", first=layers.start, stop=layers.stop)
        self._loading = (message, header, self._loader.submit(self._load_layers, role))

    def _load_layers(self, role: StageRole) -> LoadedLayers:
        """In the loader's thread, so that the loop keeps answering."""
        weights = CheckpointWeights(self._checkpoint, self._dtype)
        model = load_stage(weights, self._config, role, self._num_positions, self._kernels)
        weights.close()
        return LoadedLayers(role.layers, model, weights.bytes_read, [])

    def _finish_loading(self) -> None:
        if self._loading is None or not self._loading[2].done():
            return
        message, header, future = self._loading
        self._loading = None
        try:
            self._loaded = future.result()
        except (MoemeshError, ValueError, RuntimeError, MemoryError) as error:
            self._refuse_slot(error, header)
            return
        self._try_slot(message, header, self._loaded)

    def _try_slot(self, message: AssignStage, header: Header, loaded: LoadedLayers) -> None:
        try:
            self._enter_slot(message, header, loaded)
        except (MoemeshError, ValueError, RuntimeError, MemoryError) as error:
            self._refuse_slot(error, header)

    def _refuse_slot(self, error: Exception, header: Header) -> None:
        self._log.error("slot_not_taken", reason=str(error))
        self._control.fail(error if isinstance(error, MoemeshError) else ExecutionError(str(error)), header)

    def _enter_slot(self, message: AssignStage, header: Header, loaded: LoadedLayers) -> None:
        role = _role(message, header)
        caches = loaded.caches_of(message.num_blocks, self._config, self._dtype)
        executor = Executor(loaded.model, caches)
        executor.self_test()
        endpoint = choose_endpoint(message.downstream, message.downstream_ipc_token, self._ipc_token)
        self._slot = Slot(
            role=role,
            executor=executor,
            tables=BlockTables(KV_BLOCK_TOKENS, message.num_blocks),
            downstream=self._transport.push(f"after {role.slot}", endpoint),
        )
        kv_bytes = sum(c.keys.nbytes + c.values.nbytes for c in caches)
        self._log.info(
            "slot_taken",
            pipeline=message.pipeline,
            slot=message.slot,
            layers=[role.layers.start, role.layers.stop],
            generation=role.generation,
            lease_term=role.lease_term,
            mapped_bytes=loaded.bytes_read,
            kv_bytes=kv_bytes,
        )
        ready = StageReady(message.pipeline, message.slot, message.lease_term, loaded.bytes_read, kv_bytes)
        self._control.send(ready, Header(generation=role.generation))

    def _leave_slot(self) -> None:
        """Forget sequences and steps; weights stay."""
        self._experts.abandon()
        self._unsent.clear()
        if self._slot is not None:
            self._bytes_sent += self._slot.downstream.bytes_sent
            self._slot.downstream.close()
            self._slot = None

    # ---- steps

    def _take_steps(self, now_s: float) -> None:
        while (received := self._steps.receive()) is not None:
            message, header = received
            slot = self._slot
            if slot is None or not isinstance(message, Step) or header.generation != slot.role.generation:
                self._dropped += 1
                continue
            try:
                self._begin_step(slot, message, header, now_s)
            except MoemeshError as error:
                self._fail_step(error, header)

    def _begin_step(self, slot: Slot, step: Step, header: Header, now_s: float) -> None:
        if slot.role.is_first:
            tokens = frame_to_tensor(step.hidden, torch.int32, (None,), "Step.hidden").to(torch.int64)
            if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._config.vocab_size:
                raise ProtocolError(f"Step.hidden holds a token id outside [0, {self._config.vocab_size})")
            hidden = tokens
        else:
            hidden = frame_to_tensor(step.hidden, self._dtype, (None, self._config.hidden_size), "Step.hidden")
        batch = read_micro_batch(step, hidden, slot.tables)
        slot.executor.add(step, header, now_s + header.time_left_ms / 1000, batch)

    def _run_one(self, slot: Slot) -> None:
        began_s = self._clock()
        outcome = slot.executor.run_one()
        if isinstance(outcome, WantsExperts):
            self._call_experts(slot, outcome)
        elif isinstance(outcome, Finished):
            self._pass_on(slot, outcome)
        else:
            self._log.error("forward_broke", step=outcome.running.header.step, exc_info=outcome.error)
            self._fail_step(ExecutionError(f"computing failed: {outcome.error}"), outcome.running.header)
        self._busy_seconds += self._clock() - began_s

    def _call_experts(self, slot: Slot, outcome: WantsExperts) -> None:
        running = outcome.running

        def failed(error: MoemeshError) -> None:
            slot.executor.drop(running)
            self._fail_step(error, running.header)

        now_s = self._clock()
        assert self._control.welcome is not None
        deadline_s = min(running.deadline_s, now_s + self._control.welcome.call_deadline_ms / 1000)
        try:
            self._experts.start(
                outcome.call,
                running.header,
                now_s,
                deadline_s,
                on_done=lambda answer: slot.executor.resume(running, answer),
                on_failed=failed,
            )
        except MoemeshError as error:
            failed(error)

    def _pass_on(self, slot: Slot, finished: Finished) -> None:
        running = finished.running
        self._num_steps += 1
        self._num_rows += finished.hidden.shape[0]
        message = (
            self._sampled(finished) if slot.role.is_last else replace(running.step, hidden=tensor_to_frame(finished.hidden))
        )
        self._unsent.append((message, running.header, running.deadline_s))
        self._send_unsent(self._clock())

    def _sampled(self, finished: Finished) -> StepResult:
        assert self._slot is not None and self._loaded is not None
        batch = finished.running.batch
        assert batch.sampling is not None
        with torch.inference_mode():
            logits = self._loaded.model.logits(finished.hidden[batch.sampling_rows])
            sampled = sample(logits, batch.sampling)
        return StepResult(
            sequence_ids=array_to_frame(np.ascontiguousarray(batch.sampling.sequence_ids)),
            token_ids=tensor_to_frame(sampled.token_ids),
            logprobs=tensor_to_frame(sampled.logprobs),
            top_token_ids=tensor_to_frame(sampled.top_token_ids),
            top_logprobs=tensor_to_frame(sampled.top_logprobs),
        )

    def _send_unsent(self, now_s: float) -> None:
        """In order; a downstream that is not connected yet gets them when it is, until their deadline."""
        while self._unsent and self._slot is not None:
            message, header, deadline_s = self._unsent[0]
            if now_s >= deadline_s:
                self._unsent.popleft()
                self._fail_step(DeadlineError(f"{self._slot.downstream.name} did not take the step in time"), header)
                continue
            try:
                left_ms = int((deadline_s - now_s) * 1000)
                self._slot.downstream.send(message, replace(header, time_left_ms=left_ms))
            except Full:
                return
            self._unsent.popleft()

    def _fail_step(self, error: MoemeshError, header: Header) -> None:
        self._log.error("step_failed", step=header.step, code=error.code, reason=str(error))
        self._control.fail(error, replace(header, time_left_ms=0))

    # ---- small things

    @property
    def _dtype(self) -> torch.dtype:
        assert self._control.welcome is not None
        return DTYPES[self._control.welcome.dtype]

    def _watch_sockets(self) -> None:
        self._poller = zmq.Poller()
        own = [self._control.socket.raw, self._control.socket.monitor, self._steps.raw]
        for socket in (*own, *self._experts.poll_sockets()):
            if socket is not None:
                self._poller.register(socket, zmq.POLLIN)

    def _load(self) -> Heartbeat:
        sent = self._slot.downstream.bytes_sent if self._slot is not None else 0
        return Heartbeat(
            busy_seconds=self._busy_seconds,
            steps=self._num_steps,
            rows=self._num_rows,
            queued=self._slot.executor.num_running if self._slot is not None else 0,
            dropped=self._dropped,
            bytes_sent=self._bytes_sent + sent + self._experts.bytes_sent,
            hop_bytes=self._experts.bytes_sent,
            hop_seconds=self._experts.wait_seconds,
            hops=self._experts.answered,
            resent=self._experts.resent_calls,
        )


def _role(message: AssignStage, header: Header) -> StageRole:
    return StageRole(
        slot=StageSlot(PipelineId(message.pipeline), SlotIndex(message.slot)),
        layers=LayerRange(message.first_layer, message.stop_layer),
        lease_term=LeaseTerm(message.lease_term),
        generation=Generation(header.generation),
        num_slots=message.num_slots,
    )
