"""The known question that every shard answers before it is used, and what is said of its answer. No sockets.

The answer is compared twice: here with torch's, which finds kernels that compute wrongly, and by the router with
those of other nodes that hold the shard, which finds weights that differ.
"""

from __future__ import annotations

import zlib
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from common.errors import CheckpointError, ExecutionError
from common.topology import ShardId

PROBE_ROWS: Final = 4
"""More than one, so that the kernels' blocks of rows are tried too."""
TOLERANCE: Final[dict[torch.dtype, float]] = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Of the difference from torch, against the size of the answer."""


class ProbeAnswer(NamedTuple):
    """What is compared."""

    digest: int
    """Of the bits, above 0: equal on nodes of one numeric class."""
    projection: float
    """The answer along a fixed direction, over its length: nearly equal on all nodes."""


def probe_rows(width: int) -> Tensor:
    """float32 [PROBE_ROWS, width]: of about the size of normed rows, and exact in bfloat16."""
    return _pattern(PROBE_ROWS, width) / 64.0


def torch_answer(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The gated feed-forward network as torch computes it."""
    return linear(silu(linear(rows, gate)) * linear(rows, up), down)


def check_answer(answer: Tensor, by_torch: Tensor, shard: ShardId) -> None:
    """Raises CheckpointError for numbers that are not finite, ExecutionError for an answer that is not torch's."""
    if not bool(torch.isfinite(answer).all()):
        raise CheckpointError(
            f"expert {shard.expert} of layer {shard.layer} gives numbers that are not finite: it is damaged"
        )
    expected = by_torch.float()
    difference, size = float((answer.float() - expected).norm()), float(expected.norm())
    if difference > TOLERANCE.get(answer.dtype, 0.05) * size + 1e-30:
        raise ExecutionError(
            f"expert {shard.expert} of layer {shard.layer}: the kernels' answer to the probe is {difference:.3g} away "
            f"from torch's, which is {size:.3g} long"
        )


def summarise(answer: Tensor) -> ProbeAnswer:
    """Of an answer [PROBE_ROWS, D] on the host."""
    contiguous = answer.contiguous()
    digest = zlib.crc32(contiguous.view(torch.uint8).numpy().tobytes()) & 0x7FFFFFFF
    numbers = contiguous.double()
    length = float(numbers.norm())
    direction = torch.where(_pattern(*numbers.shape) >= 0, 1.0, -1.0).double()
    return ProbeAnswer(max(1, digest), float((numbers * direction).sum()) / length if length else 0.0)


def _pattern(rows: int, columns: int) -> Tensor:
    """float32 whole numbers in [-128, 128) without visible order."""
    places = torch.arange(rows * columns, dtype=torch.int64).reshape(rows, columns)
    mixed = (places * 2654435761 + 12345) % (1 << 32)
    return ((mixed >> 13) % 256 - 128).to(torch.float32)
