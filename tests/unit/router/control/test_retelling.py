"""When a node that believes something else is told again: not while a message is on its way, and ever less often."""

from __future__ import annotations

from itertools import pairwise

from common.ids import NodeId
from services.router.control.actions import Action, SuspendPipeline
from services.router.control.retelling import MAX_PATIENCE_S, PATIENCE_S, Misbelief, Retelling, Topic

A, B = NodeId("a"), NodeId("b")
ACTION: list[Action] = [SuspendPipeline(0)]  # type: ignore[arg-type]


def role(wanted: int) -> Misbelief:
    return Misbelief(Topic.ROLE, (wanted,), lambda: ACTION)


def told_at(retelling: Retelling, until_s: float, step_s: float = 0.25) -> list[float]:
    """Heartbeats that go on disagreeing."""
    times = [number * step_s for number in range(int(until_s / step_s))]
    return [now_s for now_s in times if retelling.due(A, [role(7)], now_s)]


def test_what_has_differed_for_longer_than_a_message_takes_is_told_again() -> None:
    retelling = Retelling()
    assert retelling.due(A, [role(7)], 0.0) == {}
    assert retelling.due(A, [role(7)], PATIENCE_S - 0.01) == {}
    assert retelling.due(A, [role(7)], PATIENCE_S) == {Topic.ROLE: ACTION}


def test_it_is_told_less_and_less_often_and_never_given_up() -> None:
    times = told_at(Retelling(), 30.0)
    gaps = [after - before for before, after in pairwise(times)]
    assert gaps == sorted(gaps)
    assert times[0] == 0.5
    assert MAX_PATIENCE_S <= gaps[-1] <= MAX_PATIENCE_S + 0.25


def test_something_else_that_is_wanted_is_on_its_way_first() -> None:
    retelling = Retelling()
    retelling.due(A, [role(7)], 0.0)
    assert retelling.due(A, [role(8)], PATIENCE_S) == {}
    assert retelling.due(A, [role(8)], 2 * PATIENCE_S) == {Topic.ROLE: ACTION}


def test_one_that_has_agreed_in_between_is_waited_for_anew() -> None:
    retelling = Retelling()
    retelling.due(A, [role(7)], 0.0)
    retelling.due(A, [], 0.1)
    assert retelling.due(A, [role(7)], PATIENCE_S) == {}


def test_nodes_and_topics_are_told_apart() -> None:
    retelling = Retelling()
    feed = Misbelief(Topic.FEED, (7,), lambda: [])
    retelling.due(A, [role(7)], 0.0)
    retelling.due(B, [role(7)], 0.3)
    assert retelling.due(B, [role(7)], PATIENCE_S) == {}
    assert retelling.due(A, [role(7), feed], PATIENCE_S) == {Topic.ROLE: ACTION}


def test_nothing_is_made_that_is_not_told() -> None:
    made: list[int] = []

    def make() -> list[Action]:
        made.append(1)
        return ACTION

    retelling, costly = Retelling(), Misbelief(Topic.PLACEMENT, (1,), make)
    for now_s in (0.0, 0.1, PATIENCE_S, PATIENCE_S + 0.1):
        retelling.due(A, [costly], now_s)
    assert made == [1]


def test_a_node_that_is_gone_leaves_nothing_behind() -> None:
    retelling = Retelling()
    retelling.due(A, [role(7)], 0.0)
    retelling.forget(A)
    retelling.forget(B)
    assert retelling.due(A, [role(7)], PATIENCE_S) == {}
