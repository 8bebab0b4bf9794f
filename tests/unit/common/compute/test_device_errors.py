"""What torch raises of a device, and what that is to the mesh."""

from __future__ import annotations

import pytest
import torch

from common.compute.device_errors import raise_if_life_ending, refusal_to_load
from common.errors import CapacityError, CheckpointError, DeviceError, ExecutionError, NodeLostError, RankLostError

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...\nSee ...")
LOST = (
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    DeviceError("the GPU hangs"),
)


def test_want_of_memory_in_a_step_ends_the_process_with_torchs_sentence() -> None:
    with pytest.raises(DeviceError, match=r"^the GPU has no memory left for this step: .*2\.00 GiB.*[^\n]$"):
        raise_if_life_ending(OUT_OF_MEMORY)


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_a_lost_device_ends_the_process_at_work_and_at_a_load(error: Exception) -> None:
    with pytest.raises(DeviceError, match="GPU") as at_work:
        raise_if_life_ending(error)
    assert "\n" not in str(at_work.value)
    with pytest.raises(DeviceError, match="GPU"):
        refusal_to_load(error)


def test_a_lost_rank_ends_the_incarnation_at_work_and_at_a_load() -> None:
    error = RankLostError("the rank of seat 1 is gone")
    for outcome in (raise_if_life_ending, refusal_to_load):
        with pytest.raises(RankLostError) as raised:
            outcome(error)
        assert raised.value is error


def test_it_ends_the_process_and_not_only_the_incarnation() -> None:
    """A CUDA context that has failed stays so as long as its process lives."""
    assert not issubclass(DeviceError, NodeLostError)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ValueError("no"), MemoryError()], ids=repr)
def test_other_errors_are_a_steps_own(error: Exception) -> None:
    raise_if_life_ending(error)
    assert isinstance(refusal_to_load(error), ExecutionError)


def test_what_does_not_fit_is_refused_and_the_node_lives() -> None:
    refusal = refusal_to_load(OUT_OF_MEMORY)
    assert isinstance(refusal, CapacityError)
    assert "set CAPACITY_BYTES lower" in str(refusal)
    error = CheckpointError("tensor x is missing")
    assert refusal_to_load(error) is error
