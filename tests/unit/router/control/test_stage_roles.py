"""Slots, lease terms and generations, as nodes come and go in any order."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from common.ids import Generation, NodeId, PipelineId, SlotIndex
from common.messages import MirrorTo, StageReady, Unassign
from common.topology import NodeDescription, StageSlot
from services.router.control.actions import Action, ClosePipeline, OpenPipeline, SuspendPipeline, Tell
from services.router.control.mirror_roles import FILL_PATIENCE_S, RETRY_S
from services.router.control.stage_roles import StageRoles
from tests.support.router.mesh_shapes import LAYERS, node
from tests.support.router.stage_reports import (
    RESULTS,
    mirror_of,
    mirrored,
    mirrors_told,
    opened,
    ready,
    report,
    roles_of,
    told,
)


def test_a_pipeline_is_told_slot_by_slot_where_its_layers_and_its_neighbours_are() -> None:
    roles = roles_of()
    assert roles.join(node("a")) == []
    assert roles.detail == "1 of 2 stage nodes"
    assignments = told(roles.join(node("b")))
    first, last = assignments["a"][0], assignments["b"][0]
    assert (first.slot, first.num_slots, first.first_layer) == (0, 2, 0)
    assert first.stop_layer == last.first_layer
    assert last.stop_layer == LAYERS
    assert (first.downstream, first.downstream_ipc_token) == (("tcp://b:1",), "token of b")
    assert (last.downstream, last.downstream_ipc_token) == (RESULTS, "token of router")
    assert assignments["a"][1] == assignments["b"][1] > 0


def test_it_opens_with_the_last_of_its_slots_and_once() -> None:
    roles = roles_of()
    roles.join(node("a"))
    (a, generation), (b, _) = told(roles.join(node("b"))).values()
    assert roles.apply_ready(NodeId("b"), ready(b), generation) == []
    assert roles.apply_ready(NodeId("b"), ready(b), generation) == []
    (action,) = roles.apply_ready(NodeId("a"), ready(a), generation)
    assert action == OpenPipeline(PipelineId(0), Generation(generation), NodeId("a"), 32, 2, (7, 7))
    assert roles.apply_ready(NodeId("a"), ready(a), generation) == []
    assert roles.num_open == 1


def test_it_opens_with_tiers_of_one_size_that_have_what_the_one_begun_last_can_have() -> None:
    roles = roles_of(session_cache_bytes=1 << 20)
    roles.join(node("a"))
    (a, generation), (b, _) = told(roles.join(node("b"))).values()
    assert a.num_tier_slots == b.num_tier_slots > 0
    roles.apply_ready(NodeId("b"), replace(ready(b), tier_since=5), generation)
    (action,) = roles.apply_ready(NodeId("a"), replace(ready(a), tier_since=3), generation)
    assert isinstance(action, OpenPipeline)
    assert (action.num_tier_slots, action.tier_since) == (a.num_tier_slots, 5)
    for assigned, generation in told(roles.renew(PipelineId(0))).values():
        (*_, action) = [None, *roles.apply_ready(NodeId("ab"[assigned.slot]), ready(assigned), generation)]
    assert isinstance(action, OpenPipeline)
    assert action.tier_since == 0, "each generation is told anew"
    for assigned, generation in told(roles.renew(PipelineId(0))).values():
        said = replace(ready(assigned), num_tier_slots=3 if assigned.slot else assigned.num_tier_slots)
        (*_, action) = [None, *roles.apply_ready(NodeId("ab"[assigned.slot]), said, generation)]
    assert isinstance(action, OpenPipeline)
    assert action.num_tier_slots == 3, "one had no more memory"
    assert {assigned.num_tier_slots for assigned, _ in told(roles.renew(PipelineId(0))).values()} == {a.num_tier_slots}


def test_reports_of_another_generation_slot_or_node_change_nothing() -> None:
    roles = roles_of()
    roles.join(node("a"))
    (a, generation), (b, _) = told(roles.join(node("b"))).values()
    roles.apply_ready(NodeId("a"), ready(a), generation)
    for name, message, of in (
        ("b", b, generation - 1),
        ("b", b, generation + 1),
        ("a", b, generation),
        ("c", b, generation),
    ):
        assert roles.apply_ready(NodeId(name), ready(message), of) == []
    for pipeline, slot in ((0, 2), (0, 2**40), (1, 1)):
        assert roles.apply_ready(NodeId("b"), StageReady(pipeline, slot, 1), generation) == []
    assert roles.num_open == 0


def test_a_lost_holder_closes_its_pipeline_and_the_spare_takes_its_slot_alone() -> None:
    roles = roles_of(spares=1)
    opened(roles, "a", "b", "c")
    before = roles.pipelines[PipelineId(0)].generation
    actions = roles.lose(NodeId("a"))
    assert actions[0] == SuspendPipeline(PipelineId(0))
    assignments = told(actions)
    assert {name: message.slot for name, (message, _) in assignments.items()} == {"c": 0, "b": 1}
    assert {generation for _, generation in assignments.values()} == {roles.pipelines[PipelineId(0)].generation}
    assert roles.pipelines[PipelineId(0)].generation > before
    assert (assignments["c"][0].lease_term, assignments["b"][0].lease_term) == (2, 1), "only slot 0 changed hands"
    assert any(isinstance(action, OpenPipeline) for action in report(roles, actions))


def test_without_a_replacement_the_hole_stays_and_its_neighbour_keeps_its_slot() -> None:
    roles = roles_of()
    opened(roles, "a", "b")
    actions = roles.lose(NodeId("b"))
    assert actions == [SuspendPipeline(PipelineId(0))]
    assert roles.slot_of(NodeId("a")) == StageSlot(PipelineId(0), SlotIndex(0))
    assert roles.num_open == 0
    assert roles.detail == "1 of 2 stage nodes; no node holds slot 1 of pipeline 0"
    assignments = told(roles.join(node("c")))
    assert (assignments["c"][0].slot, assignments["a"][0].slot) == (1, 0)
    assert (assignments["c"][0].lease_term, assignments["a"][0].lease_term) == (2, 1)


@pytest.mark.parametrize("recovery", ["auto", "replay"])
def test_a_pipeline_does_not_open_with_a_hole_that_came_while_another_was_filled(recovery: str) -> None:
    roles = roles_of(recovery=recovery)
    opened(roles, "a", "b")
    roles.lose(NodeId("a"))
    assignments = told(roles.join(node("c")))
    (b, generation), (c, _) = assignments["b"], assignments["c"]
    assert roles.apply_ready(NodeId("b"), ready(b), generation) == []
    assert roles.lose(NodeId("b")) == []
    assert roles.apply_ready(NodeId("c"), ready(c), generation) == []
    assert (roles.num_open, roles.num_suspended) == (0, 1)
    answers = report(roles, roles.join(node("d")))
    assert [type(action) for action in answers] == [OpenPipeline]


def test_requests_of_a_broken_pipeline_move_where_another_one_is_open() -> None:
    roles = roles_of()
    opened(roles, *"abcd")
    assert roles.lose(NodeId("b")) == [SuspendPipeline(PipelineId(0)), ClosePipeline(PipelineId(0))]
    roles = roles_of(recovery="replay")
    opened(roles, *"abcd")
    assert roles.lose(NodeId("b")) == [SuspendPipeline(PipelineId(0))]
    roles = roles_of(recovery="move", spares=1)
    opened(roles, *"abc")
    assert roles.lose(NodeId("b"))[0] == ClosePipeline(PipelineId(0))


def test_spares_mirror_the_slots_of_an_open_pipeline_one_each() -> None:
    roles = roles_of(spares=2)
    opened(roles, *"ab")
    follows = mirrors_told(roles.join(node("c")) + roles.join(node("d")))
    assert {name: message.slot for name, (message, _) in follows.items()} == {"c": 0, "d": 1}
    assert follows["d"][0].primary == ("tcp://b:1",)
    number = follows["d"][1]
    (tell,) = roles.apply_mirror_report(NodeId("d"), number, is_complete=False)
    assert isinstance(tell, Tell)
    assert (tell.node_id, tell.message) == ("b", MirrorTo(1, "d", ("tcp://d:1",), "token of d"))
    assert roles.apply_mirror_report(NodeId("d"), number, is_complete=True) == []
    assert roles.apply_mirror_report(NodeId("c"), number, is_complete=True) == [], "it was told another role"


def test_a_mirror_takes_the_slot_that_it_follows_also_beside_an_open_pipeline() -> None:
    roles = roles_of(spares=2)
    opened(roles, *"ab")
    mirrored(roles, roles.join(node("c")) + roles.join(node("d")))
    actions = roles.lose(NodeId("b"))
    assert actions[0] == SuspendPipeline(PipelineId(0))
    assert told(actions)["d"][0].slot == 1
    assert "c" not in told(actions)


def test_a_holder_that_leaves_waits_for_its_mirror_and_one_without_does_not() -> None:
    roles = roles_of(spares=1, recovery="replay")
    opened(roles, *"abc")
    assert roles.may_leave(NodeId("b")), "nobody follows it"
    actions = roles.drain(NodeId("b"))
    assert mirror_of(actions)["c"].slot == 1
    assert not roles.may_leave(NodeId("b"))
    assert roles.leaving == []
    mirrored(roles, actions)
    assert roles.leaving == ["b"]
    assert told(roles.lose(NodeId("b")))["c"][0].slot == 1


@pytest.mark.parametrize("recovery", ["auto", "replay"])
def test_a_holder_that_leaves_while_its_pipeline_recovers_waits_for_its_mirror_too(recovery: str) -> None:
    roles = roles_of(spares=2, recovery=recovery)
    opened(roles, *"ab")
    told_before = roles.join(node("c")) + roles.join(node("d"))
    assert told(roles.lose(NodeId("a"))).keys() == {"c", "b"}
    actions = roles.drain(NodeId("b"))
    assert (roles.num_open, roles.leaving) == (0, []), "it has all the cache that there is"
    mirrored(roles, [*told_before, *actions])
    assert roles.leaving == ["b"]
    actions = roles.lose(NodeId("b"))
    assert {name: message.slot for name, (message, _) in told(actions).items()} == {"c": 0, "d": 1}
    assert not any(isinstance(action, ClosePipeline) for action in actions)


def test_a_holder_that_leaves_without_cache_or_without_anybody_to_take_it_does_not_wait() -> None:
    roles = roles_of(spares=1)
    roles.join(node("a"))
    roles.join(node("b"))
    roles.join(node("c"))
    roles.drain(NodeId("b"))
    assert roles.leaving == ["b"], "its pipeline has never been open"
    roles = roles_of()
    opened(roles, *"abc")
    roles.lose(NodeId("a"))
    roles.drain(NodeId("b"))
    assert roles.leaving == ["b"], "the only spare has just taken the other slot"


def test_a_mesh_that_ends_as_a_whole_lets_everybody_go_also_while_it_recovers() -> None:
    for order in permutations("bcd"):
        roles = roles_of(spares=2)
        opened(roles, *"abcd")
        roles.lose(NodeId("a"))
        gone: set[NodeId] = set()
        for name in order:
            roles.drain(NodeId(name))
        while roles.leaving:
            gone.add(roles.leaving[0])
            roles.lose(roles.leaving[0])
        assert gone == set("bcd")


def test_losing_a_spare_or_a_stranger_changes_nothing() -> None:
    roles = roles_of(spares=1)
    opened(roles, "a", "b", "c")
    assert [type(action.message) for action in roles.lose(NodeId("c")) if isinstance(action, Tell)] == []
    assert roles.lose(NodeId("nobody")) == []
    assert roles.num_open == 1


def test_a_holder_that_reconnects_is_told_its_slot_anew() -> None:
    roles = roles_of()
    opened(roles, "a", "b")
    actions = roles.join(node("a"))
    assert actions[0] == SuspendPipeline(PipelineId(0))
    assert told(actions)["a"][0].slot == 0
    assert told(actions)["a"][0].lease_term == 1, "it holds the slot still"
    assert any(isinstance(action, OpenPipeline) for action in report(roles, actions))


def test_a_renewed_pipeline_keeps_its_holders_and_terms_in_a_new_generation() -> None:
    roles = roles_of()
    opened(roles, "a", "b")
    before = roles.pipelines[PipelineId(0)]
    actions = roles.renew(PipelineId(0))
    after = roles.pipelines[PipelineId(0)]
    assert actions[0] == SuspendPipeline(PipelineId(0))
    assert after.generation > before.generation
    assert after.holders == before.holders
    assert {message.lease_term for message, _ in told(actions).values()} == {1}
    assert roles.renew(PipelineId(7)) == []


def test_a_pipeline_that_does_not_fit_its_nodes_says_so_and_stays_closed() -> None:
    roles = roles_of()
    roles.join(node("a", capacity_bytes=1000))
    assert told(roles.join(node("b"))) == {}
    assert "its node offers 1000 bytes" in roles.detail
    assert roles.num_open == 0


def test_a_node_that_is_too_small_does_not_stand_in_the_way_of_larger_ones() -> None:
    roles = roles_of()
    opened(roles, *"ab")
    small = replace(node("a"), node_id=NodeId("small"), capacity_bytes=1000)
    assert roles.join(small) == []
    actions = roles.lose(NodeId("b"))
    assert roles.num_open == 0
    assert roles.slot_of(NodeId("small")) is None
    assert "; small: " in roles.detail
    assert actions == [SuspendPipeline(PipelineId(0))]
    answers = opened(roles, "c")
    assert [type(action) for action in answers] == [OpenPipeline]
    assert set(roles.pipelines[PipelineId(0)].holders) == {"a", "c"}
    assert not told(roles.join(node("d"))), "small and d are no pipeline; the other goes on"
    assert roles.num_open == 1
    assert len(report(roles, roles.join(node("e")))) == 1
    assert roles.num_open == 2


@pytest.mark.parametrize("pp", [1, 3])
def test_pipelines_of_other_lengths_open_as_well(pp: int) -> None:
    roles = roles_of(pp=pp)
    answers = opened(roles, *"abcdef")
    assert len([action for action in answers if isinstance(action, OpenPipeline)]) >= 6 // pp
    assert roles.num_open == 6 // pp


def on_host(name: str) -> NodeDescription:
    """`a1`: a node of host a."""
    return node(name, host_label=name[0])


def test_a_host_that_is_lost_as_a_whole_takes_no_slot_together_with_its_mirror() -> None:
    roles = roles_of(spares=2)
    for name in ("a1", "b1", "a2", "b2"):
        mirrored(roles, report(roles, roles.join(on_host(name))))
    pipeline = roles.pipelines[PipelineId(0)]
    holders = {StageSlot(PipelineId(0), SlotIndex(index)): of for index, of in enumerate(pipeline.holders) if of}
    assert {slot: node_id[0] for slot, node_id in roles.mirrors.nodes.items()} == {
        slot: {"a": "b", "b": "a"}[holder[0]] for slot, holder in holders.items()
    }
    report(roles, roles.lose(NodeId("a1")) + roles.lose(NodeId("a2")))
    assert roles.num_open == 1
    assert set(roles.pipelines[PipelineId(0)].holders) == {"b1", "b2"}


def test_the_mirror_that_shares_a_host_goes_on_until_its_successor_elsewhere_has_loaded() -> None:
    roles = roles_of(pp=1, spares=3)
    slot = StageSlot(PipelineId(0), SlotIndex(0))
    mirrored(roles, opened_on(roles, "a1", "a2"))
    assert (roles.mirrors.node_of(slot), roles.mirrors.num_complete) == ("a2", 1)
    _, number = mirrors_told(roles.join(on_host("b1")))["b1"]
    assert roles.mirrors.node_of(slot) == "a2"
    actions = roles.apply_mirror_report(NodeId("b1"), number, is_complete=False)
    assert [
        (a.node_id, a.message.node_id) for a in actions if isinstance(a, Tell) and isinstance(a.message, MirrorTo)
    ] == [("a1", "b1")]
    assert roles.mirrors.nodes[slot] == "b1"
    roles.apply_mirror_report(NodeId("b1"), number, is_complete=True)
    assert roles.mirrors.node_of(slot) == "b1"


def test_a_successor_that_cannot_load_leaves_the_pair_as_it_was() -> None:
    roles = roles_of(pp=1, spares=3)
    slot = StageSlot(PipelineId(0), SlotIndex(0))
    mirrored(roles, opened_on(roles, "a1", "a2"))
    _, number = mirrors_told(roles.join(on_host("b1")))["b1"]
    roles.apply_refusal(NodeId("b1"), number)
    assert roles.mirrors.node_of(slot) == "a2"
    assert mirror_of(roles.join(on_host("a3"))) == {}


def test_the_mirror_takes_over_the_only_slot_of_a_pipeline_though_an_idle_spare_came_first() -> None:
    roles = roles_of(pp=1, spares=2)
    mirrored(roles, opened_on(roles, "a1", "a2", "b1"))
    assert roles.mirrors.node_of(StageSlot(PipelineId(0), SlotIndex(0))) == "b1", "it is on another host"
    assert list(told(roles.lose(NodeId("a1")))) == ["b1"]


def test_a_pipeline_of_one_slot_goes_on_with_its_mirror_though_a_spare_is_missing_then() -> None:
    roles = roles_of(pp=1, spares=2)
    mirrored(roles, opened_on(roles, "a1", "a2", "a3", "a4"))
    for slot, mirror in roles.mirrors.nodes.items():
        (holder,) = roles.pipelines[slot.pipeline].holders
        assert holder is not None
        assert list(told(roles.lose(holder))) == [mirror]
        assert len(roles.pipelines) == 2
        roles.join(on_host(holder))


def test_a_slot_that_its_new_holder_cannot_take_goes_to_a_spare_that_may() -> None:
    roles = roles_of(pp=1, spares=2)
    opened_on(roles, "a1", "a2", "a3")
    ((first, (_, generation)),) = told(roles.lose(NodeId("a1"))).items()
    actions = roles.apply_refusal(NodeId(first), generation)
    ((second, (assigned, _)),) = told(actions).items()
    assert {first, second} == {"a2", "a3"}
    assert assigned.lease_term == 3
    assert [
        action.node_id for action in actions if isinstance(action, Tell) and isinstance(action.message, Unassign)
    ] == [first]
    assert roles.apply_refusal(NodeId(first), generation) == [], "told again it is no news"


def test_a_slot_that_nobody_could_take_stays_with_the_last_of_them_and_is_tried_by_all_again() -> None:
    roles = roles_of(pp=1, spares=2)
    told(roles.join(on_host("a1")))
    roles.join(on_host("a2"))
    tried: list[str] = []
    for _ in range(3):
        (holder,) = roles.pipelines[PipelineId(0)].holders
        assert holder is not None
        asked = roles.pipelines[PipelineId(0)].generation
        ((other, (_, generation)),) = told(roles.apply_refusal(holder, asked)).items()
        assert roles.apply_refusal(NodeId(other), generation) == [], "nobody is left: it is asked again, but later"
        assert roles.waits_for(NodeId(other), generation) == PipelineId(0)
        tried += [holder, other]
        roles.renew(PipelineId(0))
    assert tried == ["a1", "a2", "a2", "a1", "a1", "a2"]


def test_who_could_not_take_a_slot_gets_it_when_nobody_else_is_left() -> None:
    roles = roles_of(pp=1, spares=1)
    opened_on(roles, "a1", "a2")
    roles.renew(PipelineId(0))
    generation = roles.pipelines[PipelineId(0)].generation
    assert list(told(roles.apply_refusal(NodeId("a1"), generation))) == ["a2"]
    assert list(told(roles.lose(NodeId("a2")))) == ["a1"]


def test_another_spare_follows_a_slot_whose_mirror_could_not_load_it() -> None:
    roles = roles_of(pp=1, spares=2)
    told = mirrors_told(opened_on(roles, "a1", "a2"))
    ((name, (_, number)),) = told.items()
    assert mirrors_told(roles.join(on_host("a3"))) == {}, "it is idle"
    assert list(mirrors_told(roles.apply_refusal(NodeId(name), number))) == ["a3"]
    assert roles.apply_refusal(NodeId(name), number) == [], "told again it is no news"


def test_the_only_spare_that_could_not_load_a_mirror_is_asked_again_less_and_less_often_until_it_can() -> None:
    roles = roles_of(pp=1, spares=1)
    ((name, (_, number)),) = mirrors_told(opened_on(roles, "a1", "a2")).items()
    now_s = 100.0
    for wait_s in (RETRY_S, 2 * RETRY_S):
        assert roles.apply_refusal(NodeId(name), number) == [], "there is nobody else"
        assert (roles.waits, roles.mirrors.num_missing) == (True, 1)
        assert roles.tick(now_s) == roles.tick(now_s + wait_s - 0.1) == []
        now_s += wait_s
        ((again, (_, number)),) = mirrors_told(roles.tick(now_s)).items()
        assert (again, roles.waits) == (name, False)
    roles.apply_mirror_report(NodeId(name), number, is_complete=False)
    roles.apply_mirror_report(NodeId(name), number, is_complete=True)
    assert roles.mirrors.num_missing == 0


def test_a_node_that_says_hello_again_keeps_its_place_in_line() -> None:
    roles = roles_of(pp=1, spares=2, recovery="replay")
    opened(roles, "a", "c", "b", "c")
    assert list(told(roles.lose(NodeId("a")))) == ["c"]


def test_what_a_spare_could_not_load_is_forgotten_with_it() -> None:
    roles = roles_of(pp=1, spares=1)
    ((name, (_, number)),) = mirrors_told(opened_on(roles, "a1", "a2")).items()
    roles.apply_refusal(NodeId(name), number)
    roles.lose(NodeId(name))
    assert not roles.waits


def test_a_mirror_that_does_not_become_complete_makes_room_for_another_spare_later_each_time() -> None:
    roles = roles_of(pp=1, spares=2)
    ((first, (_, number)),) = mirrors_told(opened_on(roles, "a1", "a2")).items()
    roles.apply_mirror_report(NodeId(first), number, is_complete=False)
    assert (roles.waits, roles.tick(100.0)) == (True, []), "the wait begins"
    assert roles.tick(100.0 + 2 * FILL_PATIENCE_S) == [], "there is nobody else"
    roles.join(on_host("a3"))
    actions = roles.tick(100.0 + 2 * FILL_PATIENCE_S)
    ((second, (_, number)),) = mirrors_told(actions).items()
    assert second == "a3"
    feeds = [
        (a.node_id, a.message.endpoints) for a in actions if isinstance(a, Tell) and isinstance(a.message, MirrorTo)
    ]
    assert feeds == [("a1", ())], "the holder feeds nobody until a3 has loaded"
    roles.apply_mirror_report(NodeId(second), number, is_complete=False)
    assert roles.tick(300.0) == []
    assert roles.tick(300.0 + RETRY_S) == [], "a2 is not tried again before a3 has had its time"
    assert roles.tick(300.0 + 2 * FILL_PATIENCE_S - 0.1) == []
    assert list(mirrors_told(roles.tick(300.0 + 2 * FILL_PATIENCE_S))) == [first]


def test_a_mirror_that_is_complete_is_kept_and_has_its_whole_time_when_its_stream_breaks() -> None:
    roles = roles_of(pp=1, spares=2)
    ((name, (_, number)),) = mirrors_told(opened_on(roles, "a1", "a2", "a3")).items()
    for is_complete in (False, True):
        roles.apply_mirror_report(NodeId(name), number, is_complete=is_complete)
        roles.tick(100.0)
    assert (roles.waits, roles.tick(100.0 + FILL_PATIENCE_S)) == (False, [])
    roles.apply_mirror_report(NodeId(name), number, is_complete=False, broken_stream=1)
    assert roles.tick(200.0) == roles.tick(200.0 + FILL_PATIENCE_S - 0.1) == []
    assert list(mirrors_told(roles.tick(200.0 + FILL_PATIENCE_S))) == ["a3"]


def opened_on(roles: StageRoles, *names: str) -> list[Action]:
    answers: list[Action] = []
    for name in names:
        answers += report(roles, actions := roles.join(on_host(name))) + actions
    return answers
