"""Late expert calls: asked of a copy too, taken once, taken back where they are not needed; and going on without."""

from __future__ import annotations

import pytest
import torch

from common.messages import Dispatch
from common.wire.transport import LinkEvent
from services.stage.experts.client import LOOK_AGAIN_S
from services.stage.experts.hedging import CEILING_S, DOUBT_LAPSES_S, HEDGE_BURST, LONGEST_SILENCE_S
from services.stage.experts.pending_call import LONGEST_PAUSE_S
from tests.support.nodes.expert_client_stage import ALL, CALL, Stage, answer_to, make_call, refusal, wanted
from tests.support.nodes.kernels import one_torch_thread

__all__ = ["one_torch_thread"]


def pairs_of(messages: list[Dispatch]) -> int:
    return sum(message.routing.shape[1] for message in messages)


def stage_of(**holdings: tuple[int, ...]) -> Stage:
    stage = Stage()
    stage.place(holdings)
    return stage


def test_a_late_call_is_asked_of_the_copy_too_and_not_before_the_delay() -> None:
    stage = stage_of(a=ALL, b=ALL)
    stage.start(CALL)
    late, own = stage.asked("a"), stage.asked("b")
    stage.answer("b", *own)
    stage.pass_time(CEILING_S - 0.01)
    assert stage.asked("b") == []
    stage.pass_time(0.02)
    hedge = stage.asked("b")
    assert pairs_of(hedge) == pairs_of(late)
    assert stage.client.counters.hedged == 1
    stage.answer("b", *hedge)
    assert torch.equal(stage.sums[0][1], wanted(CALL))
    assert stage.client.counters.hedge_wins == 1


def test_the_answer_of_the_loser_is_late_and_not_used() -> None:
    stage = stage_of(a=ALL, b=ALL)
    stage.start(CALL)
    late = stage.asked("a")
    stage.answer("b", *stage.asked("b"))
    stage.pass_time(CEILING_S + 0.01)
    stage.answer("b", *stage.asked("b"))
    stage.answer("a", *late)
    assert len(stage.sums) == 1
    assert stage.client.counters.late_answers == 1
    assert set(stage.outstanding.values()) == {0}


def test_where_the_first_node_answers_after_all_the_hedge_is_taken_back() -> None:
    stage = stage_of(a=ALL, b=ALL)
    stage.start(CALL)
    late = stage.asked("a")
    stage.answer("b", *stage.asked("b"))
    stage.pass_time(CEILING_S + 0.01)
    (hedge,) = stage.asked("b")
    stage.answer("a", *late)
    assert torch.equal(stage.sums[0][1], wanted(CALL))
    stage.asked("b")
    assert stage.cancelled == [("b", hedge.call)]
    assert stage.client.counters.hedge_wins == 0
    assert set(stage.outstanding.values()) == {0}


def test_pairs_that_a_hedge_splits_over_two_nodes_are_taken_once_each() -> None:
    stage = stage_of(a=ALL, b=(0, 1), c=(2, 3))
    stage.client.nodes[1].outstanding_rows = stage.client.nodes[2].outstanding_rows = 1000
    stage.start(CALL)
    late = stage.asked("a")
    assert pairs_of(late) == CALL.experts.numel(), "the others are busy"
    stage.client.nodes[1].outstanding_rows = stage.client.nodes[2].outstanding_rows = 0
    stage.pass_time(CEILING_S + 0.01)
    to_b, to_c = stage.asked("b"), stage.asked("c")
    assert pairs_of(to_b) + pairs_of(to_c) == CALL.experts.numel()
    stage.answer("b", *to_b)
    assert stage.sums == [], "the node that was asked first may still give the rest"
    stage.answer("a", *late)
    assert torch.equal(stage.sums[0][1], wanted(CALL))
    stage.answer("c", *to_c)
    assert len(stage.sums) == 1
    assert stage.client.counters.late_answers == 1


