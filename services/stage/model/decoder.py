"""One stage's part of the decoder: embedding, layers, final norm and lm_head, as far as its layer range has them.

A forward pass is a generator that yields at every expert call, so that one loop can drive many micro-batches.
T tokens, D model width, K experts a token, S sampled rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from common.compute.native_library import NativeKernels
from common.compute.rms_norm import add_rms_norm, rms_norm
from services.stage.model.gate import Gate
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.paged_attention import LayerKvCache
from services.stage.model.rope import RotaryTable


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """What a layer asks of its experts. The answer is the weighted sum [T, D] in the model's dtype."""

    layer: int
    hidden: Tensor
    """[T, D]."""
    experts: Tensor
    """int64 [T, K]."""
    weights: Tensor
    """float32 [T, K]."""


class OnItsWay(Protocol):
    """What a forward pass waits for that no message brings: its own device."""

    def is_ready(self) -> bool:
        """Whether it can go on. Raises DeviceError, RuntimeError for a device that hangs or has failed."""


ForwardPass = Generator[ExpertCall | OnItsWay, Tensor | None, Tensor]
"""Yields expert calls and is sent their answers; may yield before, until its device is as far, and is sent None.
Returns hidden states [T, D]."""


Attend = Callable[[Tensor, MicroBatch, tuple[Tensor, Tensor], LayerKvCache], Tensor]
"""[T, D] -> [T, D], with the cache of the layer: `Attention`, or all ranks' parts of it."""
Feed = Callable[[Tensor], Tensor]
"""[T, D] -> [T, D]: a dense feed-forward network."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention and a feed-forward half: a gate (experts elsewhere) or a dense FFN."""

    index: int
    input_norm: Tensor
    attention: Attend
    post_attention_norm: Tensor
    feed_forward: Gate | Feed


@dataclass(frozen=True, slots=True)
class StageModel:
    """Layers [start, stop) with what the ends of the pipeline have besides."""

    layers: tuple[DecoderLayer, ...]
    rotary: RotaryTable
    rms_norm_eps: float
    embedding: Callable[[Tensor], Tensor] | None
    """Token ids int64 [T] -> [T, D]; on the first stage."""
    final_norm: Tensor | None
    lm_head: Callable[[Tensor], Tensor] | None
    """[S, D] -> [S, V]; on the last stage."""
    kernels: NativeKernels | None

    def forward(self, batch: MicroBatch, caches: list[LayerKvCache]) -> ForwardPass:
        """Hidden states of a micro-batch after this stage's layers."""
        x = batch.hidden if self.embedding is None else self.embedding(batch.hidden)
        if not x.shape[0]:
            return x  # the step only releases sequences
        rotary = self.rotary.rows(batch.positions)
        normed = rms_norm(x, self.layers[0].input_norm, self.rms_norm_eps, kernels=self.kernels)
        for number, (layer, cache) in enumerate(zip(self.layers, caches, strict=True), start=1):
            attended = layer.attention(normed, batch, rotary, cache)
            x, normed = self._add_norm(x, attended, layer.post_attention_norm)
            if isinstance(layer.feed_forward, Gate):
                experts, weights = layer.feed_forward(normed)
                fed = yield ExpertCall(layer.index, normed, experts, weights)
                assert fed is not None, "an expert call is answered"
            else:
                fed = layer.feed_forward(normed)
            if number == len(self.layers):
                return x + fed
            x, normed = self._add_norm(x, fed, self.layers[number].input_norm)
        raise AssertionError("a stage has at least one layer")

    def _add_norm(self, residual: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream with x added, and its norm, in one pass over memory."""
        return add_rms_norm(residual, x, weight, self.rms_norm_eps, kernels=self.kernels)

    def sampled_logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """hidden [T, D] as `forward` returned it, rows int64 [S] -> [S, V] on the host; on the last stage only."""
        return self.logits(hidden[rows])

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, D] of the rows that sample -> [S, V]; on the last stage only."""
        assert self.final_norm is not None, "only the last stage has it"
        assert self.lm_head is not None, "only the last stage has it"
        return self.lm_head(rms_norm(hidden, self.final_norm, self.rms_norm_eps, kernels=self.kernels))
