"""What decides the bits of a result on this process, as one short word that peers compare."""

from __future__ import annotations

import torch


def numeric_class(device: str, kernels_variant: str) -> str:
    """Device, kernels, torch's instruction set and build. Threads change no bits; the dtype is the whole mesh's."""
    return _word(device, kernels_variant, str(torch.backends.cpu.get_cpu_capability()), torch.__version__)


def cuda_numeric_class(
    variant: str,
    name: str,
    capability: tuple[int, int],
    num_processors: int,
    torch_version: str,
    cuda_version: str | None,
) -> str:
    """Returns what computes, a GPU's model, compute capability and number of processors (a library chooses its
    algorithm by them, and a part of a GPU has fewer), torch and CUDA. Which GPU of a host it is changes no bits."""
    hardware = f"{name}/sm{capability[0]}{capability[1]}x{num_processors}"
    return _word("cuda", variant, hardware, torch_version, f"cuda{cuda_version}")


def _word(*parts: str) -> str:
    return "/".join(parts).replace(" ", "-")
