"""Calls that go from native code to native code, through rings and links (`peers.py`).

A call goes this way as a whole or not at all. It does where nothing is out of the ordinary: every node of the placement
is connected, has a ring or a link and has proven itself, none is in doubt, and all give the same bits. Else, and from
the moment at which such a call is late, refused or has lost a node, it is the business of `client.py`. A call with more
rows than a slot has goes in pieces of a slot each, one after another; what of it has not been asked yet when it becomes
the business of `client.py` is asked there.

T tokens, K experts a token, S slices of an expert, D model width; P = T * K * S pairs, numbered as in `dispatch.py`.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import numpy as np
import structlog
import torch
import zmq
from torch import Tensor

from common.compute.native_library import NativeKernels
from common.messages import Header
from common.wire.array import Int64Array
from common.wire.call_ring import Outcome, RingShape, ring_shape
from common.wire.zmq_functions import ZmqFunctions
from services.stage.experts.dispatch import NodeRows, sum_experts
from services.stage.experts.nodes import ExpertNode, ExpertNodes
from services.stage.experts.peers import CallPeers, LinkMaker, Peer, PeerEntry, has_free_slot
from services.stage.model.decoder import ExpertCall
from services.stage.model.layer_half.run import RunLayers

FULL_S = 2.0
"""How long a node may have no free slot before it is given a new ring."""
_WAITING, _TAKEN_IN = 0, 1
"""States of a part; mirror native/call_client.h."""
_NO_SLOT = -1
"""Of a part that is not asked yet; mirrors native/call_client.h."""


class _Question(ctypes.Structure):
    """Mirrors `ExpertQuestion` in native/call_client.h."""

    _fields_ = [
        ("hidden", ctypes.c_void_p),
        ("experts", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("tokens", "choices", "slices", "layer", "deadline_ns", "first_number")),
        ("holders", ctypes.c_void_p),
        ("shards", ctypes.c_int64),
        ("copies", ctypes.c_int64),
    ]


class _Part(ctypes.Structure):
    """Mirrors `AskedPart` in native/call_client.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("peer", "slot", "number", "first", "pairs", "state")]


class _Holders(ctypes.Structure):
    """Mirrors `Holders` in native/layer_run.h."""

    _fields_ = [("table", ctypes.c_void_p), ("shards", ctypes.c_int64), ("copies", ctypes.c_int64)]


