"""torch tensor <-> TensorFrame. With weights and compute the only torch files in `common`."""

from __future__ import annotations

from typing import Final

import torch

from common.errors import ProtocolError
from common.messages import TensorFrame
from common.wire.array import shape_matches

DTYPES: Final[dict[str, torch.dtype]] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


def tensor_to_frame(tensor: torch.Tensor) -> TensorFrame:
    """Returns a frame over the tensor's own memory (copied only if it is not dense or not on the CPU); do not write to
    it until it is sent."""
    dense = tensor.detach().cpu().contiguous()
    # numpy has no bfloat16: the bytes travel as they are, whatever they mean.
    readable = dense.view(torch.int16) if dense.itemsize == 2 else dense
    data = readable.numpy().data.cast("B") if dense.numel() else b""
    return TensorFrame(_NAMES[dense.dtype], tuple(dense.shape), data)


def frame_to_tensor(frame: TensorFrame, dtype: torch.dtype, shape: tuple[int | None, ...], name: str) -> torch.Tensor:
    """Returns the frame as a tensor over the received bytes; treat it as read-only.

    `shape` states what is expected; None stands for any size. Raises ProtocolError that names the field.
    """
    if DTYPES.get(frame.dtype) != dtype or not shape_matches(frame.shape, shape):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ProtocolError(f"{name} must be {_NAMES[dtype]} [{wanted}], not {frame.dtype} {list(frame.shape)}")
    if not len(frame.data):
        return torch.empty(frame.shape, dtype=dtype)
    return torch.frombuffer(frame.data, dtype=dtype).view(frame.shape)