def test_after_a_lost_hedge_new_calls_go_elsewhere_until_the_node_speaks() -> None:
    stage = stage_of(a=ALL, b=ALL)
    stage.start(CALL)
    late = stage.asked("a")
    stage.answer("b", *stage.asked("b"))
    stage.pass_time(CEILING_S + 0.01)
    stage.answer("b", *stage.asked("b"))
    stage.start(CALL, "second")
    assert stage.asked("a") == []
    stage.answer("b", *stage.asked("b"))
    stage.answer("a", *late)
    stage.start(CALL, "third")
    assert pairs_of(stage.asked("a")) > 0


def test_one_call_stays_with_a_silent_node_so_that_its_answer_tells_that_it_is_back() -> None:
    stage = stage_of(a=ALL, b=ALL)
    for name in ("one", "two", "three"):
        stage.start(CALL, name)
    late = stage.asked("a")
    assert len(late) == 3
    stage.answer("b", *stage.asked("b"))
    stage.pass_time(CEILING_S + 0.01)
    stage.answer("b", *stage.asked("b"))
    assert len(stage.sums) == 3
    stage.asked("a")
    taken_back = [call for node, call in stage.cancelled if node == "a"]
    (kept,) = [message for message in late if message.call not in taken_back]
    assert stage.client.counters.suspicions == 1
    stage.answer("a", answer_to(kept))
    stage.start(CALL, "four")
    assert pairs_of(stage.asked("a")) > 0


def test_a_call_that_stayed_with_a_silent_node_and_whose_time_is_up_is_followed_by_another_one() -> None:
    """The node may have dropped it without a word."""
    stage = stage_of(a=ALL, b=ALL)
    for name, within_s in (("one", 1.0), ("two", 10.0)):
        stage.start(CALL, name, within_s)
        assert stage.asked("a")
        stage.answer("b", *stage.asked("b"))
        stage.pass_time(CEILING_S + 0.01)
        stage.answer("b", *stage.asked("b"))
        assert len(stage.sums) == (1 if name == "one" else 2)
        assert stage.asked("a") == []
        assert stage.cancelled == [], "its answer would tell that the node is back"
        stage.pass_time(DOUBT_LAPSES_S)


def test_a_node_that_is_suspect_loses_all_that_it_owes_at_once_and_beyond_the_budget() -> None:
    stage = stage_of(a=ALL, b=ALL)
    num_calls = int(HEDGE_BURST) + 6
    for number in range(num_calls):
        stage.start(CALL, f"call {number}")
    stage.asked("a")
    stage.answer("b", *stage.asked("b"))
    stage.pass_time(CEILING_S + 0.02)
    first = stage.asked("b")
    assert len(first) == HEDGE_BURST, "until then it may be a general slowdown"
    stage.answer("b", *first)
    stage.answer("b", *stage.asked("b"))
    assert len(stage.sums) == num_calls
    assert all(torch.equal(total, wanted(CALL)) for _, total in stage.sums)


def test_a_node_that_is_silent_while_others_answer_is_found_without_a_budget_for_hedges() -> None:
    stage = stage_of(a=ALL, b=ALL)
    while stage.client._in_flight.budget.spend():
        pass
    stage.start(CALL)
    stage.asked("a")
    stage.pass_time(0.05)
    stage.answer("b", *stage.asked("b"))
    stage.pass_time(LONGEST_SILENCE_S)
    stage.answer("b", *stage.asked("b"))
    assert torch.equal(stage.sums[0][1], wanted(CALL))
    assert stage.client.counters.suspicions == 1