class _RunSteps(ctypes.Structure):
    """Mirrors `RunSteps` in native/layer_run.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("holders", "normed", "experts", "weights", "answer", "asked_weights")),
        *((name, ctypes.c_int64) for name in ("parts", "began_ns", "soon_ns", "until_ns")),
        *((name, ctypes.c_void_p) for name in ("call_ns", "call_parts", "heard")),
        ("busy_ns", ctypes.c_int64),
    ]


class RunEnd(IntEnum):
    """Why a run has ended; mirrors native/layer_run.h."""

    ANSWERED_LAST = 0
    """The call of the layer that it has come to is answered."""
    NOT_YET_ANSWERED = 1
    """That call is still to be answered, or refused in part."""
    NOT_ASKED = 2
    """That call could not go through rings."""


@dataclass(frozen=True, slots=True)
class PassedCall:
    """A call of a run that is answered."""

    layer: int
    seconds: float
    num_parts: int


@dataclass(frozen=True, slots=True)
class RanOn:
    """How far a forward pass has come, and what it met."""

    end: RunEnd
    passed: list[PassedCall]
    nodes: list[ExpertNode]
    """Those that have answered."""
    busy_seconds: float
    """How long it has computed."""


@dataclass(slots=True)
class _Peers:
    """All nodes of a placement, as long as nothing changes about them."""

    nodes: list[ExpertNode]
    peers: list[Peer]
    """Kept, so that what native code looks into is there."""
    shape: RingShape
    table: ctypes.Array[PeerEntry]
    holders: dict[int, Int64Array | None] = field(default_factory=dict)
    """Layer -> int32 [shards, C]: places in `nodes` by shard key and place in the list of copies; None: a shard has no
    copy."""
    run_holders: tuple[tuple[int, ...], ctypes.Array[_Holders]] | None = None
    """The same of each layer of a run, and which they are. The run itself would keep the memory of its caches."""


@dataclass(frozen=True, slots=True)
class RingPart:
    """What one node was asked in one piece, and what has become of it."""

    index: int
    rows: NodeRows
    outcome: Outcome | None
    """None: it has not answered yet."""


@dataclass(slots=True, eq=False)
class RingCall:
    """One expert call that goes through rings."""

    number: int
    call: ExpertCall
    header: Header
    deadline_s: float
    started_s: float
    asked_s: float
    """When its last piece so far was asked for: a call of many pieces is not late while they come."""
    num_slices: int
    rows: Tensor
    """[P, D]: what has come, each row at its pair's place."""
    pairs: Tensor
    """int64 [P]: the pairs, part by part."""
    num_waiting: int
    answer: Tensor | None
    """[T, D]; None: it is not whole, or not added up."""
    _question: _Question
    _peers: _Peers
    _parts: ctypes.Array[_Part]
    _num_parts: int
    """Those that have been asked come first."""

    @property
    def is_given(self) -> bool:
        """Returns whether all of it has come."""
        return not self.num_waiting and all(part.state == _TAKEN_IN for part in self._parts[: self._num_parts])

    @property
    def nodes(self) -> list[ExpertNode]:
        """Returns those that are asked, each once."""
        return [self._peers.nodes[peer] for peer in sorted({part.peer for part in self._parts[: self._num_parts]})]

    @property
    def num_unasked(self) -> int:
        """Returns how many parts had no slot yet."""
        parts = self._parts[: self._num_parts]
        return sum(part.slot == _NO_SLOT for part in parts) if parts and parts[-1].slot == _NO_SLOT else 0

    def ask_no_more(self) -> None:
        """Leaves what has not been asked yet to others."""
        self._num_parts -= self.num_unasked

    def parts(self) -> list[RingPart]:
        """Returns what each node is asked, piece by piece."""
        found = []
        pairs_per_token = self.call.experts.shape[1] * self.num_slices
        experts: Int64Array = self.call.experts.numpy().reshape(-1)
        for index, part in enumerate(self._parts[: self._num_parts]):
            pairs: Int64Array = self.pairs[part.first : part.first + part.pairs].numpy()
            tokens, row = np.unique(pairs // pairs_per_token, return_inverse=True)
            routing = np.stack((row, experts[pairs // self.num_slices], pairs % self.num_slices)).astype(np.int32)
            rows = NodeRows(self._peers.nodes[part.peer].number, pairs, tokens, routing)
            found.append(RingPart(index, rows, self.outcome(index)))
        return found

    def outcome(self, index: int) -> Outcome | None:
        """Returns what has become of one part; None: nothing yet."""
        state = self._parts[index].state
        return None if state == _WAITING else Outcome.GIVEN if state == _TAKEN_IN else Outcome(-state)


class Rings:
    """See the module. Times are those of `time.monotonic`, which processes of one host share."""

    def __init__(
        self,
        nodes: ExpertNodes,
        folder: Path | None,
        functions: ZmqFunctions | None,
        kernels: NativeKernels,
        width: int,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        """`folder`: where nodes of this host listen; None: there are no rings. `functions`: None: there are no links.
        `width`: of the model. Raises OSError."""
        links = None if functions is None else LinkMaker(functions, kernels.link_seal)
        self.peers = CallPeers(nodes, folder, links, log)
        self._nodes = nodes
        self._kernels = kernels
        self._width = width
        self._peers: _Peers | None = None
        self._peers_of = (-1, -1)
        """The changes of nodes and of their peers that `_peers` has seen."""
        self._full_s: tuple[float, float] | None = None
        """When a node had no free slot: for the first time, and for the last; None: all had one since."""
        self._last_number = 0
        self.bytes_sent = 0
        """Over links."""

    @property
    def bell(self) -> int:
        """Returns what rings when a node has answered in a ring; to be waited for."""
        return self.peers.bell

    def poll_sockets(self) -> list[zmq.Socket[bytes]]:
        """Returns what else is to be waited for."""
        return self.peers.poll_sockets()

    def look(self, now_s: float) -> set[int]:
        """Looks after rings and links. Returns the nodes of which one was given up: nothing will come through it."""
        return self.peers.look(now_s)

    def hear(self) -> int:
        """Takes in what has come, to where `take_in` finds it: nothing of it wakes anybody again. Returns how much came
        over links since the last time that nobody waited for, or that made no sense."""
        self.peers.silence()
        num_dropped = 0
        for link in self.peers.all_links:
            entry = link.entry()
            self._kernels.receive_answers(ctypes.addressof(entry), ctypes.addressof(self.peers.shape))
            num_dropped += link.state.dropped
            self.bytes_sent += link.state.sent_bytes
            link.state.dropped = link.state.sent_bytes = 0
        return num_dropped

    def close(self) -> None:
        """Gives all of them up."""
        self.peers.close()

    # ---- calls

    def ask(self, number: int, call: ExpertCall, header: Header, now_s: float, deadline_s: float) -> RingCall | None:
        """Asks for a whole call; None where it cannot go this way, and then nobody was asked."""
        slices = self._nodes.num_slices
        self._expect(call.hidden.dtype, call.experts.shape[1] * slices)
        peers = self._peers_now()
        if peers is None:
            return None
        holders = self._holders(peers, call.layer)
        if holders is None:
            return None
        num_pairs = call.experts.numel() * slices
        pairs = torch.empty(num_pairs, dtype=torch.int64)
        parts = (_Part * (-(-call.hidden.shape[0] // self.peers.shape.max_rows) * len(peers.nodes)))()
        question = _Question(
            call.hidden.data_ptr(),
            call.experts.data_ptr(),
            *call.experts.shape,
            slices,
            call.layer,
            time.monotonic_ns() + int((deadline_s - now_s) * 1e9),
            self._first_number(len(parts)),
            holders.ctypes.data,
            *holders.shape,
        )
        num_parts = self._kernels.ask_experts(
            ctypes.addressof(question),
            ctypes.addressof(peers.table),
            len(peers.nodes),
            ctypes.addressof(self.peers.shape),
            pairs.data_ptr(),
            ctypes.addressof(parts),
        )
        if num_parts < 0:
            self._note_full(now_s)
        if num_parts <= 0:
            return None
        if self._full_s is not None and all(has_free_slot(peer, peers.shape) for peer in peers.peers):
            self._full_s = None
        rows = torch.empty((num_pairs, call.hidden.shape[1]), dtype=call.hidden.dtype)
        return RingCall(
            number,
            call,
            header,
            deadline_s,
            now_s,
            now_s,
            slices,
            rows,
            pairs,
            num_parts,
            None,
            question,
            peers,
            parts,
            num_parts,
        )

    def _first_number(self, count: int) -> int:
        """Returns the first of so many numbers that are used for nothing else."""
        first, self._last_number = self._last_number + 1, self._last_number + count
        return first

    def _note_full(self, now_s: float) -> None:
        """Slots do not stay taken for long, unless their states were changed by something else, or a node hangs: a new
        ring is free."""
        since_s, last_s = self._full_s or (now_s, now_s)
        self._full_s = (since_s if now_s - last_s < FULL_S / 4 else now_s), now_s
        if now_s - self._full_s[0] < FULL_S:
            return
        self._full_s = None
        self.peers.give_up_full(now_s, f"no slot was free for {FULL_S:.0f} s")

    def take_in(self, asked: RingCall, timeout_s: float = 0.0) -> bool:
        """Takes in what has come, asks for what had no slot yet, and waits for the rest for a while. Returns whether
        nothing is to come any more."""
        num_unasked, now_s = asked.num_unasked, time.monotonic()
        # A ring that was given up has no bell any more: the descriptor may be something else's.
        num_held_back = 0 if all(peer.is_open for peer in asked._peers.peers) else num_unasked
        num_waiting = self._kernels.await_answers(
            ctypes.addressof(asked._question),
            ctypes.addressof(asked._parts),
            asked._num_parts - num_held_back,
            ctypes.addressof(asked._peers.table),
            ctypes.addressof(asked._peers.shape),
            asked.pairs.data_ptr(),
            asked.rows.data_ptr(),
            self.bell,
            int(timeout_s * 1e9),
        )
        asked.num_waiting = num_waiting + num_held_back
        if num_unasked and asked.num_unasked < num_unasked:
            asked.asked_s = now_s
        return not asked.num_waiting

    def can_run(self, asked: RingCall) -> bool:
        """Returns whether the nodes and rings that a call was asked through are those of now."""
        return asked.call.run is not None and asked._peers is self._peers_now()

    def run(self, asked: RingCall, soon_s: float, until_s: float) -> RanOn:
        """Takes the forward pass of a call further, from layer to layer, as long as each answer comes within `soon_s`,
        in seconds, and `until_s` has not come. `asked` is the last call then."""
        run, call = asked.call.run, asked.call
        assert run is not None, "its pass can be taken further"
        first, count, num_peers = run.place, len(run.layers.indices), len(asked._peers.nodes)
        normed, answer = torch.empty_like(call.hidden), torch.empty_like(call.hidden)
        experts, weights = torch.empty_like(call.experts), torch.empty_like(call.weights)
        call_ns, call_parts = (ctypes.c_int64 * count)(), (ctypes.c_int64 * count)()
        heard = (ctypes.c_int64 * num_peers)()
        steps = _RunSteps(
            ctypes.addressof(self._run_holders(asked._peers, run.layers)),
            *(tensor.data_ptr() for tensor in (normed, experts, weights, answer, call.weights)),
            asked._num_parts,
            int(asked.started_s * 1e9),
            int(soon_s * 1e9),
            int(until_s * 1e9),
            ctypes.addressof(call_ns),
            ctypes.addressof(call_parts),
            ctypes.addressof(heard),
        )
        num_numbers, num_unasked = len(asked._parts), asked.num_unasked
        asked._question.first_number = self._last_number + 1 - num_numbers  # the next call has those after
        end = RunEnd(
            self._kernels.run_layers(
                ctypes.addressof(run.descriptor),
                ctypes.addressof(steps),
                ctypes.addressof(asked._question),
                ctypes.addressof(asked._parts),
                ctypes.addressof(asked._peers.table),
                num_peers,
                ctypes.addressof(asked._peers.shape),
                asked.pairs.data_ptr(),
                asked.rows.data_ptr(),
                self.bell,
                int(call.hidden.dtype == torch.bfloat16),
            )
        )
        self._last_number = asked._question.first_number + num_numbers - 1
        if run.place > first:
            asked.call = ExpertCall(run.layer, normed, experts, weights, run)
            asked.started_s = asked.asked_s = steps.began_ns / 1e9
            asked._num_parts = max(0, steps.parts)
            if steps.parts < 0:
                self._note_full(asked.started_s)
        elif asked.num_unasked < num_unasked:
            asked.asked_s = time.monotonic()
        asked.num_waiting = sum(part.state == _WAITING for part in asked._parts[: asked._num_parts])
        asked.answer = answer if end is RunEnd.ANSWERED_LAST else None
        stop = run.place + (end is RunEnd.ANSWERED_LAST)
        passed = [
            PassedCall(run.layers.indices[place], call_ns[place] / 1e9, call_parts[place])
            for place in range(first, stop)
        ]
        nodes = [node for node, was_heard in zip(asked._peers.nodes, heard, strict=True) if was_heard]
        return RanOn(end, passed, nodes, steps.busy_ns / 1e9)

    def _run_holders(self, peers: _Peers, layers: RunLayers) -> ctypes.Array[_Holders]:
        if peers.run_holders is None or peers.run_holders[0] != layers.indices:
            tables = [self._holders(peers, layer) if self._nodes.has_layer(layer) else None for layer in layers.indices]
            empty = _Holders(None, 0, 0)
            entries = (empty if table is None else _Holders(table.ctypes.data, *table.shape) for table in tables)
            peers.run_holders = layers.indices, (_Holders * len(tables))(*entries)
        return peers.run_holders[1]

    def take_back(self, asked: RingCall, index: int) -> None:
        """Does not want one part any more. One that is done already stays as it is."""
        part = asked._parts[index]
        self._kernels.take_call_back(
            ctypes.addressof(part),
            ctypes.addressof(asked._peers.table[part.peer]),
            ctypes.addressof(asked._peers.shape),
        )

    def total(self, asked: RingCall) -> Tensor:
        """Returns the answer [T, D] of a call of which all has come: that of `ExactSum`, to the last bit."""
        return sum_experts(self._kernels, asked.rows, asked.call.weights, asked.num_slices)

    def _expect(self, dtype: torch.dtype, pairs_per_token: int) -> None:
        self.peers.expect(ring_shape(self._width, dtype.itemsize, pairs_per_token))

    def _peers_now(self) -> _Peers | None:
        changes = (self._nodes.num_changes, self.peers.num_changes)
        if changes != self._peers_of:
            self._peers, self._peers_of = self._new_peers(), changes
        return self._peers

    def _new_peers(self) -> _Peers | None:
        nodes = list(self._nodes)
        peers = [self.peers.find(node.number) for node in nodes]
        is_usual = all(node.connected and node.is_proven for node in nodes)
        if not nodes or not is_usual or len({node.numeric_class for node in nodes}) > 1:
            return None
        found = [peer for peer in peers if peer is not None]
        if len(found) < len(nodes):
            return None
        table = (PeerEntry * len(nodes))(*(peer.entry() for peer in found))
        return _Peers(nodes, found, self.peers.shape, table)

    def _holders(self, peers: _Peers, layer: int) -> Int64Array | None:
        if layer not in peers.holders:
            places = {node.number: place for place, node in enumerate(peers.nodes)}
            peers.holders[layer] = _table([[places[n] for n in copies] for copies in self._nodes.holders(layer, set())])
        return peers.holders[layer]


def _table(holders: Sequence[Sequence[int]]) -> Int64Array | None:
    """Returns int32 [shards, C] with -1 where there are fewer copies; None where a shard has none."""
    if not all(holders):
        return None
    table = np.full((len(holders), max(map(len, holders))), -1, dtype=np.int32)
    for shard, copies in enumerate(holders):
        table[shard, : len(copies)] = copies
    return table  # type: ignore[return-value]
