"""What every message is made of: arrays beside the header, and the header."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorFrame:
    """A dense row-major array beside the header; the bytes are not copied on their way to the socket."""

    dtype: str
    """`float32`, `bfloat16`, `float16`, `int64`, `int32`, `uint8` or `float64`."""
    shape: tuple[int, ...]
    data: memoryview | bytes
    """Contiguous; its length is the product of the shape times the item size."""


NO_ARRAY = TensorFrame("uint8", (0,), b"")
"""Where a message has nothing to say in a tensor field."""


@dataclass(frozen=True, slots=True)
class Header:
    """What every message carries besides its own fields; zero where it does not apply."""

    router_term: int = 0
    generation: int = 0
    attempt: int = 0
    step: int = 0
    layer: int = 0
    sequence_number: int = 0
    """Counts the messages of one socket from 1; a stage that sees a gap reports it."""
    time_left_ms: int = 0
    """How long the sender will wait from now on; restamped at every hop, so clocks need not agree. 0: no limit."""
    trace: str = ""
