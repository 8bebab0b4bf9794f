"""Which steps nobody has, by plain numbers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import pytest

from common.ids import NodeId, PipelineId
from services.router.control.lost_steps import UNHELD_S, LostSteps
from services.router.control.membership import NodeState
from services.router.control.readiness import Awaited, MeshEvidence, NodeEvidence, PipelineEvidence

SENT_S, P0 = 100.0, PipelineId(0)
A, B = NodeId("a"), NodeId("b")
NONE: Collection[PipelineId] = ()


def evidence(
    now_s: float, *, sent_s: float = SENT_S, idle_since_s: float | None = SENT_S - 5, explained_s: float = 1.5
) -> MeshEvidence:
    """Two stages that have been idle, by heartbeats up to now, and one step."""
    node = NodeEvidence(NodeState.ALIVE, now_s, SENT_S - 5, idle_since_s)
    step = Awaited(sent_s, explained_s, is_measured=True)
    return MeshEvidence(
        nodes={A: node, B: node},
        pipelines=(PipelineEvidence(P0, (A, B), step, None, None, SENT_S),),
        stages_detail="",
        is_served=True,
        shards={},
        num_shards=0,
        experts_detail="",
    )


def with_node(seen: MeshEvidence, name: NodeId, **changes: float | None) -> MeshEvidence:
    return replace(seen, nodes={**seen.nodes, name: replace(seen.nodes[name], **changes)})  # type: ignore[arg-type]


def test_a_late_step_that_no_stage_has_is_lost_and_not_before_it_is_late() -> None:
    assert LostSteps().look(evidence(SENT_S + 1.4), NONE, SENT_S + 1.4) == []
    assert LostSteps().look(evidence(SENT_S + 1.6), NONE, SENT_S + 1.6) == [P0]
    slow = evidence(SENT_S + 20, explained_s=30.0)
    assert LostSteps().look(slow, NONE, SENT_S + 20) == [], "such steps have been taking so long"


@pytest.mark.parametrize(
    "changes",
    [
        {"idle_since_s": None},
        {"idle_since_s": SENT_S + 1.6 - UNHELD_S / 2},
        {"heard_s": SENT_S + 0.5},
    ],
)
def test_a_stage_that_has_work_has_just_had_some_or_says_nothing_may_have_the_step(
    changes: dict[str, float | None],
) -> None:
    now_s = SENT_S + 1.6
    for name in (A, B):
        assert LostSteps().look(with_node(evidence(now_s), name, **changes), NONE, now_s) == []


def test_what_was_idle_before_the_step_was_sent_says_nothing_of_it() -> None:
    """A stage is idle until the step comes: only heartbeats after it was sent count."""
    now_s = SENT_S + 1.6
    seen = with_node(evidence(now_s), B, heard_s=SENT_S + UNHELD_S - 0.1)
    assert LostSteps().look(seen, NONE, now_s) == []


def test_a_step_that_the_router_still_has_is_not_lost() -> None:
    now_s = SENT_S + 5
    assert LostSteps().look(evidence(now_s), {P0}, now_s) == []


def test_a_canary_can_be_lost_too() -> None:
    now_s = SENT_S + 1.6
    (pipeline,) = evidence(now_s).pipelines
    seen = replace(evidence(now_s), pipelines=(replace(pipeline, step=None, canary_sent_s=SENT_S),))
    assert LostSteps().look(seen, NONE, now_s) == [P0]


def test_each_renewal_without_an_answer_doubles_the_time_and_an_answer_ends_that() -> None:
    lost, sent_s, patience = LostSteps(), SENT_S, []
    for _ in range(4):
        now_s = sent_s
        while not lost.look(evidence(now_s, sent_s=sent_s), NONE, now_s):
            now_s += 0.1
        patience.append(round(now_s - sent_s, 1))
        sent_s = now_s + 0.1
    assert patience == [1.6, 3.1, 6.1, 12.1]
    assert lost.look(evidence(sent_s + 0.1, sent_s=sent_s), NONE, sent_s + 0.1) == []
    answered_s = sent_s + 1.0  # a later step is awaited now: that one came back
    assert lost.look(evidence(answered_s + 1.6, sent_s=answered_s), NONE, answered_s + 1.6) == [P0]


def test_without_a_step_in_flight_nothing_is_lost() -> None:
    (pipeline,) = evidence(SENT_S + 9).pipelines
    seen = replace(evidence(SENT_S + 9), pipelines=(replace(pipeline, step=None),))
    assert LostSteps().look(seen, NONE, SENT_S + 9) == []
