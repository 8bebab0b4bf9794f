"""What decides the bits of a result on this process, as one short word that peers compare."""

from __future__ import annotations

import torch


def numeric_class(device: str, kernels_variant: str) -> str:
    """Device, kernels, torch's instruction set and build. Threads change no bits; the dtype is the whole mesh's."""
    capability = torch.backends.cpu.get_cpu_capability() if device == "cpu" else torch.cuda.get_device_name()
    return "/".join((device, kernels_variant, str(capability), torch.__version__)).replace(" ", "-")
