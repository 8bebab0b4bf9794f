from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.faults import cut
from chaos.faults.cut import flows, make_cut
from chaos.target import Node, TargetError
from tests.support.chaos.target import ListedTarget

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


class Namespace:
    """A stand-in: stage-0 has two addresses, stage-1 has none."""

    def __init__(self, pid: int) -> None:
        self.name = next(name for name, node in TARGET.running.items() if node.pid == pid)

    def addresses(self) -> tuple[str, ...]:
        return {"expert-0": ("10.0.0.2",), "stage-0": ("10.0.0.3", "10.1.0.3")}.get(self.name, ())

    def run(self, *words: str) -> None:
        SAID.append(" ".join([self.name, *words[2:]]))

    run_if_there = run


TARGET = ListedTarget(features=frozenset({"netns"}))
SAID: list[str] = []


def test_packets_of_each_address_of_a_peer_are_dropped_at_the_victim_until_it_is_healed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cut, "NetworkNamespace", Namespace)
    fault = cut.Cut("off")
    fault.apply(TARGET, TARGET.named("expert-0"))
    rules = [f"{way} 10.{number}.0.3 -j DROP" for number in (0, 1) for way in ("INPUT 1 -s", "OUTPUT 1 -d")]
    assert sorted(SAID) == sorted(f"expert-0 -I {rule}" for rule in rules)
    SAID.clear()
    fault.heal(TARGET)
    assert sorted(SAID) == sorted(f"expert-0 -D {rule.replace(' 1 ', ' ')}" for rule in rules)


def test_a_victim_that_ends_before_the_cut_is_a_refusal_at_its_own_end_and_nothing_to_cut_at_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cut, "NetworkNamespace", Namespace)
    SAID.clear()
    gone = Node("stage-9", "stage", 99)
    alive = TARGET.named("expert-0")
    fault = cut.Cut("one_way")
    fault.apply(TARGET, [gone, *alive])
    assert SAID == [], "it speaks to nobody"
    with pytest.raises(TargetError, match="stage-9 is gone"):
        fault.apply(TARGET, [*alive, gone])
    fault.heal(TARGET)
