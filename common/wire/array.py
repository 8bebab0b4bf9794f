"""numpy array <-> TensorFrame, for processes without torch (the router) and for integer columns everywhere."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from common.errors import ProtocolError
from common.messages import TensorFrame

_NAMES: Final = {np.dtype(name): name for name in ("float64", "float32", "float16", "int64", "int32", "uint8")}
"""A dtype's own `name` is composed anew at every call, which takes longer than the rest of making a frame."""

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
Float64Array = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
Uint8Array = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]


def array_to_frame(array: npt.NDArray[Any]) -> TensorFrame:
    """Returns a frame over the array's own memory: do not write to it until it is sent."""
    contiguous = np.ascontiguousarray(array)
    data = contiguous.reshape(-1).view(np.uint8).data if contiguous.size else b""
    # The shape is the array's own: numpy makes a contiguous scalar one of shape [1].
    return TensorFrame(_NAMES[contiguous.dtype], array.shape, data)


def frame_to_array(frame: TensorFrame, dtype: str, shape: tuple[int | None, ...], name: str) -> npt.NDArray[Any]:
    """Returns the frame as an array over the received bytes (read-only).

    `shape` states what is expected; None stands for any size. Raises ProtocolError that names the field.
    """
    if frame.dtype != dtype or not shape_matches(frame.shape, shape):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ProtocolError(f"{name} must be {dtype} [{wanted}], not {frame.dtype} {list(frame.shape)}")
    return np.frombuffer(frame.data, dtype=dtype).reshape(frame.shape)


def shape_matches(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    """Returns whether a shape has the wanted rank and sizes; None matches any size."""
    if len(shape) != len(wanted):
        return False
    for size, wanted_size in zip(shape, wanted, strict=True):  # a generator would take twice as long
        if wanted_size is not None and wanted_size != size:
            return False
    return True
