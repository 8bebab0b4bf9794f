"""A stage that reports as busy only what its kernels take: `python -m tests.benchmarks.timed_stage`.

Its own report counts whole turns, with the Python at the beginning and at the end of a step. Here what lies between two
kernels counts as nothing, whatever language it is in. The sum over experts is part of an expert call, not of these.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from common.compute.native_library import NativeKernels, load_native_kernels
from common.messages import StageHeartbeat
from services.stage import process
from services.stage.__main__ import main
from services.stage.service import StageService

KERNELS = (
    "linear",
    "gated_ffn",
    "attention",
    "write_kv",
    "rms_norm",
    "rope",
    "gated_product",
    "choose_experts",
    "choose_tokens",
    "layer_half",
)
"""Those that Python calls. What native code computes from layer to layer, it times itself."""


class KernelClock:
    """Adds up how long kernels take."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = 0.0
        self._clock = clock

    def timed(self, kernels: NativeKernels) -> NativeKernels:
        """Returns the same kernels, timed."""
        return replace(kernels, **{name: self._timed(getattr(kernels, name)) for name in KERNELS})

    def _timed(self, kernel: Callable[..., Any]) -> Any:
        def call(*arguments: Any) -> Any:
            began_s = self._clock()
            result = kernel(*arguments)
            self.seconds += self._clock() - began_s
            return result

        return call


def count_kernels_only() -> None:
    """From now on, stages of this process do. Raises RuntimeError where they have no native kernels."""
    clock, load_kernels, report = KernelClock(), load_native_kernels, StageService._load

    def load_timed(**options: Any) -> NativeKernels:
        kernels = load_kernels(**options)
        if kernels is None:
            raise RuntimeError("there are no native kernels to time")
        return clock.timed(kernels)

    def report_kernels(service: StageService) -> StageHeartbeat:
        return replace(report(service), busy_seconds=clock.seconds + service._experts.busy_seconds)

    vars(process)["load_native_kernels"] = load_timed
    setattr(StageService, "_load", report_kernels)  # noqa: B010


if __name__ == "__main__":
    count_kernels_only()
    sys.exit(main())
