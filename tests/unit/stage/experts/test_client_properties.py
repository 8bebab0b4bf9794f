"""Expert calls under any order of events: each ends once, with the right sum or an error."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from common.messages import CancelCall, Dispatch
from common.wire.transport import LinkEvent
from services.stage.experts.client import LOOK_AGAIN_S
from services.stage.experts.dispatch import shard_keys
from services.stage.experts.hedging import CEILING_S
from services.stage.model.decoder import ExpertCall
from tests.support.nodes.expert_client_stage import ALL, Stage, answer_to, make_call, refusal, wanted
from tests.support.nodes.kernels import one_torch_thread
from tests.support.nodes.memory_transport import MemorySocket

__all__ = ["one_torch_thread"]


class Calls(RuleBasedStateMachine):
    """Nodes come, go, refuse and dawdle in any order; every call ends once, with the right sum or an error."""

    NODES = ("a", "b", "c")
    COMBINE = "exact"

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage(self.COMBINE)
        self.started: dict[str, ExpertCall] = {}
        self.num_started = 0
        self.unanswered: list[tuple[MemorySocket, Dispatch]] = []
        self.stage.place({"a": ALL, "b": (0, 1)})

    def live(self) -> list[str]:
        return [node.node_id for node in self.stage.client.nodes]

    @rule(
        experts=st.lists(st.permutations(ALL).map(lambda order: order[:2]), min_size=1, max_size=5),
        layer=st.integers(0, 1),
    )
    def start(self, experts: list[list[int]], layer: int) -> None:
        self.num_started += 1
        name = f"call {self.num_started}"
        self.started[name] = make_call(experts, layer)
        self.stage.start(self.started[name], name, within_s=5.0)

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        self.collect()
        if self.unanswered:
            socket, message = self.unanswered.pop(data.draw(st.integers(0, len(self.unanswered) - 1)))
            if not socket.is_closed:
                refuses = data.draw(st.integers(0, 4)) == 0
                socket.say(refusal(message) if refuses else answer_to(message))
                self.stage.poll()

    def collect(self) -> None:
        for socket in self.stage.transport.sockets.values():
            for message, _ in socket.take_sent():
                if isinstance(message, CancelCall):
                    # Half of them come too late: the node has begun to compute.
                    taken_back = {number for number in message.calls if number % 2}
                    self.unanswered = [e for e in self.unanswered if e[0] is not socket or e[1].call not in taken_back]
                else:
                    self.unanswered.append((socket, message))

    @rule(data=st.data(), event=st.sampled_from(LinkEvent))
    def link(self, data: st.DataObject, event: LinkEvent) -> None:
        if self.live():
            self.stage.link(data.draw(st.sampled_from(self.live())), event)

    @rule(data=st.data(), takes=st.booleans())
    def stuff(self, data: st.DataObject, takes: bool) -> None:
        if self.live():
            self.stage.socket(data.draw(st.sampled_from(self.live()))).takes_messages = takes

    @rule(holdings=st.dictionaries(st.sampled_from(NODES), st.lists(st.sampled_from(ALL), unique=True)))
    def place(self, holdings: dict[str, list[int]]) -> None:
        self.stage.place(holdings, connect=False)

    @rule(seconds=st.floats(0.0, 3.0))
    def time(self, seconds: float) -> None:
        self.stage.now_s += seconds
        self.stage.poll()

    @rule(milliseconds=st.integers(5, 300))
    def loop(self, milliseconds: int) -> None:
        """Time as a stage's loop sees it: late calls are hedged, silent nodes suspected."""
        self.collect()
        self.stage.pass_time(milliseconds / 1000)
        if milliseconds > 1000 * (CEILING_S + 2 * LOOK_AGAIN_S):
            self.no_suspect_keeps_what_a_copy_can_be_asked_for()

    def no_suspect_keeps_what_a_copy_can_be_asked_for(self) -> None:
        client, now_s = self.stage.client, self.stage.now_s
        suspects = client._in_flight.outliers.suspects(now_s)
        deaf = {n.number for n in client.nodes if not self.stage.socket(n.node_id).takes_messages}
        for pending in client._in_flight.open_calls:
            left = pending.missing.copy()
            for part in pending.parts.values():
                if part.rows.node not in suspects:
                    left[part.rows.pairs] = False
            for part in pending.parts.values():
                pairs = part.rows.pairs[left[part.rows.pairs]]
                if part.rows.node in suspects and pairs.size:
                    avoided = deaf | suspects | pending.pausing(now_s - LOOK_AGAIN_S) | pending.owed_by(pairs)
                    holders = client.nodes.holders(pending.call.layer, avoided)
                    assert not any(holders[key] for key in shard_keys(pending.call, pairs, pending.num_slices))

    @precondition(lambda self: len(self.started) > 3)
    @rule()
    def abandon(self) -> None:
        self.stage.client.abandon()
        for name in self.open():
            del self.started[name]

    def open(self) -> list[str]:
        ended = {name for name, _ in (*self.stage.sums, *self.stage.failures)}
        return [name for name in self.started if name not in ended]

    @invariant()
    def every_call_ends_at_most_once_and_right(self) -> None:
        ended = [name for name, _ in (*self.stage.sums, *self.stage.failures)]
        assert len(ended) == len(set(ended))
        for name, total in self.stage.sums:
            if name in self.started:
                assert self.is_right(total, wanted(self.started[name]))

    def is_right(self, total: Tensor, expected: Tensor) -> bool:
        """Bit by bit: whoever answered, in whatever order."""
        return torch.equal(total, expected)

    @invariant()
    def what_nodes_owe_is_what_was_asked_of_them(self) -> None:
        client = self.stage.client
        owed = {node.number: 0 for node in client.nodes}
        for part in client._in_flight._asked.values():
            rows = part.rows
            owed[rows.node] += rows.pairs.size
        assert owed == client.nodes.outstanding_rows

    def teardown(self) -> None:
        """A mesh that is well again answers all that is left, or time does."""
        self.stage.place({"a": ALL, "d": ALL}, connect=False)
        for node in ("a", "d"):
            self.stage.socket(node).takes_messages = True
            self.stage.link(node)
        for _ in range(2):
            self.collect()
            for socket, message in self.unanswered:
                if not socket.is_closed:
                    socket.say(answer_to(message))
            self.unanswered.clear()
            self.stage.poll()
        self.stage.poll(self.stage.now_s + 100.0)
        self.every_call_ends_at_most_once_and_right()
        assert self.open() == []
        assert set(self.stage.outstanding.values()) <= {0}
        assert not self.stage.client._in_flight._asked
        assert not self.stage.client._in_flight._open


class PartialCalls(Calls):
    """The same where nodes weigh and add: a pair that was added twice, or not at all, would show in the sum."""

    COMBINE = "partial"

    def is_right(self, total: Tensor, expected: Tensor) -> bool:
        return torch.allclose(total, expected, rtol=1e-4, atol=1e-5)


TestPartialCalls = PartialCalls.TestCase
TestPartialCalls.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestCalls = Calls.TestCase
TestCalls.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
