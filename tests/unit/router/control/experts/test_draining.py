"""When an expert node that wants to stop may go."""

from __future__ import annotations

from common.ids import NodeId
from services.router.control.experts.draining import DRAIN_DEADLINE_S, DRAIN_QUIET_S, Draining

A, B = NodeId("a"), NodeId("b")


def draining(*nodes: NodeId, since_s: float = 10.0) -> Draining:
    made = Draining()
    for node_id in nodes:
        made.begin(node_id, since_s)
    return made


def test_it_stays_as_long_as_it_is_asked_and_goes_a_moment_after() -> None:
    leaving = draining(A)
    assert leaving.may_go({A, B}, False, 11.0) == []
    assert leaving.may_go({B}, False, 12.0) == [], "its last calls are under way"
    assert leaving.may_go({B}, False, 12.0 + DRAIN_QUIET_S) == [A]


def test_one_that_is_asked_again_waits_again() -> None:
    leaving = draining(A)
    leaving.may_go(set(), False, 11.0)
    assert leaving.may_go({A}, False, 11.1) == []
    assert leaving.may_go(set(), False, 11.0 + DRAIN_QUIET_S) == []


def test_where_nobody_can_take_over_nothing_is_waited_for() -> None:
    assert draining(A, B).may_go({A, B}, True, 10.0) == [A, B]


def test_the_wait_has_an_end_and_asking_again_does_not_move_it() -> None:
    leaving = draining(A)
    leaving.begin(A, 10.0 + DRAIN_DEADLINE_S / 2)
    assert leaving.may_go({A}, False, 10.0 + 0.99 * DRAIN_DEADLINE_S) == []
    assert leaving.may_go({A}, False, 10.0 + DRAIN_DEADLINE_S) == [A]


def test_one_that_is_gone_is_not_named_again() -> None:
    leaving = draining(A)
    leaving.end(A)
    assert A not in leaving
    assert leaving.may_go(set(), True, 99.0) == []
