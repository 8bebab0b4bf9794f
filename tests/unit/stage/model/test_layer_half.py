"""The half of a layer in one native call, bit by bit against the parts that it is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from common.checkpoint.rope_config import RopeConfig
from common.compute.expert_choice import ExpertChoice
from common.compute.linear import PackedLinear
from common.compute.native_library import NativeKernels
from common.compute.rms_norm import Norm
from services.stage.model.attention import Attention, AttentionHeads, RotaryTable
from services.stage.model.layer_half.composed import ComposedHalf, Gate
from services.stage.model.layer_half.inputs import LayerHalf, LayerInputs
from services.stage.model.layer_half.native import NativeHalf, layer_half
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.paged_attention import KV_BLOCK_TOKENS, KvShape, LayerKvCache, allocate_kv_cache
from services.stage.model.sharded_linear import NoCollectives, SummedOutput
from tests.support.nodes.kernels import kernels_for, one_torch_thread

__all__ = ["one_torch_thread"]
DTYPES = (torch.float32, torch.bfloat16)
NUM_POSITIONS = 256
BLOCKS_EACH = NUM_POSITIONS // KV_BLOCK_TOKENS
Chunks = tuple[tuple[int, int], ...]
"""Start and number of tokens, by sequence."""


@dataclass(frozen=True)
class Shape:
    """What layers differ in."""

    name: str
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    window: int | None = None
    query_key_norm: bool = True
    bias: bool = False
    num_experts: int = 12
    """0: a dense network follows."""
    normalize: bool = True
    round_weights: bool = True


SHAPES = (
    Shape("usual"),
    Shape("no norm of heads", query_key_norm=False, round_weights=False),
    Shape("window and bias", window=20, bias=True, normalize=False),
    Shape("odd widths", width=52, heads=6, kv_heads=3, head_dim=6, num_experts=7),
    Shape("heads wider than the model", width=32, heads=2, kv_heads=2, head_dim=80),
    Shape("one head for all", heads=5, kv_heads=1, head_dim=24, bias=True),
    Shape("dense", num_experts=0),
    Shape("wide enough for two threads", width=512, heads=8, kv_heads=4, head_dim=64, num_experts=32),
)
BATCHES: tuple[Chunks, ...] = (
    ((0, 1),),
    ((200, 1),),
    ((0, 64),),
    ((31, 3), (70, 1), (0, 33), (150, 1), (64, 2)),
    tuple((start, 1) for start in range(3, 19)),
)


class Weights:
    """Random tensors, each another one."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(7)

    def tensor(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(self._dtype)

    def linear(self, rows: int, columns: int, bias: bool, kernels: NativeKernels | None) -> PackedLinear:
        weight = self.tensor(rows, columns, scale=columns**-0.5)
        return PackedLinear(weight, self.tensor(rows) if bias else None, kernels=kernels)


def parts_of(shape: Shape, dtype: torch.dtype, kernels: NativeKernels | None) -> ComposedHalf:
    weights, rotated = Weights(dtype), shape.heads + shape.kv_heads
    heads = AttentionHeads(
        weights.linear((rotated + shape.kv_heads) * shape.head_dim, shape.width, shape.bias, kernels),
        weights.tensor(rotated, shape.head_dim) if shape.query_key_norm else None,
        shape.heads,
        shape.kv_heads,
        slice(0, shape.kv_heads),
        shape.head_dim,
        1e-6,
        shape.window,
        kernels,
    )
    output = weights.linear(shape.width, shape.heads * shape.head_dim, shape.bias, kernels)
    gate = None
    if shape.num_experts:
        linear = weights.linear(shape.num_experts, shape.width, False, kernels)
        gate = Gate(linear, ExpertChoice(3, shape.normalize, shape.round_weights))
    return ComposedHalf(
        Norm(weights.tensor(shape.width), 1e-5, kernels),
        Attention((heads,), output),
        Norm(weights.tensor(shape.width), 1e-6, kernels),
        gate,
    )


def batch_of(chunks: Chunks) -> MicroBatch:
    """Rows of several sequences, whose blocks were dealt out at random."""
    order = torch.randperm(BLOCKS_EACH * len(chunks), generator=torch.Generator().manual_seed(3))
    tables = order.view(len(chunks), BLOCKS_EACH).to(torch.int32)
    positions = torch.cat([torch.arange(start, start + count) for start, count in chunks])
    sequences = torch.cat([torch.full((count,), row) for row, (_, count) in enumerate(chunks)])
    slots = tables[sequences, positions // KV_BLOCK_TOKENS] * KV_BLOCK_TOKENS + positions % KV_BLOCK_TOKENS
    return MicroBatch(
        hidden=torch.empty(0),
        positions=positions.to(torch.int32),
        row_sequence=sequences.to(torch.int32),
        block_tables=tables,
        slots=slots.to(torch.int64),
        sampling_rows=torch.empty(0, dtype=torch.int64),
        sampling=None,
    )


def table_of(shape: Shape, dtype: torch.dtype) -> RotaryTable:
    return RotaryTable(RopeConfig("default", 1e4), shape.head_dim, NUM_POSITIONS, dtype)


def filled_cache(shape: Shape, num_sequences: int, dtype: torch.dtype) -> LayerKvCache:
    """As if all positions before had been computed. The same each time."""
    kv_shape = KvShape(1, BLOCKS_EACH * num_sequences, shape.kv_heads, shape.head_dim, dtype)
    (cache,) = allocate_kv_cache(kv_shape)
    for tensor in (cache.keys, cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)))
    return cache


