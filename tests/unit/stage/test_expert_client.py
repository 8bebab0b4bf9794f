"""Expert calls over sockets that are lists: nobody is asked twice, nothing is lost, every wait has an end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from common.array import array_to_frame
from common.errors import DeadlineError, ExecutionError, MoemeshError, ProtocolError
from common.messages import Dispatch, ExpertRows, Failed, Header, PublishPlacement
from common.tensor import frame_to_tensor, tensor_to_frame
from common.transport import LinkEvent
from services.stage.expert_client import MAX_REFUSALS, RETRY_INTERVAL_S, ExpertClient
from services.stage.expert_nodes import ExpertNodes
from services.stage.model.decoder import ExpertCall
from tests.support.kernels import one_torch_thread
from tests.support.memory_transport import MemorySocket, MemoryTransport

__all__ = ["one_torch_thread"]
LAYERS, EXPERTS, WIDTH = 2, 4, 3
ALL = tuple(range(EXPERTS))
Holdings = Mapping[str, Sequence[int]]


class Stage:
    """An expert client with the test as all of its peers."""

    def __init__(self, combine: str = "exact") -> None:
        self.transport = MemoryTransport()
        transport: Any = self.transport
        log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
        self.client = ExpertClient(ExpertNodes(transport, "", log), log)
        self.client.combine = combine
        self.now_s = 0.0
        self.version = 0
        self.sums: list[tuple[str, Tensor]] = []
        self.failures: list[tuple[str, MoemeshError]] = []

    def place(self, holdings: Holdings, *, connect: bool = True, version: int | None = None) -> bool:
        """Publish who holds which experts (of every layer), first node first choice."""
        self.version += 1
        took = self.take(placement(holdings, version or self.version))
        if connect:
            for node in holdings:
                self.link(node)
        return took

    def take(self, message: PublishPlacement, router_term: int = 1) -> bool:
        return self.client.take_placement(message, router_term, 1, self.now_s)

    def socket(self, node: str) -> MemorySocket:
        return self.transport.sockets[f"to {node}"]

    def link(self, node: str, event: LinkEvent = LinkEvent.CONNECTED) -> None:
        self.socket(node).events.append(event)
        self.client.receive(self.now_s)

    def start(self, call: ExpertCall, name: str = "call", within_s: float = 10.0) -> None:
        self.client.start(
            call,
            Header(step=5, generation=2, attempt=1, trace="0/5"),
            self.now_s,
            self.now_s + within_s,
            on_done=lambda answer: self.sums.append((name, answer)),
            on_failed=lambda error: self.failures.append((name, error)),
        )

    def asked(self, node: str) -> list[Dispatch]:
        return [message for message, _ in self.socket(node).take_sent()]

    def answer(self, node: str, *messages: Any) -> None:
        for message in messages:
            self.socket(node).say(answer_to(message) if isinstance(message, Dispatch) else message)
        self.client.receive(self.now_s)

    def answer_all(self) -> None:
        for name, socket in self.transport.sockets.items():
            if not socket.is_closed:
                self.answer(name.removeprefix("to "), *self.asked(name.removeprefix("to ")))

    @property
    def outstanding(self) -> dict[str, int]:
        return {node.node_id: node.outstanding_rows for node in self.client.nodes}


def placement(holdings: Holdings, version: int, **changes: Any) -> PublishPlacement:
    copies = np.zeros((len(holdings), LAYERS, EXPERTS, 1), dtype=np.uint8)
    for place, experts in enumerate(holdings.values()):
        for expert in experts:
            copies[place, :, expert, 0] = 1 + place
    fields: dict[str, Any] = {
        "version": version,
        "node_ids": tuple(holdings),
        "incarnations": tuple(range(1, 1 + len(holdings))),
        "endpoints": tuple(f"tcp://{node}:1" for node in holdings),
        "ipc_tokens": ("",) * len(holdings),
        "numeric_classes": ("cpu",) * len(holdings),
        "copies": array_to_frame(copies),
    }
    # The same node keeps its incarnation from one placement to the next.
    fields["incarnations"] = tuple(1 + sum(map(ord, node)) for node in holdings)
    return PublishPlacement(**(fields | changes))


def make_call(experts: Sequence[Sequence[int]], layer: int = 1) -> ExpertCall:
    generator = torch.Generator().manual_seed(len(experts))
    hidden = torch.randn((len(experts), WIDTH), generator=generator)
    return ExpertCall(
        layer, hidden, torch.tensor(experts), torch.rand(len(experts), len(experts[0]), generator=generator)
    )


CALL = make_call([[0, 1], [2, 3], [1, 0], [3, 1]])


def expert_rows(hidden: Tensor, experts: Tensor) -> Tensor:
    return hidden * (1.0 + experts)[:, None]


def wanted(call: ExpertCall) -> Tensor:
    """As one node would compute it alone."""
    total = torch.zeros_like(call.hidden)
    for choice in range(call.experts.shape[1]):
        rows = expert_rows(call.hidden, call.experts[:, choice])
        total = total + rows * call.weights[:, choice, None]
    return total


def answer_to(message: Dispatch) -> ExpertRows:
    hidden = frame_to_tensor(message.hidden, torch.float32, (None, WIDTH), "hidden")
    routing = frame_to_tensor(message.routing, torch.int32, (3, None), "routing").long()
    rows = expert_rows(hidden[routing[0]], routing[1])
    if message.weights.shape != (0,):
        weights = frame_to_tensor(message.weights, torch.float32, (routing.shape[1],), "weights")
        rows = torch.zeros_like(hidden).index_add_(0, routing[0], rows * weights[:, None])
    return ExpertRows(message.call, tensor_to_frame(rows), 0.0, 0.0)


def pairs_of(messages: Sequence[Dispatch]) -> int:
    return sum(message.routing.shape[1] for message in messages)


def test_a_call_is_asked_once_and_its_sum_comes_with_the_last_answer() -> None:
    stage = Stage()
    stage.place({"a": ALL, "b": ALL})
    stage.start(CALL)
    first, second = stage.asked("a"), stage.asked("b")
    assert len(first) == len(second) == 1
    assert pairs_of(first + second) == CALL.experts.numel()
    stage.answer("b", *second)
    assert stage.sums == []
    stage.answer("a", *first)
    ((_, total),) = stage.sums
    assert torch.equal(total, wanted(CALL))
    assert set(stage.outstanding.values()) == {0}
    assert stage.client.answered == 1


def test_the_callbacks_never_come_from_within_start() -> None:
    stage = Stage()
    stage.place({"a": ALL})
    stage.socket("a").takes_messages = False
    stage.start(CALL)
    assert (stage.sums, stage.failures) == ([], [])


def test_a_dispatch_carries_the_steps_counters_its_layer_and_the_time_left() -> None:
    stage = Stage()
    stage.place({"a": ALL})
    stage.start(CALL, within_s=2.5)
    ((_, header),) = stage.socket("a").take_sent()
    assert header == Header(step=5, generation=2, attempt=1, layer=1, time_left_ms=2500, trace="0/5")


def test_each_token_row_travels_once_to_a_node() -> None:
    stage = Stage()
    stage.place({"a": (0, 1), "b": (2, 3)})
    stage.start(CALL)
    (to_b,) = stage.asked("b")
    assert to_b.hidden.shape == (2, WIDTH), "tokens 1 and 3 go there, token 1 with two experts"
    assert to_b.routing.shape == (3, 3)


def test_weights_are_sent_only_where_the_node_is_to_weigh() -> None:
    stage = Stage(combine="partial")
    stage.place({"a": (0, 1), "b": (2, 3)})
    stage.start(CALL)
    stage.answer_all()
    assert torch.allclose(stage.sums[0][1], wanted(CALL))


def test_what_a_lost_node_owes_goes_to_the_copies_and_its_late_answer_is_ignored() -> None:
    stage = Stage()
    stage.place({"a": ALL, "b": ALL})
    stage.start(CALL)
    lost = stage.asked("a")
    stage.link("a", LinkEvent.CLOSED)
    resent = stage.asked("b")
    assert pairs_of(resent) == CALL.experts.numel(), "its own and those of the lost node"
    assert stage.client.resent_calls == 1
    stage.answer("a", *lost)
    assert stage.client.late_answers == 1
    stage.answer("b", *resent)
    assert torch.equal(stage.sums[0][1], wanted(CALL))
    assert set(stage.outstanding.values()) == {0}


def test_a_node_that_takes_no_message_is_as_good_as_lost() -> None:
    stage = Stage()
    stage.place({"a": ALL, "b": ALL})
    stage.socket("a").takes_messages = False
    stage.start(CALL)
    stage.answer_all()
    assert torch.equal(stage.sums[0][1], wanted(CALL))


def test_without_a_copy_a_call_waits_for_the_link_to_come_back() -> None:
    stage = Stage()
    stage.place({"a": ALL})
    stage.start(CALL)
    stage.link("a", LinkEvent.CLOSED)
    stage.asked("a")
    assert (stage.sums, stage.failures) == ([], [])
    stage.link("a")
    stage.answer_all()
    assert torch.equal(stage.sums[0][1], wanted(CALL))


def test_without_a_copy_a_call_waits_for_a_placement_that_has_one() -> None:
    stage = Stage()
    stage.place({"a": (0, 1), "b": (2, 3)})
    stage.start(CALL)
    stage.answer("a", *stage.asked("a"))
    stage.link("b", LinkEvent.CLOSED)
    stage.place({"a": (0, 1), "c": (2, 3)})
    assert stage.socket("b").is_closed
    stage.answer_all()
    assert torch.equal(stage.sums[0][1], wanted(CALL))


def test_a_call_may_begin_while_nobody_is_connected_yet() -> None:
    stage = Stage()
    stage.place({"a": ALL}, connect=False)
    stage.start(CALL)
    assert stage.asked("a") == []
    stage.link("a")
    stage.answer_all()
    assert torch.equal(stage.sums[0][1], wanted(CALL))


def test_a_node_that_a_placement_drops_loses_its_rows_to_the_others() -> None:
    stage = Stage()
    stage.place({"a": ALL, "b": ALL})
    stage.start(CALL)
    stage.place({"b": ALL})
    assert pairs_of(stage.asked("b")) == CALL.experts.numel()


def test_before_the_first_placement_a_call_cannot_begin() -> None:
    with pytest.raises(ExecutionError, match="no placement for layer 1"):
        Stage().start(CALL)


def test_a_call_whose_time_is_up_fails_with_the_names_of_those_who_owe_it() -> None:
    stage = Stage()
    stage.place({"a": (0, 1), "b": (2, 3)})
    stage.start(CALL, within_s=1.0)
    late = stage.asked("b")
    stage.answer("a", *stage.asked("a"))
    stage.client.check_deadlines(0.99)
    assert stage.failures == []
    stage.client.check_deadlines(1.0)
    ((_, error),) = stage.failures
    assert isinstance(error, DeadlineError)
    assert str(error) == "layer 1: no answer in time from b"
    assert set(stage.outstanding.values()) == {0}
    stage.answer("b", *late)
    assert stage.client.late_answers == 1
    assert stage.sums == []
    stage.client.check_deadlines(9.0)
    assert len(stage.failures) == 1


def test_a_homeless_call_fails_at_its_deadline_too() -> None:
    stage = Stage()
    stage.place({"a": (0, 1, 2)})
    stage.start(CALL, within_s=1.0)
    stage.client.check_deadlines(1.0)
    assert isinstance(stage.failures[0][1], DeadlineError)
    stage.place({"a": ALL})
    assert stage.asked("a") == []


def refusal(message: Dispatch) -> Failed:
    return Failed("not_ready", "expert 2 is not held here", message.call)


def test_a_refusal_goes_to_the_next_copy_and_the_refuser_is_not_asked_again() -> None:
    stage = Stage()
    stage.place({"a": ALL, "b": ALL})
    stage.start(CALL)
    stage.answer("a", *[refusal(message) for message in stage.asked("a")])
    first = stage.asked("b")
    assert pairs_of(first) == CALL.experts.numel()
    assert stage.asked("a") == []
    stage.answer("b", *first)
    assert torch.equal(stage.sums[0][1], wanted(CALL))


def test_a_refuser_is_asked_again_after_a_new_placement() -> None:
    stage = Stage()
    stage.place({"a": ALL})
    stage.start(CALL)
    stage.answer("a", *[refusal(message) for message in stage.asked("a")])
    assert stage.asked("a") == []
    stage.place({"a": ALL})
    stage.answer_all()
    assert torch.equal(stage.sums[0][1], wanted(CALL))


def test_a_call_that_everybody_refuses_fails_with_their_reason() -> None:
    stage = Stage()
    stage.place({name: ALL for name in "abcd"})
    stage.start(make_call([[0]]), within_s=100.0)
    refusers: list[str] = []
    while len(refusers) < MAX_REFUSALS:
        refusers += [name for name in "abcd" if stage.socket(name).sent]
        stage.answer(refusers[-1], *[refusal(message) for message in stage.asked(refusers[-1])])
        stage.now_s += RETRY_INTERVAL_S
        stage.client.check_deadlines(stage.now_s)
    assert set(refusers[:4]) == set("abcd"), "nobody is asked twice before all were asked"
    ((_, error),) = stage.failures
    assert isinstance(error, ExecutionError)
    assert "expert 2 is not held here" in str(error)
    assert set(stage.outstanding.values()) == {0}


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(1, WIDTH), torch.zeros(8, WIDTH + 1), torch.zeros(8, WIDTH, dtype=torch.bfloat16), torch.zeros(24)],
)
def test_rows_of_another_shape_count_as_a_refusal(rows: Tensor) -> None:
    stage = Stage()
    stage.place({"a": ALL})
    stage.start(CALL)
    (message,) = stage.asked("a")
    stage.answer("a", ExpertRows(message.call, tensor_to_frame(rows), 0.0, 0.0))
    assert stage.sums == []
    stage.place({"a": ALL, "b": ALL})
    stage.answer_all()
    assert torch.equal(stage.sums[0][1], wanted(CALL))


def test_an_answer_to_a_question_that_was_asked_of_another_node_is_not_taken() -> None:
    stage = Stage()
    stage.place({"a": ALL, "b": (0,)})
    stage.start(make_call([[1], [2]]))
    (message,) = stage.asked("a")
    stage.answer("b", answer_to(message))
    assert stage.sums == []
    assert stage.client.late_answers == 1
    stage.answer("a", message)
    assert len(stage.sums) == 1
    assert set(stage.outstanding.values()) == {0}


def test_an_answer_is_taken_once() -> None:
    stage = Stage()
    stage.place({"a": (0, 1), "b": (2, 3)})
    stage.start(CALL)
    (message,) = stage.asked("a")
    stage.answer("a", message, message)
    assert stage.client.late_answers == 1
    assert stage.sums == []


def test_what_is_abandoned_never_calls_back() -> None:
    stage = Stage()
    stage.place({"a": ALL})
    stage.start(CALL)
    asked = stage.asked("a")
    stage.start(make_call([[0]]), within_s=0.5)
    stage.client.abandon()
    stage.answer("a", *asked, *stage.asked("a"))
    stage.client.check_deadlines(100.0)
    stage.link("a", LinkEvent.CLOSED)
    stage.link("a")
    assert (stage.sums, stage.failures) == ([], [])
    assert stage.asked("a") == []
    assert stage.outstanding == {"a": 0}


def test_an_older_placement_changes_nothing() -> None:
    stage = Stage()
    stage.place({"a": ALL}, version=5)
    assert stage.place({"b": ALL}, version=4, connect=False) is False
    assert list(stage.transport.sockets) == ["to a"]


def test_a_node_that_stays_keeps_its_socket_and_a_new_incarnation_gets_one() -> None:
    stage = Stage()
    stage.place({"a": ALL, "b": ALL})
    sockets = dict(stage.transport.sockets)
    stage.place({"a": (0,), "b": ALL, "c": ALL})
    assert stage.socket("a") is sockets["to a"]
    stage.version += 1
    stage.transport.sockets.clear()
    stage.take(placement({"a": ALL}, stage.version, incarnations=(77,)))
    assert sockets["to a"].is_closed
    assert sockets["to b"].is_closed
    assert not stage.socket("a").is_closed


@pytest.mark.parametrize(
    "changes",
    [
        {"copies": array_to_frame(np.ones((1, LAYERS, EXPERTS, 2), dtype=np.uint8))},
        {"copies": array_to_frame(np.ones((2, LAYERS, EXPERTS, 1), dtype=np.uint8))},
        {"copies": array_to_frame(np.ones((1, LAYERS, EXPERTS, 1), dtype=np.int32))},
        {"incarnations": ()},
        {"endpoints": ()},
        {"ipc_tokens": ("", "")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_placement_whose_columns_do_not_fit_is_refused_and_changes_nothing(changes: dict[str, Any]) -> None:
    stage = Stage()
    with pytest.raises(ProtocolError):
        stage.take(placement({"a": ALL}, 9, **changes))
    assert stage.place({"a": ALL}, version=1)
    stage.start(CALL)
    stage.answer_all()
    assert len(stage.sums) == 1


def test_one_node_that_cannot_be_reached_does_not_keep_the_others_away() -> None:
    stage = Stage()
    stage.version += 1
    message = placement({"far": ALL, "a": ALL}, stage.version, endpoints=("ipc:///elsewhere", "tcp://a:1"))
    assert stage.take(message)
    stage.link("a")
    stage.start(CALL)
    stage.answer_all()
    assert torch.equal(stage.sums[0][1], wanted(CALL))


def test_a_shard_that_only_an_unreachable_node_holds_waits_like_any_other() -> None:
    stage = Stage()
    stage.take(placement({"far": ALL}, 1, endpoints=("ipc:///elsewhere",)))
    stage.start(CALL, within_s=1.0)
    stage.client.check_deadlines(1.0)
    assert isinstance(stage.failures[0][1], DeadlineError)


class Calls(RuleBasedStateMachine):
    """Nodes come, go, refuse and dawdle in any order; every call ends once, with the right sum or an error."""

    NODES = ("a", "b", "c")

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage()
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
                self.stage.client.receive(self.stage.now_s)

    def collect(self) -> None:
        for socket in self.stage.transport.sockets.values():
            self.unanswered += [(socket, message) for message, _ in socket.take_sent()]

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
        self.stage.client.check_deadlines(self.stage.now_s)

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
                assert torch.equal(total, wanted(self.started[name]))

    @invariant()
    def what_nodes_owe_is_what_was_asked_of_them(self) -> None:
        client = self.stage.client
        owed = {node.number: 0 for node in client.nodes}
        for number, pending in client._calls.items():
            owed[pending.parts[number].node] += pending.parts[number].pairs.size
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
            self.stage.client.receive(self.stage.now_s)
        self.stage.client.check_deadlines(self.stage.now_s + 100.0)
        self.every_call_ends_at_most_once_and_right()
        assert self.open() == []
        assert set(self.stage.outstanding.values()) <= {0}
        assert not self.stage.client._calls
        assert not self.stage.client._stranded


TestCalls = Calls.TestCase
TestCalls.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
