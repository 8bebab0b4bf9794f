"""Expert calls over sockets that are lists: nobody is asked twice, nothing is lost, every wait has an end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import DeadlineError, ExecutionError, ProtocolError
from common.messages import Dispatch, ExpertRows, Header
from common.wire.array import array_to_frame
from common.wire.tensor import tensor_to_frame
from common.wire.transport import LinkEvent
from services.stage.experts.client import CONNECT_INTERVAL_S, RETRY_INTERVAL_S
from services.stage.experts.pending_call import LONGEST_PAUSE_S
from tests.support.nodes.expert_client_stage import (
    ALL,
    CALL,
    EXPERTS,
    LAYERS,
    WIDTH,
    Stage,
    answer_to,
    make_call,
    placement,
    refusal,
    wanted,
)
from tests.support.nodes.kernels import one_torch_thread

__all__ = ["one_torch_thread"]


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
    assert stage.client.counters.calls == 1


def test_a_call_never_ends_within_start() -> None:
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
    assert stage.client.counters.resent == 1
    stage.answer("a", *lost)
    assert stage.client.counters.late_answers == 1
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


@pytest.mark.parametrize("combine", ["exact", "partial"])
def test_a_call_that_begins_before_the_first_placement_waits_for_it(combine: str) -> None:
    stage = Stage(combine)
    stage.start(CALL)
    stage.poll(0.5)
    assert (stage.sums, stage.failures) == ([], [])
    stage.place({"a": (0, 1), "b": (2, 3)})
    stage.answer_all()
    torch.testing.assert_close(stage.sums[0][1], wanted(CALL), rtol=0, atol=0 if combine == "exact" else 1e-6)


def test_without_a_placement_a_call_fails_at_its_deadline() -> None:
    stage = Stage()
    stage.start(CALL, within_s=1.0)
    stage.poll(1.0)
    ((_, error),) = stage.failures
    assert str(error) == "layer 1: no answer in time from a node that holds the layer's experts"


def test_a_call_of_a_layer_that_the_placement_lacks_cannot_begin() -> None:
    stage = Stage()
    stage.place({"a": ALL})
    with pytest.raises(ExecutionError, match="the placement has no layer 7"):
        stage.start(make_call([[0, 1]], layer=7))


def test_a_call_whose_time_is_up_fails_with_the_names_of_those_who_owe_it() -> None:
    stage = Stage()
    stage.place({"a": (0, 1), "b": (2, 3)})
    stage.start(CALL, within_s=1.0)
    late = stage.asked("b")
    stage.answer("a", *stage.asked("a"))
    stage.poll(0.99)
    assert stage.failures == []
    stage.poll(1.0)
    ((_, error),) = stage.failures
    assert isinstance(error, DeadlineError)
    assert str(error) == "layer 1: no answer in time from b"
    assert set(stage.outstanding.values()) == {0}
    stage.answer("b", *late)
    assert stage.client.counters.late_answers == 1
    assert stage.sums == []
    stage.poll(9.0)
    assert len(stage.failures) == 1


def test_an_unassigned_call_fails_at_its_deadline_too() -> None:
    stage = Stage()
    stage.place({"a": (0, 1, 2)})
    stage.start(CALL, within_s=1.0)
    assert pairs_of(stage.asked("a")) == 6, "what has a holder is asked, the rest waits"
    stage.poll(1.0)
    assert isinstance(stage.failures[0][1], DeadlineError)
    stage.place({"a": ALL})
    assert stage.asked("a") == []


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


def refuse_everything(stage: Stage, until_s: float) -> list[str]:
    """Whoever is asked refuses at once; who that was, in order."""
    refusers: list[str] = []
    while stage.now_s < until_s and not stage.failures:
        for node in stage.client.nodes:
            messages = stage.asked(node.node_id)
            refusers += [node.node_id] * len(messages)
            stage.answer(node.node_id, *map(refusal, messages))
        stage.pass_time(0.005)
    return refusers


def test_a_call_that_everybody_refuses_is_asked_again_at_growing_intervals_and_answered_within_its_deadline() -> None:
    stage = Stage()
    stage.place({"a": ALL, "b": ALL})
    stage.start(make_call([[0]]), within_s=20.0)
    refusers = refuse_everything(stage, 15.0)
    assert stage.failures == []
    assert refusers[:2] == ["a", "b"], "nobody is asked twice before all were asked"
    assert 20 < len(refusers) < 50
    stage.pass_time(LONGEST_PAUSE_S + RETRY_INTERVAL_S)
    stage.answer_all()
    assert torch.equal(stage.sums[0][1], wanted(make_call([[0]])))


def test_a_call_that_everybody_refuses_to_the_end_fails_at_its_deadline_with_their_reason() -> None:
    stage = Stage()
    stage.place({name: ALL for name in "abcd"})
    stage.start(make_call([[0]]), within_s=20.0)
    refusers = refuse_everything(stage, 100.0)
    assert set(refusers[:4]) == set("abcd")
    assert stage.now_s == pytest.approx(20.0, abs=0.01)
    ((_, error),) = stage.failures
    assert isinstance(error, DeadlineError)
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
    stage.answer("a", ExpertRows(message.call, tensor_to_frame(rows)))
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
    assert stage.client.counters.late_answers == 1
    stage.answer("a", message)
    assert len(stage.sums) == 1
    assert set(stage.outstanding.values()) == {0}


def test_an_answer_is_taken_once() -> None:
    stage = Stage()
    stage.place({"a": (0, 1), "b": (2, 3)})
    stage.start(CALL)
    (message,) = stage.asked("a")
    stage.answer("a", message, message)
    assert stage.client.counters.late_answers == 1
    assert stage.sums == []


def test_what_is_abandoned_never_ends() -> None:
    stage = Stage()
    stage.place({"a": ALL})
    stage.start(CALL)
    asked = stage.asked("a")
    stage.start(make_call([[0]]), within_s=0.5)
    stage.client.abandon()
    stage.answer("a", *asked, *stage.asked("a"))
    stage.poll(100.0)
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
        {"owners": array_to_frame(np.ones((1, LAYERS, EXPERTS, 2), dtype=np.int32))},
        {"owners": array_to_frame(np.ones((LAYERS, EXPERTS, 1), dtype=np.int32))},
        {"owners": array_to_frame(np.ones((1, LAYERS, EXPERTS, 1), dtype=np.uint8))},
        {"owners": array_to_frame(np.full((1, LAYERS, EXPERTS, 1), 2, dtype=np.int32))},
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


def test_a_call_of_before_a_router_that_cuts_experts_in_another_way_fails_and_takes_nobody_along() -> None:
    stage = Stage()
    stage.client.nodes.expect(2)
    stage.start(CALL, "of before")
    stage.place({"a": ALL})
    assert [(name, str(error)) for name, error in stage.failures] == [
        ("of before", "layer 1: its experts are cut into 1 now, not into 2")
    ]
    stage.start(CALL, "of now")
    stage.answer_all()
    assert [name for name, _ in stage.sums] == ["of now"]


def test_a_shard_that_only_an_unreachable_node_holds_waits_like_any_other() -> None:
    stage = Stage()
    stage.take(placement({"far": ALL}, 1, endpoints=("ipc:///elsewhere",)))
    stage.start(CALL, within_s=1.0)
    stage.poll(1.0)
    assert isinstance(stage.failures[0][1], DeadlineError)


def test_a_node_for_which_there_is_no_socket_is_connected_to_later_and_the_others_serve_meanwhile() -> None:
    stage = Stage()
    stage.transport.max_open = 1
    stage.place({"a": (0, 1, 2), "b": (3, 2)}, connect=False)
    stage.link("a")
    stage.start(make_call([[0, 1], [2, 0]]), "held by a")
    stage.answer_all()
    assert [name for name, _ in stage.sums] == ["held by a"]
    stage.start(CALL, "wants b")
    stage.answer_all()
    stage.transport.max_open = 2
    stage.pass_time(0.5 * CONNECT_INTERVAL_S)
    assert "to b" not in stage.transport.sockets, "not in every turn of the loop"
    stage.pass_time(0.6 * CONNECT_INTERVAL_S)
    opened = stage.socket("b")
    stage.pass_time(1.1 * CONNECT_INTERVAL_S)
    assert stage.socket("b") is opened, "there is nothing left to open"
    stage.link("b")
    stage.pass_time(0.2)
    stage.answer_all()
    assert [name for name, _ in stage.sums] == ["held by a", "wants b"]


def test_sockets_of_nodes_that_are_gone_are_closed_before_those_of_new_ones_are_opened() -> None:
    stage = Stage()
    stage.transport.max_open = 1
    stage.place({"a": ALL})
    stage.place({"b": ALL})
    stage.start(CALL)
    stage.answer_all()
    assert [name for name, _ in stage.sums] == ["call"]
