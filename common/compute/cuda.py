"""A CUDA GPU as a device, and which device a setting names.

Nothing here runs at import: a process that has touched CUDA cannot be forked, and nodes are forks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from common.compute.device import Device, Marker, StagedDevice, numeric_word
from common.errors import ConfigurationError
from common.processes.memory import offered_device_bytes


class CudaMarker(Marker):
    """An event of the current stream."""

    def __init__(self) -> None:
        self._event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self) -> None:
        """After all that was asked of the stream so far."""
        self._event.record()

    def is_reached(self) -> bool:
        """Raises RuntimeError if something before it has failed."""
        return bool(self._event.query())


class CudaDevice(StagedDevice):
    """One GPU, or what the driver shows as one."""

    def __init__(self, place: torch.device, num_processes: int) -> None:
        """`place` with its index. `num_processes` of this mesh, ranks too, share the GPU. Raises RuntimeError."""
        torch.cuda.set_device(place)
        super().__init__(place, CudaMarker, is_pinned=True, num_processes=num_processes)
        self._copies: Any = torch.cuda.Stream(place)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def beside_computing(self) -> Iterator[None]:
        """On a stream of its own, which waits for the one that computes."""
        self._copies.wait_stream(torch.cuda.current_stream(self.place))
        with torch.cuda.stream(self._copies):
            yield

    def release(self) -> None:
        """torch keeps what it once had, for itself."""
        torch.cuda.empty_cache()

    def offered_bytes(self) -> int:
        """Returns 80% of what is free on the GPU, or of this process's part of it."""
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.place)
        return offered_device_bytes(free_bytes, total_bytes, self._num_processes)

    def numeric_class(self, variant: str) -> str:
        """Returns what computes, the GPU's model, compute capability and number of processors (a library chooses its
        algorithm by them, and a part of a GPU has fewer), torch and CUDA. Which GPU of a host it is changes no bits."""
        found = torch.cuda.get_device_properties(self.place)
        hardware = f"{found.name}/sm{found.major}{found.minor}x{found.multi_processor_count}"
        return numeric_word("cuda", variant, hardware, torch.__version__, f"cuda{torch.version.cuda}")


def open_device(setting: str, *, num_ranks: int = 1, num_processes: int = 1) -> Device:
    """Returns the device that DEVICE names, ready for work. Raises ConfigurationError with what torch says against it.

    `auto` is cuda where there is a GPU. `num_processes` share it, each with `num_ranks` ranks that go round the GPUs.
    """
    if setting == "auto":
        setting = "cuda" if torch.cuda.is_available() else "cpu"
    if setting == "cpu":
        return Device(num_processes)
    try:
        place = torch.device(setting)
        torch.zeros(1, device=place)  # what is wrong with driver, build or index shows here
        num_processes *= -(-num_ranks // count_gpus())
        device = CudaDevice(torch.device("cuda", place.index or 0), num_processes)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA says so by an assertion
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigurationError(
            f"DEVICE={setting} cannot be used: {reason} (torch {torch.__version__}); DEVICE=cpu computes without a GPU"
        ) from None
    demand_exact_arithmetic()
    return device


def count_gpus() -> int:
    """Returns how many torch sees on this host, or is shown."""
    return torch.cuda.device_count()


def places_of_ranks(first: torch.device, num_ranks: int, num_gpus: int) -> list[str]:
    """Returns where each rank of a stage computes: on the first one's GPU and those after it, and round again; or all
    on the host. As DEVICE would say it."""
    if first.type == "cpu":
        return ["cpu"] * num_ranks
    return [f"cuda:{((first.index or 0) + rank) % num_gpus}" for rank in range(num_ranks)]


def demand_exact_arithmetic() -> None:
    """Products of float32 in float32, and sums of bfloat16 products in float32: for this process.

    Torch's defaults may be changed by its environment, and shorten sums of bfloat16 where a product is split.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
