from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.compute.native_library import NativeKernels
from services.stage.model.paged_attention import (
    KV_BLOCK_TOKENS,
    AttendingRows,
    KvShape,
    LayerKvCache,
    allocate_kv_cache,
    paged_attention,
    write_kv,
)
from tests.support.nodes.kernels import KERNEL_CHOICES, kernels_for, one_torch_thread

__all__ = ["one_torch_thread"]  # pytest finds it here

DTYPES = (torch.float32, torch.bfloat16)
ABSOLUTE_ERROR = {torch.float32: 4e-6, torch.bfloat16: 2e-2}
# query heads, key/value heads, head width, sliding window
SHAPES = (
    (4, 4, 64, 0),
    (4, 2, 16, 0),
    (8, 2, 24, 0),
    (5, 1, 80, 40),
    (6, 2, 8, 33),
    (8, 1, 128, 5),
    (7, 1, 32, 64),
    (1, 1, 3, 1),
)


@dataclass(frozen=True)
class Sequences:
    """Several sequences whose tokens lie in one cache, in blocks that were dealt out at random."""

    cache: LayerKvCache
    block_tables: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    row_sequence: torch.Tensor
    positions: torch.Tensor

    def attend(self, rows: slice | torch.Tensor, window: int, kernels: NativeKernels | None) -> torch.Tensor:
        return paged_attention(
            self.query[rows],
            self.cache,
            AttendingRows(self.block_tables, self.row_sequence[rows], self.positions[rows]),
            scale=self.query.shape[2] ** -0.5,
            sliding_window=window,
            kernels=kernels,
        )


