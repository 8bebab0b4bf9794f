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

from torch import Tensor

from common.compute.device import HOST, Device
from common.compute.rms_norm import Norm
from services.stage.model.attention import RotaryTable
from services.stage.model.layer_half.inputs import Attended, LayerHalf, LayerInputs
from services.stage.model.layer_half.native import NativeHalf
from services.stage.model.layer_half.run import LayerRun, RunLayers
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
    run: LayerRun | None = None
    """What comes after it, where whoever answers may go on by itself."""


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
class DecoderLayer:
    """Attention, with the choice of experts where there are any, and a feed-forward half: theirs or a dense network."""

    index: int
    half: LayerHalf
    feed_forward: Feed | None
    """None: experts, which are elsewhere."""


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

    def run_layers(self, caches: list[LayerKvCache]) -> RunLayers | None:
        """Returns what lets forward passes run from layer to layer in these caches; None where native code cannot."""
        layers = [(layer.index, layer.half if layer.feed_forward is None else None) for layer in self.layers]
        return RunLayers(layers, caches) if any(isinstance(half, NativeHalf) for _, half in layers) else None

    def forward(
        self, batch: MicroBatch, caches: list[LayerKvCache], run_layers: RunLayers | None = None
    ) -> ForwardPass:
        """Computes what leaves the stage: hidden states [T, D], on the last one logits [S, V] of the rows that sample.

        `caches`, of this rank's KV heads, are on the device. `run_layers`: what `run_layers` gives for them; None: each
        answer goes back to this pass. Raises RankLostError where a layer is cut over ranks.
        """
        batch = _put_on(self.device, batch)
        x = batch.hidden if self.embedding is None else self.embedding(batch.hidden)
        fed = x
        if x.shape[0]:  # else the step only releases sequences, or copies blocks
            x, fed = yield from self._through_layers(x, batch, caches, run_layers)
        if self.lm_head is None:
            output = x + fed
        else:
            assert self.final_norm is not None, "the last stage has both"
            x, fed = (_chosen_rows(tensor, batch.sampling_rows) for tensor in (x, fed))
            output = self.lm_head(self.final_norm.of_sum(x, fed)[1])
        (output,) = yield from self._to_host(output)
        return output

    def _through_layers(
        self, x: Tensor, batch: MicroBatch, caches: list[LayerKvCache], run_layers: RunLayers | None
    ) -> Generator[ExpertCall | AskedElsewhere | OnItsWay, Tensor | None, tuple[Tensor, Tensor]]:
        """Returns the residual stream [T, D], and what the last layer adds to it."""
        inputs = LayerInputs(batch, self.rotary)
        run = None if run_layers is None else LayerRun(run_layers, inputs)
        fed: Tensor | None = None
        place = 0
        while place < len(self.layers):
            layer = self.layers[place]
            attended = layer.half(x, fed, inputs, caches[place])
            x = attended.residual
            if layer.feed_forward is not None:
                fed = layer.feed_forward(attended.normed)
            else:
                if run is not None:
                    run.arrive(place, x)
                fed = yield from self._ask_experts(layer.index, attended, run)
                place = place if run is None else run.place
            place += 1
        assert fed is not None, "a stage has at least one layer"
        return x, fed

    def _ask_experts(self, layer: int, attended: Attended, run: LayerRun | None) -> ForwardPass:
        if attended.experts is None or attended.weights is None:
            answer = yield AskedElsewhere()
        else:
            hidden, experts, weights = yield from self._to_host(attended.normed, attended.experts, attended.weights)
            answer = yield ExpertCall(layer, hidden, experts, weights, run)
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


def _chosen_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Returns the rows [S] of x [T, D]. They ascend: as many as there are in x are all of them."""
    return x if rows.shape[0] == x.shape[0] else x.index_select(0, rows)


def _put_on(device: Device, batch: MicroBatch) -> MicroBatch:
    if device.is_host:
        return batch
    return MicroBatch.of_tensors(device.to_device(*batch.tensors()), batch.sampling, host_positions=batch.positions)
