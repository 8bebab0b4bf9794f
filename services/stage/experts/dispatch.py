"""One expert call as rows by node, and the sum of what comes back. Pure: numpy and torch, no sockets.

T tokens, K experts a token, S slices of an expert, D model width. A *pair* is (token, k, slice), numbered
(t * K + k) * S + s; a *shard key* is expert * S + slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.compute.native_library import NativeKernels
from common.wire.array import BoolArray, Int32Array, Int64Array
from services.stage.model.decoder import ExpertCall


@dataclass(frozen=True, slots=True)
class NodeRows:
    """What one node is asked within a call."""

    node: int
    pairs: Int64Array
    """[R] pair numbers, sorted by shard key."""
    tokens: Int64Array
    """[T_n] rows of the call's hidden states that the node needs, ascending, each once."""
    routing: Int32Array
    """[3, R]: row of `tokens`, expert, slice."""


def shard_keys(call: ExpertCall, pairs: Int64Array, num_slices: int) -> Int64Array:
    """Returns the shard key of each pair."""
    experts: Int64Array = call.experts.numpy().reshape(-1)
    if num_slices == 1:
        return experts[pairs]
    return experts[pairs // num_slices] * num_slices + pairs % num_slices


def split_pairs(
    call: ExpertCall,
    pairs: Int64Array,
    num_slices: int,
    holders: Sequence[Sequence[int]],
    outstanding_rows: Mapping[int, int],
) -> list[NodeRows]:
    """Deals pairs of a call out to nodes, without those whose shard has no usable copy.

    `holders` and `outstanding_rows`: see `choose_copies`.
    """
    keys = shard_keys(call, pairs, num_slices)
    counts = np.bincount(keys).tolist()
    chosen = choose_copies(
        {key: rows for key, rows in enumerate(counts) if rows and holders[key]}, holders, outstanding_rows
    )
    nodes = set(chosen.values())
    order = np.argsort(keys, kind="stable")
    pairs, keys = pairs[order], keys[order]
    if len(nodes) == 1 and sum(counts[key] for key in chosen) == pairs.size:
        return [_node_rows(nodes.pop(), pairs, keys, call.experts.shape, num_slices)]
    node_of = np.full(len(holders), -1)
    node_of[list(chosen)] = list(chosen.values())
    by_node = node_of[keys]
    return [
        _node_rows(node, pairs[mask], keys[mask], call.experts.shape, num_slices)
        for node in sorted(nodes)
        for mask in (by_node == node,)
    ]


def _node_rows(node: int, pairs: Int64Array, keys: Int64Array, shape: Sequence[int], num_slices: int) -> NodeRows:
    num_tokens, num_choices = shape
    rows = pairs // (num_choices * num_slices)
    is_needed = np.zeros(num_tokens, dtype=np.bool_)
    is_needed[rows] = True
    tokens = is_needed.nonzero()[0]
    routing = np.zeros((3, pairs.size), dtype=np.int32)
    # The place of a token among those that are needed: where all are, its own number.
    routing[0] = rows if tokens.size == num_tokens else (is_needed.cumsum() - 1)[rows]
    if num_slices == 1:
        routing[1] = keys
    else:
        routing[1], routing[2] = keys // num_slices, keys % num_slices
    return NodeRows(node, pairs, tokens, routing)


def sum_experts(kernels: NativeKernels, rows: Tensor, weights: Tensor, num_slices: int) -> Tensor:
    """Returns [T, D]: what `ExactSum` gives, to the last bit, of rows [T * K * S, D] and weights float32 [T, K], all
    dense, in float32 or bfloat16."""
    num_tokens, num_choices = weights.shape
    total = rows.new_empty((num_tokens, rows.shape[1]))
    kernels.sum_experts(
        rows.data_ptr(),
        weights.data_ptr(),
        num_tokens,
        num_choices,
        num_slices,
        rows.shape[1],
        int(rows.dtype == torch.bfloat16),
        total.data_ptr(),
    )
    return total


class ExactSum:
    """Combine mode `exact`: every pair's row is kept apart until all are there, then weighed and added in one order.

    The order is that of the gate's ranking, in float32, so the sum depends neither on which node answered nor on when.
    """

    takes_some_pairs = True
    """A part of a node's rows may be used, where another node's answer gave the rest."""

    def __init__(self, call: ExpertCall, num_slices: int, kernels: NativeKernels | None = None) -> None:
        """`kernels`: None adds with torch, to the same bits."""
        num_tokens, num_choices = call.experts.shape
        self._call = call
        self._kernels = kernels if call.hidden.dtype in (torch.float32, torch.bfloat16) else None
        self._rows = torch.empty((num_tokens * num_choices * num_slices, call.hidden.shape[1]), dtype=call.hidden.dtype)
        self._bits = _bits(self._rows)
        self._shape = (num_tokens, num_choices, num_slices, call.hidden.shape[1])
        self._left_out: Tensor | None = None

    def add(self, part: NodeRows, rows: Tensor, fresh: BoolArray | None = None) -> None:
        """Takes in a node's rows [R, D], in the order of its pairs; with `fresh` [R] only those that are set."""
        if fresh is None or fresh.all():
            self._bits[part.pairs] = _bits(rows)
        else:
            self._bits[part.pairs[fresh]] = _bits(rows)[fresh]

    def leave_out(self, pairs: Int64Array) -> Int64Array:
        """Does without these pairs. A slice alone is worth nothing: its whole expert is left out for that token.

        Returns all pairs [R'] that are not needed any more, ascending.
        """
        num_tokens, num_choices, num_slices, _ = self._shape
        if self._left_out is None:
            self._left_out = torch.zeros((num_tokens, num_choices), dtype=torch.bool)
        choices = np.unique(pairs // num_slices)
        self._left_out.view(-1)[torch.from_numpy(choices)] = True
        gone: Int64Array = (choices[:, None] * num_slices + np.arange(num_slices)).reshape(-1)
        self._rows[torch.from_numpy(gone)] = 0.0
        return gone

    def total(self) -> Tensor:
        """Returns [T, D] in the model's dtype."""
        rows = self._rows.view(self._shape)
        weights = self._call.weights if self._left_out is None else _renormalised(self._call.weights, self._left_out)
        if self._kernels is not None:
            return sum_experts(self._kernels, self._rows, weights.contiguous(), self._shape[2])
        total = None
        for choice in range(self._shape[1]):
            expert = rows[:, choice, 0].to(torch.float32)
            for slice_index in range(1, self._shape[2]):
                expert = expert + rows[:, choice, slice_index].to(torch.float32)
            weighted = expert * weights[:, choice, None]
            total = weighted if total is None else total + weighted
        assert total is not None
        return total.to(self._call.hidden.dtype)


def _bits(rows: Tensor) -> npt.NDArray[Any]:
    """Returns an array over the same memory: numpy, which has no bfloat16, moves rows in a tenth of torch's time."""
    return rows.view(torch.int16 if rows.itemsize == 2 else torch.int32).numpy()


def _renormalised(weights: Tensor, left_out: Tensor) -> Tensor:
    """Returns float32 [T, K]: what is left of each token's weights, scaled so that their sum is what it was.

    A token with no expert left gets zero; its residual goes on alone.
    """
    kept = weights.masked_fill(left_out, 0.0)
    remaining = kept.sum(dim=1, keepdim=True)
    scale = torch.where(remaining > 0, weights.sum(dim=1, keepdim=True) / remaining.clamp_min(1e-30), 0.0)
    # Tokens that lack nothing keep their weights to the last bit.
    return torch.where(left_out.any(dim=1, keepdim=True), kept * scale, weights)


class PartialSum:
    """Combine mode `partial`: nodes weigh and add what they hold; fewer bytes, and sums depend on the holders."""

    takes_some_pairs = False
    """A node's answer is one sum: it is used as a whole or not at all."""

    def __init__(self, call: ExpertCall) -> None:
        self._dtype = call.hidden.dtype
        self._sum = torch.zeros(call.hidden.shape, dtype=torch.float32)
        self._parts: list[tuple[NodeRows, Tensor]] = []

    def add(self, part: NodeRows, rows: Tensor, fresh: BoolArray | None = None) -> None:
        """Takes in a node's weighted sums [T_n, D] float32; all of its pairs must be new."""
        assert fresh is None or fresh.all()
        self._parts.append((part, rows))

    def total(self) -> Tensor:
        """Returns [T, D] in the model's dtype; nodes are added in order of their number."""
        for part, rows in sorted(self._parts, key=lambda entry: (entry[0].node, int(entry[0].pairs[0]))):
            self._sum[torch.from_numpy(part.tokens)] += rows
        return self._sum.to(self._dtype)


def pair_weights(call: ExpertCall, part: NodeRows, num_slices: int) -> npt.NDArray[Any]:
    """Returns float32 [R]: the gate weight of each of a node's pairs."""
    weights: npt.NDArray[Any] = call.weights.numpy().reshape(-1)[part.pairs // num_slices]
    return weights


WEIGHT_READ_ROWS = 8
"""Reading a shard's weights takes about as long as computing this many rows with them (measured on a CPU)."""


def choose_copies(
    rows_by_shard: Mapping[int, int], holders: Sequence[Sequence[int]], outstanding_rows: Mapping[int, int]
) -> dict[int, int]:
    """Returns which copy answers, shard key -> node, for every shard with rows.

    The call's shards are dealt greedily, busiest first, to the copy with the least work, counting what is outstanding
    there already: two nodes with full copies share a token's experts equally, and a node that lags gets less. A shard's
    rows of one call stay together, since a second node that reads the same weights doubles the memory traffic.

    `holders[key]` are the usable nodes with a copy, first choice first; `outstanding_rows` what each node still owes.
    """
    if all(len(holders[key]) == 1 for key in rows_by_shard):
        return {key: holders[key][0] for key in rows_by_shard}
    load = {node: outstanding_rows.get(node, 0) for key in rows_by_shard for node in holders[key]}
    chosen: dict[int, int] = {}
    for key in sorted(rows_by_shard, key=lambda key: (-rows_by_shard[key], key)):
        copies = holders[key]
        node = copies[0] if len(copies) == 1 else min(copies, key=lambda node: load[node])
        load[node] += rows_by_shard[key] + WEIGHT_READ_ROWS
        chosen[key] = node
    return chosen
