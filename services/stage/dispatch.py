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

from common.array import Int32Array, Int64Array
from services.stage.model.decoder import ExpertCall
from services.stage.replica_selection import choose_copies


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


def split_pairs(
    call: ExpertCall,
    pairs: Int64Array | None,
    num_slices: int,
    holders: Sequence[Sequence[int]],
    outstanding_rows: Mapping[int, int],
) -> list[NodeRows]:
    """Deal a call's pairs (None: all) out to nodes. Raises NodeLostError if a shard has no usable copy."""
    experts = call.experts.numpy().reshape(-1)
    num_choices = call.experts.shape[1]
    if pairs is None:
        pairs = np.arange(experts.size * num_slices)
    keys = experts[pairs // num_slices] * num_slices + pairs % num_slices
    order = np.argsort(keys, kind="stable")
    pairs, keys = pairs[order], keys[order]
    shards, counts = _runs(keys)
    chosen = choose_copies(dict(zip(shards, counts, strict=True)), holders, outstanding_rows)
    nodes = np.repeat(np.array([chosen[shard] for shard in shards]), counts)
    return [
        _node_rows(node, pairs[mask], keys[mask], num_choices * num_slices, num_slices)
        for node in sorted(set(chosen.values()))
        for mask in (nodes == node,)
    ]


def _runs(keys: Int64Array) -> tuple[list[int], list[int]]:
    """Distinct values of a sorted array, and how often each occurs."""
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    counts = np.diff(np.append(starts, keys.size))
    return keys[starts].tolist(), counts.tolist()


def _node_rows(node: int, pairs: Int64Array, keys: Int64Array, pairs_per_token: int, num_slices: int) -> NodeRows:
    tokens, rows = np.unique(pairs // pairs_per_token, return_inverse=True)
    routing = np.empty((3, pairs.size), dtype=np.int32)
    routing[0], routing[1], routing[2] = rows, keys // num_slices, keys % num_slices
    return NodeRows(node, pairs, tokens, routing)


class ExactSum:
    """Combine mode `exact`: every pair's row is kept apart until all are there, then weighed and added in one order.

    The order is that of the gate's ranking, in float32, so the sum depends neither on who answered nor on when.
    """

    def __init__(self, call: ExpertCall, num_slices: int) -> None:
        num_tokens, num_choices = call.experts.shape
        self._call = call
        self._rows = torch.empty((num_tokens * num_choices * num_slices, call.hidden.shape[1]), dtype=call.hidden.dtype)
        self._shape = (num_tokens, num_choices, num_slices, call.hidden.shape[1])

    def add(self, part: NodeRows, rows: Tensor) -> None:
        """Take in a node's rows [R, D], in the order of its pairs."""
        self._rows[torch.from_numpy(part.pairs)] = rows

    def total(self) -> Tensor:
        """[T, D] in the model's dtype."""
        rows = self._rows.view(self._shape)
        weights = self._call.weights
        total = None
        for choice in range(self._shape[1]):
            expert = rows[:, choice, 0].to(torch.float32)
            for slice_index in range(1, self._shape[2]):
                expert = expert + rows[:, choice, slice_index].to(torch.float32)
            weighted = expert * weights[:, choice, None]
            total = weighted if total is None else total + weighted
        assert total is not None
        return total.to(self._call.hidden.dtype)


class PartialSum:
    """Combine mode `partial`: nodes weigh and add what they hold; fewer bytes, sums depend on who held what."""

    def __init__(self, call: ExpertCall) -> None:
        self._dtype = call.hidden.dtype
        self._sum = torch.zeros(call.hidden.shape, dtype=torch.float32)
        self._parts: list[tuple[NodeRows, Tensor]] = []

    def add(self, part: NodeRows, rows: Tensor) -> None:
        """Take in a node's weighted sums [T_n, D] float32."""
        self._parts.append((part, rows))

    def total(self) -> Tensor:
        """[T, D] in the model's dtype; nodes are added in order of their number."""
        for part, rows in sorted(self._parts, key=lambda entry: (entry[0].node, int(entry[0].pairs[0]))):
            self._sum[torch.from_numpy(part.tokens)] += rows
        return self._sum.to(self._dtype)


def pair_weights(call: ExpertCall, part: NodeRows, num_slices: int) -> npt.NDArray[Any]:
    """float32 [R]: gate weight of each of a node's pairs."""
    weights: npt.NDArray[Any] = call.weights.numpy().reshape(-1)[part.pairs // num_slices]
    return weights
