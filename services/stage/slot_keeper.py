"""The slot that a stage holds: load its layers off the message loop, keep them while only generations change."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
import torch

from common.compute.native_library import NativeKernels
from common.endpoints import choose_endpoint
from common.errors import ExecutionError, MoemeshError, ProtocolError
from common.ids import Generation, LeaseTerm, PipelineId, SlotIndex
from common.messages import AssignStage, Header, StageReady
from common.model_config import ModelConfig
from common.topology import LayerRange, StageRole, StageSlot
from common.transport import MessageSocket, Transport
from common.weights import CheckpointWeights
from services.stage.attention_kernel import KV_BLOCK_TOKENS, LayerKvCache, allocate_kv_cache
from services.stage.executor import Executor
from services.stage.loading import load_stage
from services.stage.micro_batch import BlockTables
from services.stage.model.decoder import StageModel

LOADING_ERRORS = (MoemeshError, ValueError, RuntimeError, MemoryError)
"""What a damaged checkpoint or too little memory may raise."""


@dataclass(frozen=True, slots=True)
class LoadedLayers:
    """Weights of a layer range."""

    layers: LayerRange
    dtype: torch.dtype
    model: StageModel
    bytes_read: int


@dataclass(frozen=True, slots=True)
class Loading:
    """An assignment whose layers are on their way."""

    message: AssignStage
    header: Header
    layers: LayerRange
    dtype: torch.dtype
    future: Future[LoadedLayers]


@dataclass(slots=True)
class Slot:
    """The slot that this stage serves now."""

    role: StageRole
    router_term: int
    model: StageModel
    executor: Executor
    tables: BlockTables
    downstream: MessageSocket
    last_sequence_number: int = 0
    """Of the messages from upstream."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The slot is loaded, tested and connected."""

    ready: StageReady
    header: Header


@dataclass(frozen=True, slots=True)
class Refused:
    """The slot cannot be taken."""

    error: MoemeshError
    header: Header


class SlotKeeper:
    """At most one slot at a time. The newest assignment wins, also over one that is still loading."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Path,
        num_positions: int,
        kernels: NativeKernels | None,
        transport: Transport,
        ipc_token: str,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._num_positions = num_positions
        self._kernels = kernels
        self._transport = transport
        self._ipc_token = ipc_token
        self._log = log
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")
        self._loaded: LoadedLayers | None = None
        self._caches: list[LayerKvCache] = []
        """Their content means nothing in a new generation; the memory stays."""
        self._loading: Loading | None = None
        self._bytes_to_former_downstreams = 0
        self.slot: Slot | None = None

    @property
    def bytes_sent(self) -> int:
        """Downstream, since start."""
        return self._bytes_to_former_downstreams + (self.slot.downstream.bytes_sent if self.slot is not None else 0)

    def assign(self, message: AssignStage, header: Header, dtype: torch.dtype) -> Taken | Refused | None:
        """Take a slot; None: its layers are being loaded, ask `poll`. Raises ProtocolError for layers that are not."""
        if not 0 <= message.first_layer < message.stop_layer <= self._config.num_layers:
            raise ProtocolError(f"layers [{message.first_layer}, {message.stop_layer}) are not in this model")
        if message.num_blocks < 1 or not 0 <= message.slot < message.num_slots:
            raise ProtocolError(
                f"slot {message.slot} of {message.num_slots} with {message.num_blocks} blocks is no slot"
            )
        self._close_slot()
        role = role_of(message, header)
        loading = self._loading
        if loading is not None and (loading.layers, loading.dtype) == (role.layers, dtype):
            self._loading = replace(loading, message=message, header=header)  # a new generation of the same: load once
            return None
        loaded = self._loaded
        if loaded is not None and (loaded.layers, loaded.dtype) == (role.layers, dtype) and loading is None:
            return self._enter(message, header, loaded)
        self._loaded, self._caches = None, []  # makes room before the new layers come
        self._log.info("loading_layers", first=role.layers.start, stop=role.layers.stop)
        self._loading = Loading(message, header, role.layers, dtype, self._loader.submit(self._load, role, dtype))
        return None

    def poll(self) -> Taken | Refused | None:
        """What became of the assignment that was loading; None while there is nothing new."""
        loading = self._loading
        if loading is None or not loading.future.done():
            return None
        self._loading = None
        try:
            self._loaded = loading.future.result()
        except LOADING_ERRORS as error:
            return self._refuse(error, loading.header)
        return self._enter(loading.message, loading.header, self._loaded)

    def leave(self) -> None:
        """Forget sequences and steps, and an assignment that is still loading; loaded weights stay."""
        self._loading = None
        self._close_slot()

    def _close_slot(self) -> None:
        if self.slot is not None:
            self._bytes_to_former_downstreams += self.slot.downstream.bytes_sent
            self.slot.downstream.close()
            self.slot = None

    def close(self) -> None:
        """Give up what is loading."""
        self.leave()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _load(self, role: StageRole, dtype: torch.dtype) -> LoadedLayers:
        """In the loader's thread."""
        weights = CheckpointWeights(self._checkpoint, dtype)
        model = load_stage(weights, self._config, role, self._num_positions, self._kernels)
        weights.close()
        return LoadedLayers(role.layers, dtype, model, weights.bytes_read)

    def _enter(self, message: AssignStage, header: Header, loaded: LoadedLayers) -> Taken | Refused:
        role = role_of(message, header)
        try:
            if not self._caches or self._caches[0].num_blocks != message.num_blocks:
                self._caches = allocate_kv_cache(
                    len(loaded.model.layers),
                    message.num_blocks,
                    self._config.num_kv_heads,
                    self._config.head_dim,
                    loaded.dtype,
                )
            executor = Executor(loaded.model, self._caches)
            executor.self_test()
            endpoint = choose_endpoint(message.downstream, message.downstream_ipc_token, self._ipc_token)
            downstream = self._transport.push(f"after {role.slot}", endpoint)
        except LOADING_ERRORS as error:
            return self._refuse(error, header)
        self.slot = Slot(
            role=role,
            router_term=header.router_term,
            model=loaded.model,
            executor=executor,
            tables=BlockTables(KV_BLOCK_TOKENS, message.num_blocks),
            downstream=downstream,
        )
        kv_bytes = sum(cache.keys.nbytes + cache.values.nbytes for cache in self._caches)
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
        return Taken(ready, Header(generation=role.generation))

    def _refuse(self, error: Exception, header: Header) -> Refused:
        self._log.error("slot_not_taken", reason=str(error))
        return Refused(error if isinstance(error, MoemeshError) else ExecutionError(str(error)), header)


def role_of(message: AssignStage, header: Header) -> StageRole:
    """The role that an assignment stands for."""
    return StageRole(
        slot=StageSlot(PipelineId(message.pipeline), SlotIndex(message.slot)),
        layers=LayerRange(message.first_layer, message.stop_layer),
        lease_term=LeaseTerm(message.lease_term),
        generation=Generation(header.generation),
        num_slots=message.num_slots,
    )
