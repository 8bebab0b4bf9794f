"""A pipeline too many serves on for a while; then its nodes are the spares that the rule wants."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.ids import Generation, NodeId, PipelineId
from common.messages import AssignMirror, Unassign
from services.router.control.actions import ClosePipeline, Tell
from services.router.control.adoption import HeldCache, HeldSequence
from services.router.control.stage_roles import GIVE_UP_S, Pipeline, StageRoles
from tests.support.router.mesh_shapes import node
from tests.support.router.stage_reports import mirror_of, opened, report, roles_of

A, B = NodeId("a"), NodeId("b")
HELD = HeldCache({7: HeldSequence((1,), 4)}, (), {0: 50, 1: 50})


def two_pipelines_and_two_mirrors() -> StageRoles:
    roles = roles_of(spares=2)
    opened(roles, *"abcdef")
    assert roles.num_open == 2
    return roles


def test_the_wait_begins_with_the_first_question_and_anew_after_every_break() -> None:
    roles = two_pipelines_and_two_mirrors()
    assert roles.tick(1000.0) == []
    roles.lose(NodeId("e"))
    assert roles.tick(1000.0) == []
    assert roles.tick(1000.0 + GIVE_UP_S - 0.1) == []
    roles.join(node("g"))
    for name in "fg":
        roles.lose(NodeId(name))
    assert roles.tick(1000.0 + GIVE_UP_S + 1) == []
    assert any(isinstance(action, ClosePipeline) for action in roles.tick(1001.0 + 2 * GIVE_UP_S))


def test_a_pipeline_too_many_is_given_up_for_its_spares_when_they_do_not_come_back() -> None:
    roles = two_pipelines_and_two_mirrors()
    assert not roles.waits
    for name in "ef":
        assert roles.lose(NodeId(name)) == []
    assert (roles.num_open, roles.waits) == (2, True)
    assert roles.tick(1.0) == []
    assert roles.tick(GIVE_UP_S) == []
    actions = roles.tick(1.0 + GIVE_UP_S)
    assert [action for action in actions if isinstance(action, ClosePipeline)] == [ClosePipeline(PipelineId(1))]
    unassigned = [a.node_id for a in actions if isinstance(a, Tell) and isinstance(a.message, Unassign)]
    assert sorted(unassigned) == ["c", "d"]
    mirrors = [a.node_id for a in actions if isinstance(a, Tell) and isinstance(a.message, AssignMirror)]
    assert sorted(mirrors) == ["c", "d"]
    assert (roles.num_open, roles.waits) == (1, False)


def test_spares_that_come_back_in_time_leave_all_as_it_was() -> None:
    roles = two_pipelines_and_two_mirrors()
    roles.lose(NodeId("e"))
    roles.tick(1.0)
    roles.join(node("g"))
    assert not roles.waits
    assert roles.tick(2.0 + GIVE_UP_S) == []
    assert roles.num_open == 2


def test_nothing_is_given_up_while_another_pipeline_recovers() -> None:
    roles = two_pipelines_and_two_mirrors()
    for name in "ef":
        roles.lose(NodeId(name))
    roles.tick(1.0)
    roles.lose(NodeId("a"))
    actions = roles.join(node("g"))
    assert roles.tick(2.0 + GIVE_UP_S) == [], "pipeline 0 is about to open: its requests would have moved for nothing"
    report(roles, actions)
    assert roles.num_open == 2
    assert any(isinstance(action, ClosePipeline) for action in roles.tick(3.0 + GIVE_UP_S))


def test_a_pipeline_with_a_hole_is_given_up_before_an_open_one() -> None:
    roles = two_pipelines_and_two_mirrors()
    for name in "efa":
        roles.lose(NodeId(name))
    assert (roles.num_open, roles.waits) == (1, True)
    roles.tick(1.0)
    actions = roles.tick(1.0 + GIVE_UP_S)
    assert roles.pipelines.keys() == {1}, "the one that is open stays"
    assert {name: message.pipeline for name, message in mirror_of(actions).items()} == {"b": 1}
    assert (roles.num_open, roles.waits) == (1, False)


@pytest.mark.parametrize(
    ("pipeline", "sequence_id", "has_all"),
    [
        (Pipeline(Generation(1), (A, B), 32, held=HELD), 7, True),
        (Pipeline(Generation(1), (A, B), 32, held=HELD), 8, False),
        (Pipeline(Generation(1), (A, B), 32, held=replace(HELD, last_steps={0: 50})), 7, False),
        (Pipeline(Generation(1), (A, None), 32, held=HELD), 7, False),
        (Pipeline(Generation(1), (A, B), 32), 7, False),
    ],
    ids=["whole", "another sequence", "a slot did not report", "a reporter is gone", "nothing held"],
)
def test_a_sequence_is_worth_waiting_for_where_everybody_who_reported_it_is_there(
    pipeline: Pipeline, sequence_id: int, has_all: bool
) -> None:
    assert pipeline.has_all_of(sequence_id) is has_all
