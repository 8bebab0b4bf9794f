"""The half of a layer, put together from its parts: anywhere, and also where it is cut over ranks.

T tokens, D model width, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from common.compute.expert_choice import ExpertChoice
from common.compute.linear import PackedLinear
from common.compute.rms_norm import Norm
from services.stage.model.attention import Attention
from services.stage.model.layer_half.inputs import Attended, LayerInputs
from services.stage.model.paged_attention import LayerKvCache


@dataclass(frozen=True, slots=True)
class Gate:
    """Says which experts a token goes to."""

    linear: PackedLinear
    choice: ExpertChoice

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns for hidden [T, D] the experts, int64 [T, K] by falling weight, and their weights, float32 [T, K]."""
        return self.choice(self.linear(hidden), kernels=self.linear.kernels)


@dataclass(frozen=True, slots=True)
class ComposedHalf:
    """A `LayerHalf`: norm, attention, norm, gate."""

    input_norm: Norm
    attention: Attention
    post_attention_norm: Norm
    gate: Gate | None
    """None where what follows is no experts, or another rank asks them."""

    def __call__(self, x: Tensor, fed: Tensor | None, inputs: LayerInputs, cache: LayerKvCache) -> Attended:
        if fed is None:
            normed = self.input_norm(x)
        else:
            x, normed = self.input_norm.of_sum(x, fed)
        attended = self.attention(normed, inputs.batch, inputs.rotary_rows, cache)
        residual, normed = self.post_attention_norm.of_sum(x, attended)
        if self.gate is None:
            return Attended(residual, normed)
        return Attended(residual, normed, *self.gate(normed))
