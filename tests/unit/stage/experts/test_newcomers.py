"""Expert nodes that join others: each answers a probe over the path of real calls before a token waits for it."""

from __future__ import annotations

import torch

from common.messages import Dispatch
from services.stage.experts.hedging import CEILING_S
from services.stage.experts.pending_call import FIRST_PAUSE_S
from tests.support.nodes.expert_client_stage import ALL, CALL, Stage, answer_to, make_call, refusal, wanted
from tests.support.nodes.kernels import one_torch_thread

__all__ = ["one_torch_thread"]


def joined() -> Stage:
    """Node a has answered calls; node b, which holds everything too, has just come."""
    stage = Stage()
    stage.place({"a": ALL})
    stage.start(CALL, "before")
    stage.answer_all()
    stage.place({"a": ALL, "b": ALL})
    return stage


def rows_of(messages: list[Dispatch]) -> int:
    return sum(message.routing.shape[1] for message in messages)


def test_a_newcomer_is_asked_for_one_row_on_top_and_for_its_share_once_it_has_answered() -> None:
    stage = joined()
    stage.start(CALL, "first")
    probe = stage.asked("b")
    assert rows_of(probe) == 1
    asked = stage.asked("a")
    assert rows_of(asked) == CALL.experts.numel(), "who has answered before is asked for everything"
    stage.answer("a", *asked)
    assert torch.equal(stage.sums[-1][1], wanted(CALL)), "nobody waits for the probe"
    stage.start(CALL, "second")
    assert stage.asked("b") == [], "one probe at a time"
    stage.answer("b", answer_to(probe[0]))
    assert stage.client.counters.late_answers == 0
    stage.start(CALL, "third")
    assert rows_of(stage.asked("b")) > 1


def test_a_newcomer_that_is_there_and_answers_nothing_holds_up_no_call() -> None:
    stage = joined()
    for number in range(24):  # for as long as it may still answer
        stage.start(CALL, f"call {number}")
        stage.answer("a", *stage.asked("a"))
        assert stage.sums[-1][0] == f"call {number}", "without any wait"
        stage.pass_time(0.4)
    assert rows_of(stage.asked("b")) == 1
    assert (stage.client.counters.hedged, stage.client.counters.suspicions) == (0, 0)
    assert stage.outstanding == {"a": 0, "b": 0}


def test_a_newcomer_that_refuses_its_probe_is_asked_again_after_a_while() -> None:
    stage = joined()
    stage.start(CALL, "first")
    stage.answer("b", *map(refusal, stage.asked("b")))
    stage.answer("a", *stage.asked("a"))
    stage.start(CALL, "second")
    assert stage.asked("b") == []
    stage.answer("a", *stage.asked("a"))
    stage.pass_time(FIRST_PAUSE_S + 0.01)
    stage.start(CALL, "third")
    assert rows_of(stage.asked("b")) == 1


def test_a_newcomer_whose_probe_was_dropped_since_its_time_was_up_is_asked_for_another_one() -> None:
    stage = joined()
    stage.start(CALL, "first", within_s=1.0)
    assert rows_of(stage.asked("b")) == 1
    stage.answer("a", *stage.asked("a"))
    stage.pass_time(1.01)
    stage.start(CALL, "second")
    (probe,) = stage.asked("b")
    stage.answer("b", answer_to(probe))
    stage.start(CALL, "third")
    assert rows_of(stage.asked("b")) > 1


def test_what_a_newcomer_alone_holds_is_asked_of_it_at_once() -> None:
    stage = Stage()
    stage.place({"a": (0, 1)})
    stage.place({"a": (0, 1), "b": (2, 3)})
    stage.start(make_call([[2, 3]]))
    asked = stage.asked("b")
    assert rows_of(asked) >= 2
    stage.answer("b", *asked)
    assert torch.equal(stage.sums[0][1], wanted(make_call([[2, 3]])))


def test_nodes_that_come_together_need_no_probe() -> None:
    stage = Stage()
    stage.place({"a": ALL, "b": ALL})
    stage.start(CALL)
    assert rows_of(stage.asked("a")) + rows_of(stage.asked("b")) == CALL.experts.numel()


def test_partial_sums_are_probed_with_weights() -> None:
    stage = Stage(combine="partial")
    stage.place({"a": ALL})
    stage.place({"a": ALL, "b": ALL})
    stage.start(CALL)
    stage.start(CALL, "second")
    stage.answer_all()
    assert len(stage.sums) == 2
    assert all(torch.allclose(total, wanted(CALL)) for _, total in stage.sums)


def test_what_is_late_is_asked_of_a_proven_copy_before_a_newcomer() -> None:
    stage = Stage()
    stage.place({"a": ALL, "b": ALL})
    stage.start(CALL, "before")
    stage.answer_all()
    stage.place({"a": ALL, "b": ALL, "c": ALL})
    stage.start(CALL, "late")
    stage.answer("a", *stage.asked("a"))
    late, probe = stage.asked("b"), stage.asked("c")
    assert rows_of(late) > 1
    assert rows_of(probe) == 1
    stage.pass_time(CEILING_S + 0.01)
    assert stage.asked("c") == [], "it may be one that answers nothing"
    stage.answer("a", *stage.asked("a"))
    assert torch.equal(stage.sums[-1][1], wanted(CALL))


def test_what_is_late_is_asked_of_a_newcomer_where_nobody_else_has_a_copy() -> None:
    stage = joined()
    stage.start(CALL, "late")
    stage.answer("b", *map(refusal, stage.asked("b")))
    assert rows_of(stage.asked("a")) == CALL.experts.numel()
    stage.pass_time(CEILING_S + 0.01)
    stage.answer("b", *stage.asked("b"))
    assert torch.equal(stage.sums[-1][1], wanted(CALL))
