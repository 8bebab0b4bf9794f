"""What an accelerator's failures are to this mesh. torch raises them as RuntimeErrors, at the next call that waits."""

from __future__ import annotations

import torch

from common.errors import LIFE_ENDING_ERRORS, CapacityError, DeviceError, ExecutionError, MoemeshError

LOADING_ERRORS = (MoemeshError, ValueError, RuntimeError, MemoryError, OSError)
"""What a damaged checkpoint or too little memory may raise."""
_MARKS = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS", "CUDA out of memory")


def raise_if_life_ending(error: BaseException) -> None:
    """For what computing raised. Raises it again where it is one of LIFE_ENDING_ERRORS, and DeviceError where the fault
    is the accelerator's and not the step's.

    Want of memory is among them: what this process holds leaves too little for the steps that it is asked for, and one
    that starts again offers what is free then.
    """
    if isinstance(error, LIFE_ENDING_ERRORS):
        raise error
    if isinstance(error, torch.OutOfMemoryError):
        raise DeviceError(f"the GPU has no memory left for this step: {_sentence(error)}") from error
    is_marked = isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)
    if isinstance(error, torch.AcceleratorError) or is_marked:
        raise DeviceError(f"the GPU has failed: {_sentence(error)}") from error


def refusal_to_load(error: Exception) -> MoemeshError:
    """Returns what is answered when weights or a cache could not be put in place; want of memory is a CapacityError.

    Raises RankLostError, DeviceError where a rank or the accelerator is lost.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return CapacityError(f"the GPU has no room for it, set CAPACITY_BYTES lower: {_sentence(error)}")
    raise_if_life_ending(error)
    return error if isinstance(error, MoemeshError) else ExecutionError(str(error))


def _sentence(error: BaseException) -> str:
    """Without the advice on debugging that follows."""
    return str(error).strip().partition("\n")[0]
