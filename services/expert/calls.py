"""Calls that wait on an expert node, and the arithmetic that answers all of one layer's at once. No sockets.

T_n token rows of a call, R routed rows of a call or of all calls of a layer, D model width, S slices an expert; a shard
key is expert * S + slice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.compute.device import Device, Download
from common.compute.gated_ffn import GatedExpert, grouped_gated_ffn
from common.errors import NotReadyError, ProtocolError
from common.messages import Dispatch, Header
from common.topology import ShardId
from common.wire.array import Float32Array, Int32Array, Int64Array, frame_to_array
from common.wire.tensor import frame_to_tensor
from services.expert.shard_store import ShardStore

MAX_INT32 = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Grouping:
    """How the rows of one or several calls stand when sorted by shard."""

    order: Int64Array | None
    """[R]: place in the calls' concatenated rows of each sorted row; None: they stand in order already, as those of a
    single call do."""
    keys: tuple[int, ...]
    """Shard key of each group, ascending."""
    offsets: tuple[int, ...]
    """[groups + 1]: sorted rows [offsets[i], offsets[i+1]) belong to keys[i]."""


def group_rows(routings: Sequence[Int32Array], num_slices: int) -> Grouping:
    """Groups the rows of calls by shard; `routings` are their [3, R_i] arrays (row, expert, slice)."""
    by_call = [
        routing[1] if num_slices == 1 else routing[1].astype(np.int64) * num_slices + routing[2] for routing in routings
    ]
    keys = by_call[0] if len(by_call) == 1 else np.concatenate(by_call)
    steps = keys[1:] - keys[:-1]
    order = None
    if steps.size and steps.min() < 0:
        order = keys.argsort(kind="stable")
        keys = keys[order]
        steps = keys[1:] - keys[:-1]
    starts = [0, *(steps.nonzero()[0] + 1).tolist()] if keys.size else []
    return Grouping(order, tuple(keys[starts].tolist()), (*starts, keys.size))


@dataclass(frozen=True, slots=True, eq=False)
class WaitingCall:
    """A checked Dispatch."""

    identity: bytes
    number: int
    header: Header
    arrived_s: float
    hidden: Tensor
    """[T_n, D]."""
    routing: Int32Array
    """[3, R]: row of `hidden`, expert, slice."""
    weights: Float32Array | None
    """[R] where the answer is one weighted sum per token (combine mode `partial`)."""
    grouping: Grouping
    """Its rows by shard."""


def check_call(
    identity: bytes,
    message: Dispatch,
    header: Header,
    arrived_s: float,
    store: ShardStore,
) -> WaitingCall:
    """Returns a Dispatch as a call that waits. Raises ProtocolError for what does not fit, NotReadyError for a shard
    that is not here."""
    num_slices = store.num_slices
    hidden = frame_to_tensor(message.hidden, store.dtype, (None, store.config.hidden_size), "Dispatch.hidden")
    routing: Int32Array = frame_to_array(message.routing, "int32", (3, None), "Dispatch.routing")
    if routing.size == 0:
        raise ProtocolError("Dispatch.routing has no rows")
    # Seen without their sign, negative numbers are the largest.
    last_row, last_expert, last_slice = routing.view(np.uint32).max(axis=1).tolist()
    if last_row >= hidden.shape[0] or last_expert > MAX_INT32 or last_slice >= num_slices:
        raise ProtocolError(
            f"Dispatch.routing names a row outside [0, {hidden.shape[0]}), a slice outside [0, {num_slices}) or a "
            "negative expert"
        )
    weights: Float32Array | None = None
    if message.weights.shape != (0,):
        weights = frame_to_array(message.weights, "float32", (routing.shape[1],), "Dispatch.weights")
    grouping = group_rows((routing,), num_slices)
    for key in grouping.keys:
        expert, slice_index = divmod(key, num_slices)
        if store.find(ShardId(header.layer, expert, slice_index)) is None:
            raise NotReadyError(f"expert {expert}, slice {slice_index} of layer {header.layer} is not held here")
    return WaitingCall(identity, message.call, header, arrived_s, hidden, routing, weights, grouping)


class CallQueue:
    """First come, first served by layer: the layer of the oldest call goes next, with all calls that wait for it."""

    def __init__(self) -> None:
        self._calls: deque[WaitingCall] = deque()

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: WaitingCall) -> None:
        """Queues a call; bounded by the callers' credits (one call a micro-batch in flight and layer)."""
        self._calls.append(call)

    def cancel(self, identity: bytes, numbers: Collection[int]) -> int:
        """Drops calls that their stage takes back. Returns how many were still here."""
        kept = deque(call for call in self._calls if call.identity != identity or call.number not in numbers)
        num_dropped = len(self._calls) - len(kept)
        self._calls = kept
        return num_dropped

    def pop_layer(self, now_s: float) -> tuple[list[WaitingCall], int]:
        """Returns all calls of the next layer, and how many calls were dropped since they are not wanted any more."""
        live = deque(c for c in self._calls if not c.header.time_left_ms or now_s < _expires_s(c))
        expired = len(self._calls) - len(live)
        if not live:
            self._calls = live
            return [], expired
        layer = live[0].header.layer
        self._calls = deque(call for call in live if call.header.layer != layer)
        return [call for call in live if call.header.layer == layer], expired