@dataclass(frozen=True)
class Outcome:
    """All that a call gives or changes, and what it is not to change."""

    tensors: dict[str, Tensor]

    def differing(self, other: Outcome) -> list[str]:
        assert self.tensors.keys() == other.tensors.keys()
        return [name for name, tensor in self.tensors.items() if not torch.equal(tensor, other.tensors[name])]


def run(half: LayerHalf, shape: Shape, chunks: Chunks, dtype: torch.dtype, *, is_first: bool) -> Outcome:
    """One call, on the same inputs each time."""
    batch, cache = batch_of(chunks), filled_cache(shape, len(chunks), dtype)
    generator = torch.Generator().manual_seed(9)
    size = (batch.positions.shape[0], shape.width)
    x, fed = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    before = x.clone()
    attended = half(x, None if is_first else fed, LayerInputs(batch, table_of(shape, dtype)), cache)
    given = {"residual": attended.residual, "normed": attended.normed, "keys": cache.keys, "values": cache.values}
    if attended.experts is not None and attended.weights is not None:
        given |= {"experts": attended.experts, "weights": attended.weights}
    if is_first:
        assert torch.equal(x, before), "it may be a message's memory"
    return Outcome({name: tensor.clone() for name, tensor in given.items()})


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_one_call_has_the_bits_of_its_parts(shape: Shape, dtype: torch.dtype, threads: int) -> None:
    composed = parts_of(shape, dtype, kernels_for("native"))
    native = layer_half(parts_of(shape, dtype, kernels_for("native", threads)), kernels_for("native", threads))
    assert isinstance(native, NativeHalf)
    for chunks in BATCHES:
        for is_first in (True, False):
            wanted = run(composed, shape, chunks, dtype, is_first=is_first)
            assert run(native, shape, chunks, dtype, is_first=is_first).differing(wanted) == []
            assert ("experts" in wanted.tensors) == (shape.num_experts > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_rows_has_the_bits_of_its_parts(dtype: torch.dtype) -> None:
    shape = SHAPES[0]
    composed = parts_of(shape, dtype, kernels_for("native"))
    native = layer_half(composed, kernels_for("native"))
    for rows in range(1, 65):
        chunks = ((0, rows // 2), (40, rows - rows // 2)) if rows > 1 else ((40, 1),)
        wanted = run(composed, shape, chunks, dtype, is_first=False)
        assert run(native, shape, chunks, dtype, is_first=False).differing(wanted) == []


def test_what_one_call_has_given_stays_as_it_is_in_the_next() -> None:
    """A message may be sent again, or be on its way still, when the next layer is computed."""
    shape, dtype = SHAPES[0], torch.float32
    half = layer_half(parts_of(shape, dtype, kernels_for("native")), kernels_for("native"))
    chunks = BATCHES[3]
    inputs, cache = LayerInputs(batch_of(chunks), table_of(shape, dtype)), filled_cache(shape, len(chunks), dtype)
    x = torch.randn((inputs.batch.positions.shape[0], shape.width), generator=torch.Generator().manual_seed(1))
    first = half(x, None, inputs, cache)
    assert first.experts is not None
    assert first.weights is not None
    sent = (first.normed, first.experts, first.weights)
    kept = [tensor.clone() for tensor in sent]
    half(first.residual, first.normed, inputs, cache)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(sent, kept, strict=True))


def test_layers_stay_composed_without_kernels_and_where_they_are_cut() -> None:
    kernels = kernels_for("native")
    by_torch = parts_of(SHAPES[0], torch.float32, None)
    assert layer_half(by_torch, None) is by_torch
    whole = parts_of(SHAPES[0], torch.float32, kernels)
    (heads,) = whole.attention.parts
    assert isinstance(whole.attention.output, PackedLinear)
    summed = Attention((heads,), SummedOutput(whole.attention.output, NoCollectives()))
    for attention in (summed, Attention((heads, heads), whole.attention.output)):
        cut = replace(whole, attention=attention)
        assert layer_half(cut, kernels) is cut


def test_what_does_not_fit_is_refused() -> None:
    shape, dtype, kernels = SHAPES[0], torch.float32, kernels_for("native")
    parts = parts_of(shape, dtype, kernels)
    half = layer_half(parts, kernels)
    batch, cache = batch_of(BATCHES[0]), filled_cache(shape, 1, dtype)
    x = torch.zeros((1, shape.width))
    inputs = LayerInputs(batch, table_of(shape, dtype))
    with pytest.raises(ValueError, match=r"\(2, 64\)"):
        half(torch.zeros((2, shape.width)), None, inputs, cache)
    with pytest.raises(ValueError, match="bfloat16"):
        half(x, x.to(torch.bfloat16), inputs, cache)
    with pytest.raises(ValueError, match="a cache of"):
        half(x, None, inputs, filled_cache(replace(shape, kv_heads=4), 1, dtype))
    too_far = replace(batch, positions=torch.tensor([NUM_POSITIONS], dtype=torch.int32))
    with pytest.raises(IndexError, match="positions 256 to 256"):
        half(x, None, LayerInputs(too_far, table_of(shape, dtype)), cache)
    with pytest.raises(ValueError, match="int32"):
        half(x, None, LayerInputs(replace(batch, positions=batch.positions.long()), table_of(shape, dtype)), cache)
    with pytest.raises(ValueError, match="do not fit 1 tokens"):
        half(x, None, LayerInputs(replace(batch, slots=torch.zeros(2, dtype=torch.int64)), inputs.rotary), cache)
    with pytest.raises(ValueError, match="a norm of"):
        layer_half(replace(parts, input_norm=replace(parts.input_norm, weight=torch.zeros(5))), kernels)
