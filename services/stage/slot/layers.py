"""The layers that a stage process has, and how it gets others. They outlive an incarnation; K and V do not."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from common.checkpoint.model_config import ModelConfig
from common.checkpoint.weights import CheckpointWeights
from common.compute.device import HOST, Device
from common.compute.native_library import NativeKernels
from common.node.loader_thread import LoaderThread
from common.topology import LayerRange, StageRole
from services.stage.model.decoder import StageModel
from services.stage.model.kv_cache import KvStore, LocalKv, PagedMemory, allocate_paged_memory
from services.stage.model.loading import load_stage
from services.stage.model.paged_attention import KvShape
from services.stage.model.sharded_linear import ALONE
from services.stage.ranks.group import RankGroup, RankLoad


@dataclass(frozen=True, slots=True)
class LoadedLayers:
    """Weights of a layer range."""

    layers: LayerRange
    dtype: torch.dtype
    model: StageModel
    num_bytes: int
    """Bytes as they are held: checkpoints may store fewer per value."""
    ranks_load: RankLoad | None = None
    """Where the stage has ranks: what they loaded with it."""


@dataclass(slots=True)
class LayersLoad:
    """Layers on their way."""

    layers: LayerRange
    dtype: torch.dtype
    future: Future[LoadedLayers]
    ranks_load: RankLoad | None
    is_loaded: bool = False
    """Whether this process and all its ranks have loaded."""


class StageLayers:
    """Loads layer ranges in a thread of its own, and keeps the one that is or was served."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Path,
        num_positions: int,
        kernels: NativeKernels | None = None,
        device: Device = HOST,
        ranks: RankGroup | None = None,
        thread: LoaderThread | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.ranks = ranks
        self.thread = thread or LoaderThread()
        self._checkpoint = checkpoint
        self._num_positions = num_positions
        self._kernels = kernels
        self.loaded: LoadedLayers | None = None
        """The layers of the slot that is or was held, or None while others are loaded."""

    def begin_load(self, role: StageRole, dtype: torch.dtype, *, replaces: bool) -> LayersLoad:
        """Begins to load, here and on all ranks; `replaces`: instead of what they have."""
        ranks_load = self.ranks.begin_load(role, dtype, replaces=replaces) if self.ranks is not None else None
        return LayersLoad(role.layers, dtype, self.thread.submit(self._load, role, dtype, ranks_load), ranks_load)

    def look(self, load: LayersLoad) -> bool:
        """Returns whether a load is done, here and on all ranks. Raises what any of them has failed by."""
        if not load.is_loaded and load.future.done() and self._ranks_have(load):
            load.future.result()
            load.is_loaded = True
        return load.is_loaded

    def drop(self) -> None:
        """Lets the layers go, which makes room for others."""
        self.loaded = None
        self.device.release()

    def allocate(self, loaded: LoadedLayers, num_blocks: int, *, with_log: bool) -> PagedMemory:
        """Returns paged memory for these layers, with or without an activation log."""
        return allocate_paged_memory(
            len(loaded.model.layers),
            num_blocks,
            (self.config.num_kv_heads, self.config.head_dim),
            self.config.hidden_size,
            loaded.dtype,
            with_log=with_log,
            allocate_kv=self._allocate_kv if self.ranks is None else self.ranks.allocate_kv,
        )

    def _ranks_have(self, load: LayersLoad) -> bool:
        return self.ranks is None or load.ranks_load is None or self.ranks.is_loaded(load.ranks_load)

    def _load(self, role: StageRole, dtype: torch.dtype, ranks_load: RankLoad | None) -> LoadedLayers:
        """Loads, in the loader's thread."""
        weights = CheckpointWeights(self._checkpoint, dtype, self.device.place)
        sharding = ALONE if ranks_load is None else ranks_load.sharding
        model = load_stage(weights, self.config, role, self._num_positions, self._kernels, self.device, sharding)
        weights.close()
        return LoadedLayers(role.layers, dtype, model, weights.num_bytes, ranks_load)

    def _allocate_kv(self, shape: KvShape) -> KvStore:
        return LocalKv.allocate(shape, self._kernels, self.device)
