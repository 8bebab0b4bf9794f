"""What decides the bits of a result on this process, as one short word that peers compare."""

from __future__ import annotations

import torch


def numeric_class(device: str, dtype: str, kernels_variant: str) -> str:
    """Device, kernels (or torch's own, with its instruction set), torch build and dtype. Threads change no bits."""
    capability = torch.backends.cpu.get_cpu_capability() if device == "cpu" else torch.cuda.get_device_name()
    return "/".join((device, kernels_variant, str(capability), torch.__version__, dtype)).replace(" ", "-")