def suspect_without_a_copy() -> tuple[Stage, str, list[str]]:
    """A call lies at a node that hangs while nobody else takes messages; its name, and those of the others."""
    stage = stage_of(a=ALL, b=ALL, c=ALL)
    stage.start(CALL)
    asked = {name: stage.asked(name) for name in "abc"}
    hanging = next(name for name in "abc" if asked[name])
    others = [name for name in "abc" if name != hanging]
    for name in others:
        stage.answer(name, *asked[name])
        stage.socket(name).takes_messages = False
    stage.now_s += 0.01
    stage.poll()
    for node in stage.client.nodes:
        node.heard_s = stage.now_s if node.node_id != hanging else 0.0
    stage.pass_time(LONGEST_SILENCE_S)
    assert stage.client.counters.suspicions == 1
    assert stage.client.counters.hedged == 0
    return stage, hanging, others


def test_a_suspect_that_could_not_be_hedged_at_once_is_hedged_when_a_copy_can_be_asked() -> None:
    stage, _, others = suspect_without_a_copy()
    stage.pass_time(2.0)
    stage.socket(others[0]).takes_messages = True
    stage.pass_time(CEILING_S + 0.02)
    stage.answer(others[0], *stage.asked(others[0]))
    assert torch.equal(stage.sums[0][1], wanted(CALL))


def test_a_copy_in_doubt_is_asked_instead_of_a_suspect_where_there_is_no_other() -> None:
    stage, hanging, others = suspect_without_a_copy()
    for node in stage.client.nodes:
        if node.node_id != hanging:
            stage.client._in_flight.outliers.lost(node.number, stage.now_s)
            stage.socket(node.node_id).takes_messages = True
    stage.pass_time(0.05)
    for name in others:
        stage.answer(name, *stage.asked(name))
    assert torch.equal(stage.sums[0][1], wanted(CALL))


def test_a_copy_that_refused_is_asked_again_where_the_other_one_hangs() -> None:
    stage = stage_of(a=ALL, b=ALL)
    stage.start(CALL)
    stage.asked("a")
    for _ in range(2):  # at the second time the hedge of what lies at a
        stage.answer("b", *map(refusal, stage.asked("b")))
        stage.pass_time(CEILING_S + 0.01)
    stage.pass_time(LONGEST_PAUSE_S)
    stage.answer("b", *stage.asked("b"))
    assert torch.equal(stage.sums[0][1], wanted(CALL))


def test_a_suspect_that_alone_holds_a_shard_is_asked_all_the_same() -> None:
    stage = stage_of(a=ALL, b=(0, 1))
    stage.start(make_call([[0, 1]]))
    stage.asked("a")
    stage.asked("b")
    stage.client._in_flight.outliers.silent(0, stage.now_s)
    stage.start(make_call([[2, 3]]), "only a")
    assert pairs_of(stage.asked("a")) == 2


def test_a_hedge_that_is_lost_with_its_node_is_asked_of_a_third_one() -> None:
    stage = stage_of(a=ALL, b=ALL, c=ALL)
    stage.start(make_call([[0]]))
    first = next(name for name in "abc" if stage.asked(name))
    others = [name for name in "abc" if name != first]
    stage.pass_time(CEILING_S + 0.01)
    second = next(name for name in others if stage.asked(name))
    (third,) = [name for name in others if name != second]
    stage.link(second, LinkEvent.CLOSED)
    stage.pass_time(CEILING_S + 0.01)
    stage.answer(third, *stage.asked(third))
    assert torch.equal(stage.sums[0][1], wanted(make_call([[0]])))


@pytest.mark.parametrize("end", ["refuses", "is lost"])
def test_what_a_suspect_owes_is_asked_of_a_third_node_at_once_where_the_second_one_refuses_or_is_lost(end: str) -> None:
    stage = stage_of(a=ALL, b=ALL, c=ALL)
    call = make_call([[0]])
    stage.start(call)
    first = next(name for name in "abc" if stage.asked(name))
    number = next(node.number for node in stage.client.nodes if node.node_id == first)
    stage.client._in_flight.outliers.silent(number, stage.now_s)
    stage.pass_time(CEILING_S + 0.01)
    hedges = {name: stage.asked(name) for name in "abc" if name != first}
    second = next(name for name, messages in hedges.items() if messages)
    (third,) = hedges.keys() - {second}
    if end == "refuses":
        stage.answer(second, *map(refusal, hedges[second]))
    else:
        stage.link(second, LinkEvent.CLOSED)
    stage.pass_time(2 * LOOK_AGAIN_S)
    stage.answer(third, *stage.asked(third))
    assert torch.equal(stage.sums[0][1], wanted(call)), "the suspect stays one for five seconds"


