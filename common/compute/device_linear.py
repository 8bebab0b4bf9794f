"""The linear layer on a device: its library's products, and a row still keeps its bits in any company.

As in torch_linear.py every product has one fixed shape, ROWS rows (the rest padding) and the whole of k, so that the
library has one algorithm for it. Within a product each row is added up alike: tests marked `gpu` are there to see that.
Weights stay in their own dtype, and sums of bfloat16 products are float32 (`cuda.demand_exact_arithmetic`).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

ROWS = 64
"""Up to about so many a GPU takes as long to read the weights as to multiply. By arithmetic, not by measurement."""


class DeviceLinear:
    """y = x @ weight^T + bias, rounded once to the weight's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [N, K], bias [N], on the device that computes."""
        self._weight = weight.detach().contiguous()
        self._bias = None if bias is None else bias.detach().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N], both of the weight's dtype and on its device."""
        tokens = x.shape[0]
        padded = functional.pad(x, (0, 0, 0, -tokens % ROWS)).contiguous()
        result = x.new_empty((padded.shape[0], self._weight.shape[0]))
        for start in range(0, padded.shape[0], ROWS):
            rows = padded[start : start + ROWS]
            result[start : start + ROWS] = functional.linear(rows, self._weight, self._bias)
        return result[:tokens]