def _expires_s(call: WaitingCall) -> float:
    return call.arrived_s + call.header.time_left_ms / 1000


@dataclass(frozen=True, slots=True)
class LayerAnswer:
    """What the device computes for all calls of a layer that waited."""

    calls: list[WaitingCall]
    began_s: float
    download: Download
    order: Tensor | None
    """The place of each computed row among those that were asked for; None: the same."""

    def collect(self) -> list[Tensor]:
        """Returns each call's answer: [R, D] in the order it asked, or float32 [T_n, D] weighted sums where it sent
        weights; they are the host's business, where a sum has one order. Waits for the device."""
        (computed,) = self.download.take()
        rows = computed
        if self.order is not None:
            rows = torch.empty_like(computed)
            rows[self.order] = computed
        answers = [rows] if len(self.calls) == 1 else torch.split(rows, [c.routing.shape[1] for c in self.calls])
        return [
            answer if call.weights is None else _weighted(call, call.weights, answer)
            for call, answer in zip(self.calls, answers, strict=True)
        ]


def begin_answer(calls: list[WaitingCall], store: ShardStore, device: Device, began_s: float) -> LayerAnswer:
    """Begins one grouped FFN over all rows of one layer's calls, on the device that has the shards. Raises
    NotReadyError."""
    layer, num_slices = calls[0].header.layer, store.num_slices
    is_one = len(calls) == 1
    grouping = calls[0].grouping if is_one else group_rows([call.routing for call in calls], num_slices)
    experts = [_held(store, ShardId(layer, *divmod(key, num_slices))) for key in grouping.keys]
    rows = [call.hidden.index_select(0, torch.from_numpy(call.routing[0])) for call in calls]
    x = rows[0] if is_one else torch.cat(rows)
    order = None if grouping.order is None else torch.from_numpy(grouping.order)
    (there,) = device.to_device(x if order is None else x.index_select(0, order))
    download = device.begin_download(grouped_gated_ffn(there, grouping.offsets, experts))
    return LayerAnswer(calls, began_s, download, order)


def _held(store: ShardStore, shard: ShardId) -> GatedExpert:
    expert = store.find(shard)
    if expert is None:
        raise NotReadyError(f"expert {shard.expert} of layer {shard.layer} was let go while a call waited for it")
    return expert


def _weighted(call: WaitingCall, weights: Float32Array, rows: Tensor) -> Tensor:
    weighted = rows.to(torch.float32) * torch.from_numpy(weights)[:, None]
    total = torch.zeros((call.hidden.shape[0], rows.shape[1]), dtype=torch.float32)
    return total.index_add_(0, torch.from_numpy(call.routing[0]), weighted)
