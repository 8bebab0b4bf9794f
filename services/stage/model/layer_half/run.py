"""What native code needs to take layers one after another, while calls go through rings and are answered soon.

The kernel is common/compute/native/layer_run.h; `services/stage/experts/rings.py` calls it, since it is calls to
experts that lie between the layers.

T tokens, D model width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from services.stage.model.layer_half.inputs import LayerHalf, LayerInputs
from services.stage.model.layer_half.native import NativeHalf
from services.stage.model.paged_attention import LayerKvCache


class _RunLayer(ctypes.Structure):
    """`struct RunLayer` of common/compute/native/layer_run.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("half", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("cache_heads", "index")),
    )


class RunDescriptor(ctypes.Structure):
    """`struct LayerRun` of common/compute/native/layer_run.h."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "place")),
        *((name, ctypes.c_void_p) for name in ("batch", "residual")),
    )


class RunLayers:
    """All layers of a stage with their caches, as native code has them. Those that it cannot run end a run."""

    def __init__(self, layers: Sequence[tuple[int, LayerHalf | None]], caches: Sequence[LayerKvCache]) -> None:
        """`layers`: the index of each, and its half; None where what follows is not experts. Raises ValueError for
        caches that do not fit."""
        self.indices = tuple(index for index, _ in layers)
        self.table = (_RunLayer * len(layers))()
        self._kept = (tuple(layers), tuple(caches))  # what the table points into
        for entry, (index, half), cache in zip(self.table, layers, caches, strict=True):
            entry.index = index
            if isinstance(half, NativeHalf):
                half.check_cache(cache)
                entry.half = half.address
                entry.keys, entry.values = cache.keys.data_ptr(), cache.values.data_ptr()
                entry.cache_heads = cache.heads_between_blocks


class LayerRun:
    """Where a forward pass stands: in which layer, and with which residual stream. Whoever answers its expert call may
    take it further, to the call of a later layer; the answer is that one's then."""

    def __init__(self, layers: RunLayers, inputs: LayerInputs) -> None:
        self.layers = layers
        self._inputs = inputs  # what the descriptor points into
        self._residual: Tensor | None = None
        self.descriptor = RunDescriptor(
            ctypes.addressof(layers.table), len(layers.table), 0, ctypes.addressof(inputs.descriptor), None
        )

    @property
    def place(self) -> int:
        """The place in the stage's layers of the one whose experts are asked."""
        return int(self.descriptor.place)

    @property
    def layer(self) -> int:
        """That layer's index in the model."""
        return self.layers.indices[self.place]

    def arrive(self, place: int, residual: Tensor) -> None:
        """Says that the experts of the layer at `place` are asked next; `residual` [T, D], of the stage's own, is kept
        up to date."""
        self._residual = residual
        self.descriptor.place, self.descriptor.residual = place, residual.data_ptr()
