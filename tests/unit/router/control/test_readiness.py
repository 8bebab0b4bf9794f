"""What /ready says, by plain numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.ids import NodeId, PipelineId
from common.messages import StageHeartbeat
from services.router.control.experts.shard_bits import pack
from services.router.control.membership import NodeState
from services.router.control.readiness import (
    CANARY_UNANSWERED_S,
    SILENT_S,
    STALE_S,
    Awaited,
    MeshEvidence,
    NodeEvidence,
    PipelineEvidence,
    ProgressWatch,
    accepts_requests,
    judge,
    judge_age,
)
from services.router.engine import Readiness

NOW_S = 1000.0
A, B, X, Y = (NodeId(name) for name in "abxy")
FRESH = NodeEvidence(NodeState.ALIVE, NOW_S, NOW_S - 60)
PIPELINE = PipelineEvidence(PipelineId(0), (A, B), None, None, None, NOW_S - 30)


def evidence(**changes: Any) -> MeshEvidence:
    """Two stages, two expert nodes that hold everything, and silence."""
    healthy = MeshEvidence(
        nodes=dict.fromkeys((A, B, X, Y), FRESH),
        pipelines=(PIPELINE,),
        stages_detail="2 stage nodes",
        is_served=True,
        shards=dict.fromkeys((X, Y), pack(np.array([True, True]))),
        num_shards=2,
        experts_detail="2 of 2 expert shards loaded",
    )
    return replace(healthy, **changes)


def with_node(seen: MeshEvidence, *names: NodeId, **changes: Any) -> MeshEvidence:
    changed = {name: replace(seen.nodes[name], **changes) for name in names}
    return replace(seen, nodes={**seen.nodes, **changed})


def with_pipeline(**changes: Any) -> MeshEvidence:
    return evidence(pipelines=(replace(PIPELINE, **changes),))


def test_a_healthy_mesh_is_ready_and_says_what_it_has() -> None:
    assert judge(evidence(), NOW_S) == Readiness(True, "1 pipelines; 2 of 2 expert shards loaded")


def test_all_that_is_missing_is_named() -> None:
    readiness = judge(evidence(is_served=False, experts_detail="1 of 2 expert shards loaded", pipelines=()), NOW_S)
    assert readiness.missing == ("1 of 2 expert shards loaded", "no pipeline is open (2 stage nodes)")
    assert readiness.detail == "; ".join(readiness.missing)


def test_one_copy_on_a_node_that_lives_is_enough() -> None:
    one_suspect = with_node(evidence(), X, state=NodeState.SUSPECT)
    assert judge(one_suspect, NOW_S).ready
    both = judge(with_node(evidence(), X, Y, state=NodeState.SUSPECT), NOW_S)
    assert both.missing == ("2 of 2 expert shards are only on nodes not answering: x, y",)
    split = replace(one_suspect, shards={X: pack(np.array([True, False])), Y: pack(np.array([False, True]))})
    assert judge(split, NOW_S).missing == ("1 of 2 expert shards are only on nodes not answering: x",)


def test_a_pipeline_with_a_suspect_stage_does_not_count() -> None:
    suspect = with_node(evidence(), B, state=NodeState.SUSPECT)
    assert judge(suspect, NOW_S).missing == ("pipeline 0: not answering: b",)
    other = replace(PIPELINE, pipeline=PipelineId(1), holders=(A,))
    assert judge(replace(suspect, pipelines=(PIPELINE, other)), NOW_S).ready, "another one can make tokens"


def test_a_pipeline_through_which_nothing_has_come_yet_does_not_count() -> None:
    """Its holders live and are reached; whether they reach each other only an answer shows."""
    seen = with_pipeline(has_answered=False)
    assert judge(seen, NOW_S).missing == ("pipeline 0: nothing has come through its links yet",)
    assert not accepts_requests(seen, NOW_S)


def test_a_holder_that_is_not_known_any_more_is_missing() -> None:
    nodes = {name: node for name, node in evidence().nodes.items() if name != A}
    assert judge(evidence(nodes=nodes), NOW_S).missing == ("pipeline 0: not answering: a",)


def overdue(ago_s: float, *, explained_s: float = 1.5, is_measured: bool = True) -> Awaited:
    return Awaited(NOW_S - ago_s, explained_s, is_measured)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("step", "pipeline 0: a step has been unanswered for 1.6 s"),
        ("token", "pipeline 0: a running request has had no token for 1.6 s"),
    ],
)
def test_what_has_not_come_is_a_hang_once_its_pace_explains_no_more(field: str, said: str) -> None:
    just = with_pipeline(**{field: overdue(1.5)})
    assert judge(just, NOW_S).ready
    assert judge(just, NOW_S + 0.1).missing == (said,)
    assert judge(with_pipeline(**{field: overdue(7.9, explained_s=8.0)}), NOW_S).ready


def test_an_unanswered_canary_without_progress_is_a_hang() -> None:
    just = with_pipeline(canary_sent_s=NOW_S - CANARY_UNANSWERED_S)
    assert judge(just, NOW_S).ready
    (said,) = judge(just, NOW_S + 0.1).missing
    assert said == "pipeline 0: a canary has been unanswered for 1.6 s"


@pytest.mark.parametrize("field", ["step", "token"])
def test_progress_of_stages_explains_silence_only_before_anything_has_been_measured(field: str) -> None:
    first = with_pipeline(**{field: overdue(20, is_measured=False)})
    assert not judge(first, NOW_S).ready
    assert judge(with_node(first, B, progressed_s=NOW_S - 1), NOW_S).ready
    assert not judge(with_node(first, X, progressed_s=NOW_S - 1), NOW_S).ready, "experts may work for another pipeline"
    later = with_pipeline(**{field: overdue(20)})
    assert not judge(with_node(later, B, progressed_s=NOW_S - 1), NOW_S).ready, "steps take a tenth of that here"


def test_a_request_that_is_stuck_is_a_no_although_another_pipeline_takes_new_ones() -> None:
    other = replace(PIPELINE, pipeline=PipelineId(1))
    seen = evidence(pipelines=(replace(PIPELINE, token=overdue(3)), other))
    assert judge(seen, NOW_S).missing == ("pipeline 0: a running request has had no token for 3.0 s",)
    assert accepts_requests(seen, NOW_S)
    assert not accepts_requests(evidence(pipelines=(replace(PIPELINE, token=overdue(3)),)), NOW_S)


@pytest.mark.parametrize("names", [(A,), (X, Y)], ids=["stage", "experts"])
def test_in_silence_a_node_without_heartbeats_hangs(names: tuple[NodeId, ...]) -> None:
    assert judge(with_node(evidence(), *names, heard_s=NOW_S - SILENT_S + 0.1), NOW_S).ready
    silent = with_node(evidence(), *names, heard_s=NOW_S - SILENT_S - 0.1)
    assert not judge(silent, NOW_S).ready
    (pipeline,) = silent.pipelines
    at_work = replace(silent, pipelines=(replace(pipeline, step=overdue(0.2)),))
    assert judge(at_work, NOW_S).ready, "under load a node may be too busy for heartbeats"
    just_done = replace(silent, pipelines=(replace(pipeline, last_work_s=NOW_S - 0.2),))
    assert judge(just_done, NOW_S).ready, "silence begins with the last work"


AWAITED = st.none() | st.builds(
    Awaited, st.floats(0, 30).map(lambda ago_s: NOW_S - ago_s), st.floats(1.5, 12), st.booleans()
)


@given(st.floats(0, 30), AWAITED, AWAITED, st.floats(0, 30) | st.none(), st.floats(0, 30))
def test_what_is_missing_stays_missing_until_something_is_heard(
    heard_ago_s: float, step: Awaited | None, token: Awaited | None, canary_ago_s: float | None, later_s: float
) -> None:
    seen = with_pipeline(step=step, token=token, canary_sent_s=None if canary_ago_s is None else NOW_S - canary_ago_s)
    seen = with_node(seen, A, B, X, Y, heard_s=NOW_S - heard_ago_s)
    if not judge(seen, NOW_S).ready:
        assert not judge(seen, NOW_S + later_s).ready


def test_the_first_look_is_awaited_and_an_old_one_believed_no_longer() -> None:
    ready, starting = Readiness(True, "1 pipelines"), Readiness(False, "starting")
    assert judge_age(starting, None, NOW_S) == starting
    assert judge_age(ready, NOW_S - STALE_S, NOW_S) == ready
    old = judge_age(ready, NOW_S - 2, NOW_S)
    assert (old.ready, old.missing) == (False, ("the mesh thread has been silent for 2.0 s",))


def test_progress_is_more_work_done_not_more_heartbeats() -> None:
    watch, beat = ProgressWatch(), StageHeartbeat(steps=5, rows=50)
    watch.join(A, 1.0)
    watch.note(A, beat, 2.0)
    watch.note(A, replace(beat, busy_seconds=9.0, resent=3), 3.0)
    assert watch.evidence(A, NodeState.ALIVE) == NodeEvidence(NodeState.ALIVE, 3.0, 2.0, 2.0)
    watch.note(A, replace(beat, queued=1), 4.0)
    assert watch.evidence(A, NodeState.ALIVE).idle_since_s is None
    for field in ("steps", "rows", "calls"):
        change: dict[str, Any] = {field: 99}
        beat = replace(beat, **change)
        watch.note(A, beat, 4.0)
        assert watch.evidence(A, NodeState.SUSPECT).progressed_s == 4.0
        watch.note(A, beat, 5.0)
        assert watch.evidence(A, NodeState.ALIVE).progressed_s == 4.0
        watch.join(A, 0.0)
        watch.note(A, beat, 0.5)
    watch.forget(A)
    watch.forget(A)