def test_a_stage_that_was_stopped_itself_first_reads_what_has_come() -> None:
    stage = stage_of(a=ALL, b=ALL)
    stage.start(CALL)
    waiting = stage.asked("a"), stage.asked("b")
    stage.now_s += 3.0
    stage.poll()
    assert stage.client.counters.hedged == 0
    stage.answer("a", *waiting[0])
    stage.answer("b", *waiting[1])
    assert len(stage.sums) == 1


def test_partial_sums_are_taken_whole_or_not_at_all() -> None:
    stage = Stage(combine="partial")
    stage.place({"a": ALL, "b": (0, 1), "c": (2, 3)})
    stage.client.nodes[1].outstanding_rows = stage.client.nodes[2].outstanding_rows = 1000
    stage.start(CALL)
    late = stage.asked("a")
    stage.client.nodes[1].outstanding_rows = stage.client.nodes[2].outstanding_rows = 0
    stage.pass_time(CEILING_S + 0.01)
    stage.answer("b", *stage.asked("b"))
    stage.answer("a", *late)
    assert stage.sums == []
    assert stage.client.counters.late_answers == 1
    stage.answer("c", *stage.asked("c"))
    assert torch.allclose(stage.sums[0][1], wanted(CALL))


# ---- without a copy


def test_without_a_copy_a_call_goes_on_without_the_expert_if_the_operator_wants_that() -> None:
    stage = stage_of(a=(0, 1, 2))
    stage.client.degrade_after_s = 0.5
    stage.start(CALL)
    stage.answer("a", *stage.asked("a"))
    stage.pass_time(0.45)
    assert stage.sums == []
    stage.pass_time(0.1)
    ((_, total),) = stage.sums
    assert stage.degraded == [1, 3], "the tokens that wanted expert 3"
    assert stage.client.counters.degraded_rows == 2
    expected = wanted(CALL)
    assert torch.equal(total[[0, 2]], expected[[0, 2]]), "the others are what they are without the loss"
    for token, choice in ((1, 0), (3, 1)):
        weight = CALL.weights[token].sum()
        row = CALL.hidden[token] * (1.0 + CALL.experts[token, choice])
        assert torch.allclose(total[token], weight * row, rtol=1e-6)


def test_a_copy_that_comes_in_time_keeps_the_answer_whole() -> None:
    stage = stage_of(a=(0, 1, 2))
    stage.client.degrade_after_s = 0.5
    stage.start(CALL)
    stage.pass_time(0.4)
    stage.place({"a": ALL})
    stage.answer_all()
    stage.pass_time(1.0)
    assert torch.equal(stage.sums[0][1], wanted(CALL))
    assert stage.degraded == []


def test_a_token_without_any_expert_left_gets_nothing_from_them() -> None:
    stage = stage_of(a=(0, 1))
    stage.client.degrade_after_s = 0.2
    stage.start(make_call([[2, 3], [0, 1]]))
    stage.answer("a", *stage.asked("a"))
    stage.pass_time(0.3)
    total = stage.sums[0][1]
    assert torch.equal(total[0], torch.zeros_like(total[0]))
    assert torch.equal(total[1], wanted(make_call([[2, 3], [0, 1]]))[1])


@pytest.mark.parametrize("combine", ["exact", "partial"])
def test_unless_told_so_no_expert_is_left_out(combine: str) -> None:
    stage = Stage(combine)
    stage.place({"a": (0, 1, 2)})
    stage.start(CALL)
    stage.pass_time(5.0)
    assert stage.sums == []
