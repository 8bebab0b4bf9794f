"""Collectives of the host for ranks that compute on devices: parts are copied to the host, and what comes of them back.

For GPUs that NCCL cannot join: several ranks on one GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.compute.device import Device
from services.stage.ranks.collectives import Collectives


class StagedCollectives:
    """`inner` by way of the device's staging buffers."""

    def __init__(self, inner: Collectives, device: Device) -> None:
        self._inner = inner
        self._device = device
        self.degree = inner.degree
        self._laid_out: Tensor | None = None

    @property
    def seconds(self) -> float:
        """Without the copies."""
        return self._inner.seconds

    @property
    def count(self) -> int:
        return self._inner.count

    def lay_out(self, x: Tensor) -> None:
        (self._laid_out,) = self._device.to_host(x)
        self._inner.lay_out(self._laid_out)

    def broadcast(self, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if x is None:
            return self._to_device(self._inner.broadcast(None, shape, dtype))
        self._inner.broadcast(self._laid_out, shape, dtype)
        return x

    def all_gather(self, part: Tensor) -> Tensor:
        return self._to_device(self._inner.all_gather(self._to_host(part)))

    def gather(self, part: Tensor) -> Tensor | None:
        whole = self._inner.gather(self._to_host(part))
        return None if whole is None else self._to_device(whole)

    def sum(self, part: Tensor) -> Tensor | None:
        total = self._inner.sum(self._to_host(part))
        return None if total is None else self._to_device(total)

    def close(self) -> None:
        self._inner.close()

    def _to_host(self, part: Tensor) -> Tensor:
        return self._device.to_host(part)[0]

    def _to_device(self, whole: Tensor) -> Tensor:
        return self._device.to_device(whole)[0]
