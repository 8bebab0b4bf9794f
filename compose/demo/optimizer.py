"""Muon for matrices, Adam for the rest.

Muon (Keller Jordan, 2024, "Muon: An optimizer for hidden layers"): the momentum of a matrix is replaced by the nearest
matrix whose singular values are all about 1. A model this small learns its tasks in about half the steps that way.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MUON_RATE = 0.02
ADAM_RATE = 0.004
MOMENTUM = 0.95
WEIGHT_DECAY = 0.02
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """For parameters that are matrices or stacks of matrices [..., rows, columns]."""

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float) -> None:
        super().__init__(parameters, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
                # Nesterov: the gradient once more on top of the momentum that has it already.
                direction = parameter.grad.lerp(momentum, MOMENTUM)
                matrices = direction.view(-1, *_matrix_shape(parameter))
                rows, columns = matrices.shape[-2:]
                update = orthogonalise(matrices) * max(1.0, rows / columns) ** 0.5
                parameter.mul_(1 - group["lr"] * WEIGHT_DECAY).sub_(group["lr"] * update.view_as(parameter))


def _matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """Projections that lie above each other in one tensor are matrices of their own, as square as they come."""
    rows, columns = parameter.shape[-2:]
    return (columns, columns) if rows % columns == 0 else (rows, columns)


def orthogonalise(matrices: Tensor) -> Tensor:
    """[M, rows, columns] -> the same shape, every singular value brought near 1 by five Newton-Schulz steps."""
    first, third, fifth = _NEWTON_SCHULZ
    x = matrices.float()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    orthogonal: Tensor = x.mT if is_tall else x
    return orthogonal.to(matrices.dtype)


def build_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers; Adam for embedding, head, gates and norms, which are tables or too flat."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and name.startswith("layers.") and not name.endswith(".gate")
        (matrices if is_matrix else others).append(parameter)
    return [Muon(matrices, MUON_RATE), torch.optim.Adam(others, lr=ADAM_RATE, betas=(0.9, 0.98), fused=True)]


def scheduled_rate(progress: float, warm_up: float = 0.01, decay_from: float = 0.4) -> float:
    """Factor on the rates at `progress` 0..1: up quickly, level, then straight down to almost zero."""
    if progress < warm_up:
        return (progress + 0.001) / (warm_up + 0.001)
    return 1.0 if progress < decay_from else max(0.01, (1 - progress) / (1 - decay_from))
