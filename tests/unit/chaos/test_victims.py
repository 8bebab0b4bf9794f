"""Who is hurt, by rule and draw; and who is left."""

from __future__ import annotations

import random
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.record.roles import Role
from chaos.target import Node, NodeKind
from chaos.victims import Rule, VictimRule, choose_victims

MESH = [
    Node("router-0", "router", 1),
    *(Node(f"stage-{n}", "stage", 10 + n) for n in range(3)),
    *(Node(f"expert-{n}", "expert", 20 + n) for n in range(3)),
]


def names(rule: VictimRule, seed: int = 0, before: tuple[str, ...] = (), **keep: int) -> list[str]:
    return [node.name for node in choose_victims(rule, MESH, random.Random(seed), before, keep)]


def test_random_ones_are_of_their_kind_and_as_many_as_asked() -> None:
    drawn = {tuple(names(VictimRule(kind="expert", count=2), seed)) for seed in range(40)}
    assert drawn == {("expert-0", "expert-1"), ("expert-0", "expert-2"), ("expert-1", "expert-2")}
    assert len(names(VictimRule(kind="stage", count=9))) == 3


def test_rules_that_name_their_victims() -> None:
    assert names(VictimRule(rule="all", kind="expert")) == ["expert-0", "expert-1", "expert-2"]
    assert names(VictimRule(rule="everything_but_router")) == [
        node.name for node in sorted(MESH[1:], key=lambda n: n.name)
    ]
    assert names(VictimRule(rule="same"), before=("stage-1",)) == ["stage-1"]
    assert len(names(VictimRule(rule="same"), before=("stage-9",))) == 1, "that one was scaled away"
    assert names(VictimRule(rule="named", names=("stage-2", "gone"))) == ["stage-2"]
    assert names(VictimRule(rule="nobody")) == []


def test_a_role_is_asked_for_where_roles_are_known() -> None:
    roles = {"stage-0": Role("mirror", "0/0"), "stage-2": Role("holder", "0/0"), "expert-1": Role("expert")}
    for seed in range(20):
        for rule, expected in (
            (VictimRule(kind="stage", role="holder"), ["stage-2"]),
            (VictimRule(rule="all", role="mirror"), ["stage-0"]),
            (VictimRule(kind="expert", role="spare"), []),
        ):
            victims = choose_victims(rule, MESH, random.Random(seed), (), {}, roles)
            assert [node.name for node in victims] == expected
    unknown = {names(VictimRule(kind="stage", role="holder"), seed)[0] for seed in range(40)}
    assert unknown == {"stage-0", "stage-1", "stage-2"}


def test_a_node_that_the_fault_finds_nothing_in_is_never_drawn() -> None:
    for seed in range(20):
        chosen = choose_victims(
            VictimRule(kind="stage"), MESH, random.Random(seed), (), {"stage": 1}, can_hurt=lambda node: node.pid == 11
        )
        assert [node.name for node in chosen] == ["stage-1"]


def test_a_pair_is_of_two_kinds_without_the_router() -> None:
    for seed in range(20):
        pair = names(VictimRule(rule="pair"), seed)
        assert sorted(name.split("-")[0] for name in pair) == ["expert", "stage"]
    assert len(names(VictimRule(rule="pair", kind="expert"))) == 2


def test_as_many_as_must_stay_are_left() -> None:
    assert len(names(VictimRule(rule="all", kind="expert"), expert=2)) == 1
    assert names(VictimRule(rule="all", kind="expert"), expert=3) == []
    assert len(names(VictimRule(rule="everything_but_router"), expert=1, stage=1)) == 4


@given(st.sampled_from(get_args(Rule)), st.sampled_from(["", "stage", "expert"]), st.integers(), st.integers(0, 3))
def test_the_same_draw_chooses_the_same_and_the_kept_are_never_hurt(
    rule: Rule, kind: NodeKind, seed: int, kept: int
) -> None:
    chosen = VictimRule(rule=rule, kind=kind, count=2, names=("expert-1",))
    shuffled = random.Random(seed).sample(MESH, len(MESH))
    first = choose_victims(chosen, MESH, random.Random(seed), ["stage-0"], {"expert": kept})
    assert first == choose_victims(chosen, shuffled, random.Random(seed), ["stage-0"], {"expert": kept})
    assert sum(node.kind == "expert" for node in first) <= 3 - kept


def test_an_unknown_rule_is_named() -> None:
    unknown: Any = "most"
    with pytest.raises(ValueError, match="should be 'random', 'same'"):
        VictimRule(rule=unknown)


def test_the_victims_of_a_lost_host_are_all_who_run_on_it() -> None:
    mesh = [Node("router-0", "router", 1), *(Node(f"stage-{n}", "stage", 2 + n, host=str(n % 2)) for n in range(4))]
    rule = VictimRule(rule="host")
    drawn = {tuple(node.name for node in choose_victims(rule, mesh, random.Random(seed), (), {})) for seed in range(20)}
    assert drawn == {("stage-0", "stage-2"), ("stage-1", "stage-3")}
    assert names(rule) == [], "nobody runs on a played host"
