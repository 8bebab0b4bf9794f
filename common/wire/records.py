"""Names for the columns of tensors that travel with messages, and numpy records in place of numbered columns.

On the wire such a tensor is [N, columns] of one dtype; here it is [N] records. The order of the names is that of the
columns. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from common.messages import TensorFrame
from common.wire.array import array_to_frame, frame_to_array

Records = npt.NDArray[np.void]

STEP_SEQUENCE: Final = np.dtype(
    [
        ("sequence_id", np.int64),
        ("start", np.int64),
        ("num_tokens", np.int64),
        ("num_known_blocks", np.int64),
        ("num_new_blocks", np.int64),
        ("samples", np.int64),
    ]
)
"""A row of `Step.sequences`."""
SAMPLING: Final = np.dtype(
    [
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("top_k", np.float64),
        ("num_top_logprobs", np.float64),
    ]
)
"""A row of `Step.sampling`."""
SEED: Final = np.dtype([("seed", np.int64), ("choice", np.int64)])
"""A row of `Step.seeds`."""
HELD_SEQUENCE: Final = np.dtype([("sequence_id", np.int64), ("num_positions", np.int64), ("num_blocks", np.int64)])
"""A row of `Hello.held_sequences`."""


def records_to_frame(rows: Sequence[tuple[Any, ...]], record: np.dtype[np.void]) -> TensorFrame:
    """Returns a frame [N, columns] of records, each a tuple in the order of its names."""
    return array_to_frame(columns_of(np.array(rows, dtype=record)))


def frame_to_records(frame: TensorFrame, record: np.dtype[np.void], num_records: int | None, name: str) -> Records:
    """Returns the frame as records [N] over the received bytes (read-only). Raises ProtocolError that names the
    field."""
    item, num_columns = _layout(record)
    columns = frame_to_array(frame, item, (num_records, num_columns), name)
    return columns.view(record).reshape(len(columns))


def columns_of(records: Records) -> npt.NDArray[Any]:
    """Returns contiguous records [N] as they travel, [N, columns]."""
    item, num_columns = _layout(records.dtype)
    return records.view(item).reshape(len(records), num_columns)


@cache  # a dtype's name is composed anew at every call, which takes as long as the rest
def _layout(record: np.dtype[np.void]) -> tuple[str, int]:
    """Returns the dtype of all columns, and how many there are."""
    return record[0].name, len(record.names or ())
