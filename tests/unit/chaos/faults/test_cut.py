from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.faults.cut import AddressRefusal, Refusal, flows, make_cut, with_addresses

NODES = ["expert-0", "expert-1", "router-0", "stage-0", "stage-1"]


def test_a_node_that_is_off_reaches_nobody_and_the_others_reach_each_other() -> None:
    dead = flows(make_cut("off", ["stage-0"], NODES))
    assert dead == {pair for peer in NODES if peer != "stage-0" for pair in [("stage-0", peer), (peer, "stage-0")]}


def test_one_way_means_that_the_second_does_not_hear_the_first() -> None:
    assert flows(make_cut("one_way", ["stage-0", "expert-1"], NODES)) == {("stage-0", "expert-1")}


def test_a_cut_pair_still_reaches_everybody_else() -> None:
    dead = flows(make_cut("pair", ["stage-0", "stage-1"], NODES))
    assert dead == {("stage-0", "stage-1"), ("stage-1", "stage-0")}


@settings(deadline=None)
@given(st.sets(st.sampled_from(NODES), min_size=1, max_size=4))
def test_halves_lie_on_both_sides_and_each_half_is_whole(victims: set[str]) -> None:
    dead = flows(make_cut("halves", sorted(victims), NODES))
    assert dead == {(a, b) for a in NODES for b in NODES if (a in victims) != (b in victims)}


def test_each_cut_is_refused_at_the_nodes_that_are_named_so_that_healing_them_heals_all() -> None:
    for kind, victims in [("off", ["stage-0"]), ("pair", ["stage-0", "stage-1"]), ("halves", ["expert-0"])]:
        assert {refusal.node for refusal in make_cut(kind, victims, NODES)} <= set(victims)


@pytest.mark.parametrize(
    ("kind", "victims"),
    [("pair", ["stage-0"]), ("one_way", ["stage-0", "stage-0"]), ("halves", NODES), ("wrong", ["stage-0"])],
)
def test_a_cut_that_makes_no_sense_is_refused(kind: str, victims: list[str]) -> None:
    with pytest.raises(ValueError, match=r"between|itself|both|known"):
        make_cut(kind, victims, NODES)


def test_addresses_of_one_node_and_direction_come_together_and_unknown_peers_are_left_out() -> None:
    refusals = [Refusal("a", "b", "in"), Refusal("a", "c", "in"), Refusal("a", "d", "in"), Refusal("a", "d", "out")]
    addresses = {"b": ("10.0.0.2",), "c": ("10.0.0.3", "10.1.0.3")}
    assert with_addresses(refusals, addresses) == [AddressRefusal("a", ("10.0.0.2", "10.0.0.3", "10.1.0.3"), "in")]
