"""The linear layer on a CPU without native kernels: torch computes, and a row still keeps its bits in any company.

A library may sum over k in another order for another number of rows (oneDNN was seen to for 1 row against more, at any
K). So every product here has one fixed shape: ROWS rows, the rest padding, and at most COLUMNS of k at a time, whose
float32 results are added in order. That the place of a row among the ROWS does not matter is no promise of oneDNN, but
was measured: 60,000 comparisons with AVX-512, AVX2 and SSE4.1 code, none unequal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 16
COLUMNS = 512
PADDING = 64  # N and K are padded to multiples: odd sizes take other paths in oneDNN


class TorchLinear:
    """y = x @ weight^T + bias in float32 throughout, rounded to the weight's dtype at the end."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [N, K], bias [N]. The float32 copy takes twice the memory of bf16 weights."""
        self._dtype = weight.dtype
        self._out_features, self._in_features = weight.shape
        self._prepacked: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self._bias = None if bias is None else bias.detach().to(torch.float32)
        self._padded_in = _up(self._in_features, PADDING)
        wide = functional.pad(
            weight.detach().to(torch.float32),
            (0, self._padded_in - self._in_features, 0, _up(self._out_features, PADDING) - self._out_features),
        )
        panels = [panel.contiguous() for panel in torch.split(wide, COLUMNS, dim=1)]
        if self._prepacked:
            panels = [torch.ops.mkldnn._reorder_linear_weight(panel, ROWS) for panel in panels]
        self._panels = panels

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N], both of the weight's dtype."""
        tokens = x.shape[0]
        # Without oneDNN there is no measurement to stand on: one row a product, always the first and only one.
        rows = ROWS if self._prepacked else 1
        padding = (0, self._padded_in - self._in_features, 0, -tokens % rows)
        padded = functional.pad(x.to(torch.float32), padding)
        tiles = [self._tile(tile) for tile in torch.split(padded, rows)]
        result = torch.cat(tiles)[:tokens, : self._out_features] if tiles else x.new_empty(0, self._out_features)
        if self._bias is not None:
            result = result + self._bias
        return result.to(self._dtype, copy=True)

    def _tile(self, rows: Tensor) -> Tensor:
        parts = [
            self._product(part.contiguous(), panel)
            for part, panel in zip(torch.split(rows, COLUMNS, dim=1), self._panels, strict=True)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _product(self, rows: Tensor, panel: Tensor) -> Tensor:
        if self._prepacked:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, panel, None, "none", [], "")
            return product
        return functional.linear(rows.clone(), panel)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
