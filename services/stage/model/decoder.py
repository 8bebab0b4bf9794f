"""One stage's part of the decoder: embedding, layers, final norm and lm_head, as far as its layer range has them.

A forward pass is a generator that yields at every expert call, so that one loop can drive many micro-batches. Every
rank of a stage runs the same one: layers that are cut put their parts together themselves, and the residual stream is
on all ranks. On a device it takes batches and answers of the host, and yields expert calls of the host.

T tokens, D model width, K experts a token, S sampled rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from common.compute.device import HOST, Device
from common.compute.linear import PackedLinear
from common.compute.native_library import NativeKernels
from common.compute.rms_norm import add_rms_norm, rms_norm
from common.compute.row_reduction import folded_softmax, folded_sum
from services.stage.model.attention import Attention, RotaryTable
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.paged_attention import LayerKvCache


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
        """Returns whether it can go on. Raises DeviceError, RuntimeError for a device that hangs or has failed."""


class AskedElsewhere:
    """What a forward pass yields in place of an expert call on ranks other than the first, which asks for all."""


ForwardPass = Generator[ExpertCall | AskedElsewhere | OnItsWay, Tensor | None, Tensor]
"""Yields expert calls and is sent their answers; may yield before, until its device is as far, and is sent None."""
Feed = Callable[[Tensor], Tensor]
"""[T, D] -> [T, D]: a dense feed-forward network."""


@dataclass(frozen=True, slots=True)
class Gate:
    """Softmax over all experts in float32, the best K of each token, optionally divided by their sum."""

    linear: PackedLinear
    num_experts_per_token: int
    normalize: bool
    round_weights: bool

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns for hidden [T, D] the experts, int64 [T, K] by falling weight, and their weights, float32 [T, K]."""
        is_on_host = self.linear.device.type == "cpu"
        logits = self.linear(hidden)
        scores = logits.to(torch.float32)
        probabilities = torch.softmax(scores, dim=-1) if is_on_host else folded_softmax(scores)
        weights, experts = torch.topk(probabilities, self.num_experts_per_token, dim=-1)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) if is_on_host else folded_sum(weights))
        if self.round_weights:
            weights = weights.to(logits.dtype).to(torch.float32)
        return experts, weights


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm before a half of a layer, or before the lm_head."""

    weight: Tensor
    epsilon: float
    kernels: NativeKernels | None

    def __call__(self, x: Tensor) -> Tensor:
        """Norms x [T, D] row by row."""
        return rms_norm(x, self.weight, self.epsilon, kernels=self.kernels)

    def of_sum(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the residual stream with x added, and the norm of that, in one pass over memory."""
        return add_rms_norm(residual, x, self.weight, self.epsilon, kernels=self.kernels)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention and a feed-forward half: a gate (experts elsewhere) or a dense network."""

    index: int
    input_norm: Norm
    attention: Attention
    post_attention_norm: Norm
    feed_forward: Gate | Feed | None
    """None: a gate, which only the first rank has."""

    def attend(
        self, x: Tensor, fed: Tensor | None, batch: MicroBatch, rotary: tuple[Tensor, Tensor], cache: LayerKvCache
    ) -> tuple[Tensor, Tensor]:
        """Computes the half of a layer that lies between two feed-forward networks.

        `x` is the residual stream [T, D], `fed` what the network before adds to it (None: there is none before).
        Returns the residual stream after attention, and its norm, which the next network gets.
        """
        if fed is None:
            normed = self.input_norm(x)
        else:
            x, normed = self.input_norm.of_sum(x, fed)
        return self.post_attention_norm.of_sum(x, self.attention(normed, batch, rotary, cache))


@dataclass(frozen=True, slots=True)
class StageModel:
    """Layers [start, stop) with what the ends of the pipeline have besides; of what is cut, one rank's part."""

    layers: tuple[DecoderLayer, ...]
    rotary: RotaryTable
    embedding: Callable[[Tensor], Tensor] | None
    """Token ids int64 [T] -> [T, D]; on the first stage."""
    final_norm: Norm | None
    lm_head: Callable[[Tensor], Tensor] | None
    """[S, D] -> [S, V]; on the last stage."""
    device: Device = HOST
    is_first_rank: bool = True

    def forward(self, batch: MicroBatch, caches: list[LayerKvCache]) -> ForwardPass:
        """Computes what leaves the stage: hidden states [T, D], on the last one logits [S, V] of the rows that sample.

        `caches`, of this rank's KV heads, are on the device. Raises RankLostError where a layer is cut over ranks.
        """
        batch = _put_on(self.device, batch)
        x = batch.hidden if self.embedding is None else self.embedding(batch.hidden)
        if x.shape[0]:  # else the step only releases sequences
            x = yield from self._through_layers(x, batch, caches)
        if self.lm_head is not None:
            assert self.final_norm is not None, "the last stage has both"
            x = self.lm_head(self.final_norm(x[batch.sampling_rows]))
        (output,) = yield from self._to_host(x)
        return output

    def _through_layers(self, x: Tensor, batch: MicroBatch, caches: list[LayerKvCache]) -> ForwardPass:
        rotary = self.rotary.rows(batch.positions)
        fed: Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=True):
            x, normed = layer.attend(x, fed, batch, rotary, cache)
            if layer.feed_forward is None or isinstance(layer.feed_forward, Gate):
                fed = yield from self._ask_experts(layer.index, layer.feed_forward, normed)
            else:
                fed = layer.feed_forward(normed)
        assert fed is not None, "a stage has at least one layer"
        return x + fed

    def _ask_experts(self, layer: int, gate: Gate | None, normed: Tensor) -> ForwardPass:
        if gate is None:
            answer = yield AskedElsewhere()
        else:
            experts, weights = gate(normed)
            answer = yield ExpertCall(layer, *(yield from self._to_host(normed, experts, weights)))
        assert answer is not None, "an expert call is answered"
        return self.device.to_device(answer)[0]

    def _to_host(self, *tensors: Tensor) -> Generator[OnItsWay, None, tuple[Tensor, ...]]:
        """Returns what goes out, as the host has it once the device is as far. Of ranks other than the first nothing
        does."""
        if self.device.is_host or not self.is_first_rank:
            return tensors
        download = self.device.begin_download(*tensors)
        try:
            yield download
            return download.take()
        finally:
            download.give_up()


def _put_on(device: Device, batch: MicroBatch) -> MicroBatch:
    if device.is_host:
        return batch
    return MicroBatch.of_tensors(device.to_device(*batch.tensors()), batch.sampling, host_positions=batch.positions)
