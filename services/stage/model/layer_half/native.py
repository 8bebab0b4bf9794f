"""The half of a layer in one call of a native kernel: on the host, where no part of it is cut over ranks.

The kernel (common/compute/native/layer_half.h) calls those of the parts one after another, and has their bits. What is
saved is what lies between them, some 15 calls of torch and their tensors.

T tokens, D model width, K experts a token, H query heads, Hkv key/value heads, N head width.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from common.compute.expert_choice import ChoiceDescriptor
from common.compute.linear import PackedLinear
from common.compute.native_library import NativeKernels
from common.compute.rms_norm import Norm
from services.stage.model.attention import AttentionHeads
from services.stage.model.layer_half.composed import ComposedHalf
from services.stage.model.layer_half.inputs import Attended, LayerHalf, LayerInputs
from services.stage.model.paged_attention import LayerKvCache


class _LayerDescriptor(ctypes.Structure):
    """`struct LayerHalf` of common/compute/native/layer_half.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("input_norm", "post_attention_norm", "query_key_norm", "qkv", "output", "gate")
        ),
        ("choice", ChoiceDescriptor),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_width", "window", "threads", "is_bf16")),
        *(
            (name, ctypes.c_double)
            for name in ("scale", "input_epsilon", "query_key_epsilon", "post_attention_epsilon")
        ),
    )


class NativeHalf:
    """A `LayerHalf` of the same parts as a composed one, whose tensors it keeps."""

    def __init__(
        self, parts: ComposedHalf, heads: AttentionHeads, output: PackedLinear, kernels: NativeKernels
    ) -> None:
        """`heads` and `output`: the only ones that there are in `parts`. Raises ValueError when parts do not fit."""
        _check(parts, heads, output)
        self._parts = parts
        self._width = output.out_features
        self._dtype = output.dtype
        self._cache_shape = (heads.num_kv_heads, heads.head_dim)
        self._num_experts_per_token = 0 if parts.gate is None else parts.gate.choice.num_experts_per_token
        self._descriptor = _describe(parts, heads, output, kernels)
        self.address = ctypes.addressof(self._descriptor)
        self._function = kernels.layer_half

    @property
    def input_norm(self) -> Norm:
        return self._parts.input_norm

    def __call__(self, x: Tensor, fed: Tensor | None, inputs: LayerInputs, cache: LayerKvCache) -> Attended:
        """Raises ValueError when shapes or dtypes do not fit."""
        batch = inputs.descriptor
        x = self._checked(x, batch.tokens)
        fed = None if fed is None else self._checked(fed, batch.tokens)
        keys, values = cache.keys, cache.values
        self.check_cache(cache)
        cos = inputs.rotary.cos
        if cos.dtype != self._dtype or cos.shape[1] > self._cache_shape[1]:
            raise ValueError(
                f"a rotary table of {cos.shape[1]} {cos.dtype} does not fit heads of {self._cache_shape[1]}"
            )
        residual = torch.empty_like(x) if fed is None else x
        normed = torch.empty_like(x)
        experts = weights = None
        if self._num_experts_per_token:
            # New ones for each call: a message that nobody waits for any more may still be on its way.
            experts = torch.empty(batch.tokens, self._num_experts_per_token, dtype=torch.int64)
            weights = torch.empty(batch.tokens, self._num_experts_per_token, dtype=torch.float32)
        self._function(
            self.address,
            ctypes.addressof(batch),
            keys.data_ptr(),
            values.data_ptr(),
            cache.heads_between_blocks,
            x.data_ptr(),
            None if fed is None else fed.data_ptr(),
            residual.data_ptr(),
            normed.data_ptr(),
            None if experts is None else experts.data_ptr(),
            None if weights is None else weights.data_ptr(),
        )
        return Attended(residual, normed, experts, weights)

    def check_cache(self, cache: LayerKvCache) -> None:
        """Raises ValueError when it is not of this layer's shape."""
        keys, values = cache.keys, cache.values
        if keys.shape[1:3] != self._cache_shape or keys.dtype != self._dtype or values.dtype != self._dtype:
            raise ValueError(f"a cache of {self._cache_shape} {self._dtype} is not {tuple(keys.shape)} {keys.dtype}")
        if values.stride(0) != keys.stride(0) or values.shape[1] != keys.shape[1]:
            raise ValueError(f"keys {tuple(keys.shape)} and values {tuple(values.shape)} are not of one cache")

    def _checked(self, x: Tensor, num_tokens: int) -> Tensor:
        if x.shape != (num_tokens, self._width) or x.dtype != self._dtype:
            raise ValueError(
                f"{tuple(x.shape)} {x.dtype} does not fit [{num_tokens}, {self._width}] {self._dtype} of a layer"
            )
        return x.contiguous()


def layer_half(parts: ComposedHalf, kernels: NativeKernels | None) -> LayerHalf:
    """Returns these parts as one call, or as they are where there are no kernels, or where they are cut."""
    output = parts.attention.output
    if kernels is None or len(parts.attention.parts) > 1 or not isinstance(output, PackedLinear):
        return parts
    (heads,) = parts.attention.parts
    return parts if output.kernels is None else NativeHalf(parts, heads, output, kernels)


def _check(parts: ComposedHalf, heads: AttentionHeads, output: PackedLinear) -> None:
    width, dtype = output.out_features, output.dtype
    qkv_shape = (heads.head_dim * (heads.num_heads + 2 * heads.num_kv_heads), width)
    linears = [(heads.qkv, qkv_shape), (output, (width, heads.num_heads * heads.head_dim))]
    if parts.gate is not None:
        linears.append((parts.gate.linear, (parts.gate.linear.out_features, width)))
    norms: list[tuple[Tensor, tuple[int, ...]]] = [
        (norm.weight, (width,)) for norm in (parts.input_norm, parts.post_attention_norm)
    ]
    if heads.query_key_norm is not None:
        norms.append((heads.query_key_norm, (heads.num_heads + heads.num_kv_heads, heads.head_dim)))
    for linear, shape in linears:
        if (linear.out_features, linear.in_features) != shape or linear.dtype != dtype:
            raise ValueError(f"a linear of {linear.out_features} x {linear.in_features} is not one of {shape} {dtype}")
    for weight, wanted in norms:
        if weight.shape != wanted or weight.dtype != dtype or not weight.is_contiguous():
            raise ValueError(f"a norm of {tuple(weight.shape)} {weight.dtype} is not one of {wanted} {dtype}")
    if heads.num_heads % heads.num_kv_heads or heads.head_dim % 2:
        raise ValueError(f"{heads.num_heads} heads of {heads.head_dim} do not share {heads.num_kv_heads} KV heads")


def _describe(
    parts: ComposedHalf, heads: AttentionHeads, output: PackedLinear, kernels: NativeKernels
) -> _LayerDescriptor:
    gate = parts.gate
    return _LayerDescriptor(
        parts.input_norm.weight.data_ptr(),
        parts.post_attention_norm.weight.data_ptr(),
        None if heads.query_key_norm is None else heads.query_key_norm.data_ptr(),
        heads.qkv.descriptor_address,
        output.descriptor_address,
        None if gate is None else gate.linear.descriptor_address,
        ChoiceDescriptor() if gate is None else gate.choice.descriptor(gate.linear.out_features),
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        heads.sliding_window or 0,
        kernels.threads,
        int(output.dtype == torch.bfloat16),
        heads.head_dim**-0.5,
        parts.input_norm.epsilon,
        heads.rms_norm_eps,
        parts.post_attention_norm.epsilon,
    )
