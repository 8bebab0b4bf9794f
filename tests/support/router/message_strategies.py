"""Arbitrary messages of every kind, within what the codec promises to carry."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args, get_type_hints

from hypothesis import strategies as st

from common.messages import Dispatch, ExpertRows, Header, Message, TensorFrame
from common.wire.codec import ITEM_BYTES

KINDS: tuple[type[Any], ...] = get_args(Message)
COUNTS = st.integers(0, 2**63 - 1)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    int: COUNTS,
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: TEXTS,
    bool: st.booleans(),
    tuple[str, ...]: st.lists(TEXTS, max_size=3).map(tuple),
    tuple[int, ...]: st.lists(COUNTS, max_size=3).map(tuple),
}


_SIZES = st.integers(0, 4)


@st.composite
def tensor_frames(
    draw: st.DrawFn,
    dtypes: st.SearchStrategy[str] = st.sampled_from(sorted(ITEM_BYTES)),  # noqa: B008
    shapes: st.SearchStrategy[tuple[int, ...]] = st.lists(_SIZES, max_size=4).map(tuple),  # noqa: B008
) -> TensorFrame:
    """Any dtype and shape of up to four dimensions, also empty ones."""
    dtype, shape = draw(dtypes), draw(shapes)
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    return TensorFrame(dtype, shape, draw(st.binary(min_size=num_bytes, max_size=num_bytes)))


_ROWS = tensor_frames(shapes=st.tuples(_SIZES, _SIZES))
FIXED_KINDS: dict[type[Any], dict[str, st.SearchStrategy[TensorFrame]]] = {
    Dispatch: {
        "hidden": _ROWS,
        "routing": tensor_frames(st.just("int32"), st.tuples(st.just(3), _SIZES)),
        "weights": tensor_frames(st.just("float32"), st.tuples(_SIZES)),
    },
    ExpertRows: {"rows": _ROWS},
}
"""The kinds whose values have fixed places, and what their tensors may be."""


def messages_of(kind: type[Any]) -> st.SearchStrategy[Any]:
    """All messages of one kind."""
    if kind in FIXED_KINDS:
        return st.builds(kind, call=COUNTS, **FIXED_KINDS[kind])
    hints = get_type_hints(kind)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return st.builds(
        kind, **{name: tensor_frames() if hint is TensorFrame else _BY_TYPE[hint] for name, hint in fields.items()}
    )


def messages() -> st.SearchStrategy[Any]:
    """Messages of all kinds."""
    return st.sampled_from(KINDS).flatmap(messages_of)


def headers() -> st.SearchStrategy[Header]:
    """Any counters and traces."""
    counters = {field.name: COUNTS for field in dataclasses.fields(Header) if field.name != "trace"}
    return st.builds(Header, **counters, trace=st.text(st.characters(exclude_categories=["Cs"]), max_size=128))
