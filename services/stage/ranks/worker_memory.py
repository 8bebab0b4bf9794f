"""K and V as a rank other than the first has them: its heads of memory that all map, or all of its own device's."""

from __future__ import annotations

from dataclasses import replace

from common.checkpoint.model_config import ModelConfig
from common.compute.device import Device
from common.compute.native_library import NativeKernels
from common.wire.array import Int64Array
from services.stage.model.kv_store import KvShape, LocalKv
from services.stage.model.paged_attention import LayerKvCache
from services.stage.model.tp_shard import RankCut
from services.stage.ranks.commands import KvMove, dtype_of
from services.stage.ranks.kv_window import KvWindow, move
from services.stage.ranks.shared_caches import take_caches
from services.stage.ranks.shared_memory import SharedMemory


class FollowerMemory:
    """What MEMORY, ALLOCATE, MOVE_KV and FORGET_MEMORY are about."""

    def __init__(self, config: ModelConfig, kernels: NativeKernels | None, device: Device) -> None:
        self._config = config
        self._kernels = kernels
        self._device = device
        self._heads = slice(0, config.num_kv_heads)
        self._mapped: list[LayerKvCache] = []
        """Of all heads, where ranks share K and V."""
        self._window: KvWindow | None = None
        self._own: LocalKv | None = None
        self.caches: list[LayerKvCache] = []
        """This rank's heads, by layer."""

    def use(self, cut: RankCut) -> None:
        """From now on this rank has these heads. K and V of its own are of other heads then, and are given up."""
        self._heads = cut.kv_heads(self._config.num_kv_heads)
        self._own = None
        self._view_heads()

    def map(self, command: Int64Array) -> None:
        """What MEMORY says. Rank 0 has it open meanwhile. Raises OSError if that one is gone."""
        process, descriptor, num_bytes, num_layers, num_blocks, dtype = command[1:7].tolist()
        config = self._config
        shape = KvShape(num_layers, num_blocks, config.num_kv_heads, config.head_dim, dtype_of(dtype))
        memory = SharedMemory.open(process, descriptor, num_bytes)
        if self._device.is_host:
            self._mapped = take_caches(memory, shape)
            self._view_heads()
        else:
            self._window = KvWindow(memory, shape)
        memory.close()

    def allocate(self) -> None:
        """K and V of its own, of the size that MEMORY has said. Raises ValueError, RuntimeError for want of memory."""
        assert self._window is not None, "MEMORY comes before"
        self._own, self.caches = None, []  # makes room
        self._device.release()
        shape = replace(self._window.shape, num_kv_heads=self._heads.stop - self._heads.start)
        self._own = LocalKv.allocate(shape, self._kernels, self._device)
        self.caches = self._own.caches

    def move(self, way: KvMove, count: int) -> None:
        """This rank's heads of a move through the window."""
        assert self._window is not None, "MEMORY comes before"
        assert self._own is not None, "ALLOCATE comes before"
        move(self._window, self._own, self._heads, way, count)

    def _view_heads(self) -> None:
        self.caches = [cache.of_heads(self._heads.start, self._heads.stop) for cache in self._mapped]

    def forget(self) -> None:
        """Give all of it up."""
        self._mapped, self.caches = [], []
        self._window = self._own = None
        self._device.release()