def build(
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    kernels: NativeKernels | None,
    layout: int = 0,
) -> Sequences:
    """`layout`: which of several orders the blocks are dealt out in."""
    generator = torch.Generator().manual_seed(heads * width)
    blocks_each = max(lengths) // KV_BLOCK_TOKENS + 1
    num_blocks = blocks_each * len(lengths) + 2
    cache = allocate_kv_cache(KvShape(1, num_blocks, kv_heads, width, dtype))[0]
    # What a block's last owner left must not matter, whatever it is.
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.inf)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(layout))[: blocks_each * len(lengths)]
    tables = order.view(len(lengths), blocks_each).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    row_sequence = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])
    tokens = len(positions)
    query = torch.randn(tokens, heads, width, generator=generator).to(dtype)
    key, value = (torch.randn(tokens, kv_heads, width, generator=generator).to(dtype) for _ in range(2))
    slots = tables[row_sequence, positions // KV_BLOCK_TOKENS] * KV_BLOCK_TOKENS + positions % KV_BLOCK_TOKENS
    write_kv(key, value, cache, slots.to(torch.int64), kernels=kernels)
    return Sequences(cache, tables, query, key, value, row_sequence.to(torch.int32), positions.to(torch.int32))


def exact(sequences: Sequences, window: int) -> torch.Tensor:
    """Attention in float64 with one mask over all tokens."""
    group = sequences.query.shape[1] // sequences.key.shape[1]
    key, value = (x.double().repeat_interleave(group, dim=1) for x in (sequences.key, sequences.value))
    of, at = sequences.row_sequence, sequences.positions
    seen = (of[:, None] == of) & (at[:, None] >= at)
    if window:
        seen &= at > at[:, None] - window
    scores = torch.einsum("thd,shd->hts", sequences.query.double(), key) * sequences.query.shape[2] ** -0.5
    return torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width", "window"), SHAPES)
def test_result_is_that_of_exact_arithmetic(
    choice: str, dtype: torch.dtype, heads: int, kv_heads: int, width: int, window: int
) -> None:
    sequences = build((100, 1, 33, 64), heads, kv_heads, width, dtype, kernels_for(choice))
    result = sequences.attend(slice(None), window, kernels_for(choice))
    assert result.dtype == dtype
    assert (result.double() - exact(sequences, window)).abs().max() <= ABSOLUTE_ERROR[dtype]


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width", "window"), SHAPES)
def test_token_keeps_its_bits_in_any_chunk_and_batch(
    choice: str, dtype: torch.dtype, heads: int, kv_heads: int, width: int, window: int
) -> None:
    kernels = kernels_for(choice)
    sequences = build((130, 40), heads, kv_heads, width, dtype, kernels)
    together = sequences.attend(slice(None), window, kernels)
    for chunk in (1, 7, 32, 50) if choice == "native" else (7, 50):
        for first in range(0, 170, chunk):
            rows = slice(first, first + chunk)
            assert torch.equal(sequences.attend(rows, window, kernels), together[rows])
    decode = torch.tensor([169, 0, 31, 129, 32, 130, 63])  # one token of each kind of place, sequences mixed
    assert torch.equal(sequences.attend(decode, window, kernels), together[decode])


LONG = (530, 300, 1)
"""Lengths of sequences that span several sections of the kernels."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width", "window"), [(8, 2, 64, 0), (6, 1, 40, 270), (3, 3, 7, 0)])
def test_long_sequence_is_that_of_exact_arithmetic_but_for_rounding_weights_and_result_once(
    dtype: torch.dtype, heads: int, kv_heads: int, width: int, window: int
) -> None:
    sequences = build(LONG, heads, kv_heads, width, dtype, kernels_for("native"))
    result, reference = sequences.attend(slice(None), window, kernels_for("native")).double(), exact(sequences, window)
    half_a_step = torch.finfo(dtype).eps / 2
    of_weights = half_a_step * exact(replace(sequences, value=sequences.value.abs()), window)
    assert ((result - reference).abs() <= 1.01 * (half_a_step * reference.abs() + of_weights) + 4e-6).all()


def test_a_prompt_is_as_near_to_exact_arithmetic_as_that_of_torch() -> None:
    """Which rounds weights to bfloat16, too."""
    sequences = build((1500,), 8, 2, 64, torch.bfloat16, kernels_for("native"))
    reference, group = exact(sequences, 0), 4
    query, key, value = (
        x.transpose(0, 1)[None]
        for x in (sequences.query, *(x.repeat_interleave(group, 1) for x in (sequences.key, sequences.value)))
    )
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)[0].transpose(0, 1)
    ours = sequences.attend(slice(None), 0, kernels_for("native"))
    errors = [(x.double() - reference).square().mean().sqrt() for x in (ours, theirs)]
    assert errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width", "window"), [(8, 2, 64, 0), (6, 1, 40, 270), (3, 3, 7, 0)])
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_token_keeps_its_bits_in_any_batch_of_long_sequences(
    dtype: torch.dtype, heads: int, kv_heads: int, width: int, window: int, data: st.DataObject
) -> None:
    whole = build(LONG, heads, kv_heads, width, dtype, kernels_for("native"))
    together = whole.attend(slice(None), window, kernels_for("native"))
    layout, threads = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    sequences = build(LONG, heads, kv_heads, width, dtype, kernels_for("native"), layout)
    tokens = st.integers(0, sum(LONG) - 1)
    chunk = st.tuples(tokens, st.integers(1, 60)).map(lambda drawn: range(drawn[0], min(sum(drawn), sum(LONG))))
    chunks = data.draw(st.lists(st.one_of(chunk, tokens.map(lambda token: [token])), min_size=1, max_size=8))
    rows = torch.tensor([token for one in chunks for token in one])
    assert torch.equal(sequences.attend(rows, window, kernels_for("native", threads)), together[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_changes_no_bits(dtype: torch.dtype) -> None:
    sequences = build((130, 40), 8, 2, 64, dtype, kernels_for("native"))
    alone = sequences.attend(slice(None), 0, kernels_for("native"))
    assert torch.equal(sequences.attend(slice(None), 0, kernels_for("native", threads=3)), alone)


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_key_and_value_land_in_their_slot_alone(choice: str, dtype: torch.dtype) -> None:
    cache = allocate_kv_cache(KvShape(1, 3, 2, 5, dtype))[0]
    projection = torch.randn(3, 8, 5).to(dtype)
    key, value = projection[:, 2:4], projection[:, 4:6]  # slices of a fused projection
    write_kv(key, value, cache, torch.tensor([70, -1, 31]), kernels=kernels_for(choice))
    assert torch.equal(cache.keys[2, :, :, 6], key[0])
    assert torch.equal(cache.values[2, :, 6], value[0])
    assert torch.equal(cache.keys[0, :, :, 31], key[2])
    assert torch.equal(cache.values[0, :, 31], value[2])
    assert int((cache.keys != 0).sum()) == int((cache.values != 0).sum()) == 20  # the token at -1 is nowhere


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scores_do_not_overflow(choice: str, dtype: torch.dtype) -> None:
    sequences = build((40,), 1, 1, 16, dtype, kernels_for(choice))
    sequences.query.mul_(1000.0)
    result = sequences.attend(slice(None), 0, kernels_for(choice))
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(result.double(), exact(sequences, 0), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("choice", KERNEL_CHOICES)
def test_what_does_not_fit_is_refused(choice: str) -> None:
    kernels = kernels_for(choice)
    sequences = build((4,), 4, 2, 16, torch.float32, kernels)
    with pytest.raises(ValueError, match="query"):
        paged_attention(
            sequences.query[:, :3],
            sequences.cache,
            AttendingRows(sequences.block_tables, sequences.row_sequence, sequences.positions),
            scale=1.0,
            kernels=kernels,
        )
    with pytest.raises(ValueError, match="int32"):
        paged_attention(
            sequences.query,
            sequences.cache,
            AttendingRows(sequences.block_tables, sequences.row_sequence, sequences.positions.long()),
            scale=1.0,
            kernels=kernels,
        )
    with pytest.raises(ValueError, match="slots"):
        write_kv(sequences.key, sequences.value, sequences.cache, torch.zeros(3, dtype=torch.int64), kernels=kernels)
    with pytest.raises(ValueError, match="float16"):
        allocate_kv_cache(KvShape(1, 1, 1, 1, torch.float16))
