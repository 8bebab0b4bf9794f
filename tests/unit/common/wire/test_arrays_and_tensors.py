"""Arrays and tensors as frames: the same bytes back, or a ProtocolError that names the field."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import ProtocolError
from common.messages import TensorFrame
from common.wire.array import array_to_frame, frame_to_array, shape_matches
from common.wire.codec import ITEM_BYTES
from common.wire.tensor import DTYPES, frame_to_tensor, tensor_to_frame

NUMPY_DTYPES = sorted(set(ITEM_BYTES) - {"bfloat16"})
ARRAYS = st.sampled_from(NUMPY_DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)


def received(frame: TensorFrame) -> TensorFrame:
    """As it lies in a received message: memory of its own that may be written to."""
    return TensorFrame(frame.dtype, frame.shape, memoryview(bytearray(frame.data)))


@settings(deadline=None)
@given(array=ARRAYS)
def test_an_array_comes_back_bit_by_bit(array: npt.NDArray[Any]) -> None:
    frame = array_to_frame(array)
    assert len(frame.data) == array.size * ITEM_BYTES[frame.dtype]
    back = frame_to_array(received(frame), str(array.dtype), tuple(None for _ in array.shape), "x")
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@settings(deadline=None)
@given(array=ARRAYS, as_bfloat16=st.booleans())
def test_a_tensor_comes_back_bit_by_bit(array: npt.NDArray[Any], as_bfloat16: bool) -> None:
    tensor = torch.from_numpy(array.copy())
    if as_bfloat16 and array.dtype == np.float32:
        tensor = tensor.to(torch.bfloat16)
    frame = tensor_to_frame(tensor)
    back = frame_to_tensor(received(frame), tensor.dtype, tuple(tensor.shape), "x")
    assert back.shape == tensor.shape
    assert back.dtype == tensor.dtype
    if tensor.numel():
        assert back.reshape(-1).view(torch.uint8).equal(tensor.contiguous().reshape(-1).view(torch.uint8))


def test_all_wire_dtypes_are_known_on_both_sides() -> None:
    assert DTYPES.keys() == ITEM_BYTES.keys()
    for name, dtype in DTYPES.items():
        assert dtype.itemsize == ITEM_BYTES[name]
        assert tensor_to_frame(torch.ones(2, dtype=dtype)).dtype == name


def test_what_is_not_dense_travels_dense() -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2]
    assert frame_to_array(array_to_frame(array), "int32", (3, 2), "x").tolist() == array.tolist()
    tensor = torch.arange(12, dtype=torch.int32).reshape(3, 4).t()[1:, ::2]
    assert torch.equal(frame_to_tensor(received(tensor_to_frame(tensor)), torch.int32, (3, 2), "x"), tensor)


def test_frames_show_the_memory_that_they_were_made_from() -> None:
    array, tensor = np.zeros(2, dtype=np.uint8), torch.zeros(2, dtype=torch.uint8)
    frames = array_to_frame(array), tensor_to_frame(tensor)
    array[0] = tensor[0] = 7
    assert [frame.data[0] for frame in frames] == [7, 7]


@pytest.mark.parametrize(
    ("dtype", "shape", "wanted"),
    [
        ("int64", (2, 3), "int64 [2, 3]"),
        ("int32", (3, 2), "int32 [3, 2]"),
        ("int32", (2, None, None), "int32 [2, *, *]"),
        ("int32", (6,), "int32 [6]"),
        ("int32", (), "int32 []"),
    ],
)
def test_another_dtype_or_shape_is_refused_by_the_name_of_the_field(dtype: str, shape: Any, wanted: str) -> None:
    frame = array_to_frame(np.zeros((2, 3), dtype=np.int32))
    for read in (
        lambda: frame_to_array(frame, dtype, shape, "Step.hidden"),
        lambda: frame_to_tensor(frame, DTYPES[dtype], shape, "Step.hidden"),
    ):
        with pytest.raises(ProtocolError) as caught:
            read()
        assert str(caught.value) == f"Step.hidden must be {wanted}, not int32 [2, 3]"


def test_a_dtype_that_only_the_other_side_knows_is_refused() -> None:
    with pytest.raises(ProtocolError):
        frame_to_tensor(TensorFrame("float8", (1,), b"\0"), torch.float32, (1,), "x")
    with pytest.raises(ProtocolError):
        frame_to_array(TensorFrame("bfloat16", (1,), b"\0\0"), "float32", (1,), "x")


def test_none_stands_for_any_size_of_one_axis() -> None:
    assert shape_matches((2, 3), (None, 3))
    assert shape_matches((), ())
    assert not shape_matches((2, 3), (None,))
    assert not shape_matches((2, 3), (None, 4))
