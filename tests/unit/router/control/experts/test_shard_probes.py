"""Nodes that hold the same shard answer the probe alike, or one of them is asked for nothing."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import CheckpointError, ProtocolError
from common.ids import NodeId
from common.messages import NO_ARRAY, AssignShards, Failed, ShardsReady, TensorFrame
from common.wire.array import array_to_frame
from services.router.control.actions import Action, Tell
from services.router.control.experts.shard_probes import TOLERANCE, Disagreement, ShardProbes
from tests.support.router.expert_shards import ALL, PromptRoles, expert, published, roles_of, told
from tests.support.router.mesh_shapes import EXPERTS, LAYERS

A, B, C, D = (NodeId(name) for name in "abcd")


def answers(*digests: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(digests, dtype=np.int32)


def along(*projections: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.array(projections, dtype=np.float32)


def probes() -> ShardProbes:
    return ShardProbes((1, 3, 1))


def test_nodes_of_one_class_must_agree_to_the_bit() -> None:
    known = probes()
    assert known.judge(A, "amd", answers(5, 6, 7), along(0.1, 0.2, 0.3)) == []
    assert known.judge(B, "amd", answers(5, 6, 7), along(0.1, 0.2, 0.3)) == []
    assert known.judge(C, "amd", answers(5, 9, 8), along(0.1, 0.2, 0.3)) == [Disagreement(C, A, 1, 2, True)]


def test_what_only_one_of_them_holds_is_not_compared() -> None:
    known = probes()
    assert known.judge(A, "amd", answers(5, 0, 7), along(0.1, 0.0, 0.3)) == []
    assert known.judge(B, "amd", answers(0, 6, 7), along(0.0, 0.2, 0.3)) == []


def test_nodes_of_other_classes_must_agree_nearly() -> None:
    known = probes()
    known.judge(A, "amd", answers(5, 6, 7), along(0.1, 0.2, 0.3))
    assert known.judge(B, "intel", answers(1, 2, 3), along(0.1 + TOLERANCE / 2, 0.2, 0.3)) == []
    assert known.judge(C, "arm", answers(1, 2, 3), along(0.1, 0.2, -0.9)) == [Disagreement(C, A, 2, 1, False)]
    assert known.judge(C, "arm", answers(1, 2, 3), along(0.1, 0.2, float("nan"))) != []


def test_who_has_more_others_on_its_side_is_believed() -> None:
    known = probes()
    known.judge(A, "amd", answers(5, 0, 0), along(0.1, 0.0, 0.0))
    assert known.judge(B, "amd", answers(9, 0, 0), along(0.7, 0.0, 0.0)) == [Disagreement(B, A, 0, 1, True)]
    # Two that were placed side by side with it say the same as B: now A stands alone.
    known = probes()
    known.judge(A, "amd", answers(5, 0, 0), along(0.1, 0.0, 0.0))
    known.judge(B, "intel", answers(1, 0, 0), along(0.17, 0.0, 0.0))
    known.judge(C, "intel", answers(1, 0, 0), along(0.17, 0.0, 0.0))
    assert known.judge(D, "amd", answers(9, 0, 0), along(0.2, 0.0, 0.0)) == [Disagreement(A, D, 0, 1, True)]


def test_of_three_that_start_together_two_outvote_a_wrong_one_that_was_the_first() -> None:
    known = probes()
    assert known.judge(A, "amd", answers(9, 9, 9), along(0.9, 0.9, 0.9)) == []
    assert known.judge(B, "amd", answers(5, 6, 7), along(0.1, 0.2, 0.3)) == [Disagreement(B, A, 0, 3, True)]
    assert known.judge(C, "amd", answers(5, 6, 7), along(0.1, 0.2, 0.3)) == [Disagreement(A, C, 0, 3, True)]
    known.forget(A)
    known.forget(B)
    assert known.judge(D, "amd", answers(5, 6, 7), along(0.1, 0.2, 0.3)) == []


def test_all_who_are_found_wrong_by_one_report_are_refused_and_not_the_first_of_them_alone() -> None:
    known, (e,) = probes(), (NodeId("e"),)
    for wrong in (A, B):
        known.judge(wrong, "amd", answers(9, 9, 9), along(0.9, 0.9, 0.9))
    for early in (C, D):
        right = answers(5, 6, 7), along(0.1, 0.2, 0.3)
        assert known.judge(early, "amd", *right) == [Disagreement(early, A, 0, 3, True)], "as many say otherwise"
    assert known.judge(e, "amd", *right) == [Disagreement(A, e, 0, 3, True), Disagreement(B, e, 0, 3, True)]


def test_who_was_found_wrong_contradicts_nobody_and_is_found_wrong_again() -> None:
    known = probes()
    known.judge(A, "amd", answers(5, 0, 0), along(0.1, 0.0, 0.0))
    assert known.judge(B, "amd", answers(9, 8, 0), along(0.7, 0.4, 0.0)) == [Disagreement(B, A, 0, 1, True)]
    assert known.judge(C, "amd", answers(0, 6, 0), along(0.0, 0.2, 0.0)) == [], "B says something else"
    assert known.judge(B, "amd", answers(9, 8, 0), along(0.7, 0.4, 0.0)) == [Disagreement(B, A, 0, 1, True)]


def test_a_node_that_is_gone_contradicts_nobody() -> None:
    known = probes()
    known.judge(A, "amd", answers(5, 6, 7), along(0.1, 0.2, 0.3))
    known.forget(A)
    assert known.judge(B, "amd", answers(1, 2, 3), along(0.9, 0.2, 0.3)) == []


# ---- in the roles


def report(version: int, digest: int = 1, number: int = 1) -> ShardsReady:
    shape = (LAYERS, EXPERTS, 1)
    digests, projections = np.full(shape, digest, dtype=np.int32), np.full(shape, digest / 100, dtype=np.float32)
    frames = array_to_frame(digests), array_to_frame(projections)
    return ShardsReady(version, True, array_to_frame(np.ones(shape, dtype=np.uint8)), number, *frames)


def refusals(actions: list[Action]) -> dict[str, Failed]:
    tells = [action for action in actions if isinstance(action, Tell)]
    return {tell.node_id: tell.message for tell in tells if isinstance(tell.message, Failed)}


def with_newcomer() -> PromptRoles:
    roles = roles_of(num_expected=1)
    roles.join(expert("a", fingerprint="one"), 0.0)
    assert roles.state.read_report(A, report(roles.versions[A])) == []
    roles.tick(1.0)
    assert told(roles.join(expert("b", fingerprint="two"), 2.0)) == {"b": ALL}
    return roles


def test_a_newcomer_whose_answers_differ_is_told_so_and_never_published() -> None:
    roles = with_newcomer()
    refused = refusals(roles.state.read_report(B, report(roles.versions[B], digest=2)))
    assert set(refused) == {B}
    assert refused[B].code == CheckpointError.code
    for part in ("b answers the probe of 12 expert shards", "otherwise than a", "two and one", "checkpoints differ"):
        assert part in refused[B].message
    for now_s in (3.0, 4.0):
        roles.tick(now_s)
        assert published(roles) == {shard: ["a"] for shard in ALL}
    roles.lose(B, 5.0)
    assert roles.is_served


def test_a_node_that_its_refusal_did_not_reach_is_asked_and_told_once_more() -> None:
    roles = with_newcomer()
    roles.state.read_report(B, report(roles.versions[B], digest=2, number=1))
    heard = roles.state.told(B)
    assert heard is not None
    assert heard[1] == 0, "its heartbeats speak of a report more than counts"
    (again,) = roles.state.assign_again(B)
    assert isinstance(again, Tell)
    assert isinstance(again.message, AssignShards)
    assert set(refusals(roles.state.read_report(B, report(roles.versions[B], digest=2, number=2)))) == {B}


def test_one_that_turns_out_wrong_later_is_asked_once_more_too() -> None:
    roles = with_newcomer()
    roles.state.read_report(B, report(roles.versions[B]))
    roles.join(expert("c"), 3.0)
    assert roles.state.told(A) is not None
    assert set(refusals(roles.state.read_report(A, report(roles.versions[A], digest=2, number=2)))) == {A}
    heard = roles.state.told(A)
    assert heard is not None
    assert heard[1] < 2


def test_a_newcomer_that_answers_alike_is_published() -> None:
    roles = with_newcomer()
    assert roles.state.read_report(B, report(roles.versions[B])) == []
    roles.tick(3.0)
    assert {len(owners) for owners in published(roles).values()} == {2}


@pytest.mark.parametrize("frame", [array_to_frame(np.zeros((1, 2, 3), dtype=np.int32)), NO_ARRAY])
def test_answers_of_another_shape_or_none_are_refused_by_the_field(frame: TensorFrame) -> None:
    roles = with_newcomer()
    good = report(roles.versions[B])
    bad = ShardsReady(good.version, True, good.shards, 1, frame, good.projections)
    with pytest.raises(ProtocolError, match=r"ShardsReady\.digests"):
        roles.state.read_report(B, bad)
    assert not any(isinstance(action, AssignShards) for action in roles.tick(3.0))
