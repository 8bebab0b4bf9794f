"""Which spare mirrors which slot, on which host."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.ids import LeaseTerm, NodeId, PipelineId, SlotIndex
from common.topology import NodeDescription, StageSlot
from services.router.control.actions import RoleMessages, Tell
from services.router.control.mirror_roles import (
    FILL_PATIENCE_S,
    MirroredSlot,
    MirrorPair,
    MirrorRoles,
    choose_mirrors,
)
from services.router.control.sizes import StageSizes, plan_layers
from tests.support.router.mesh_shapes import node, small_mesh, small_model


def held(index: int, host: str, *, numeric_class: str = "cpu", is_leaving: bool = False) -> MirroredSlot:
    slot = StageSlot(PipelineId(0), SlotIndex(index))
    holder = node(f"holder {index}", numeric_class=numeric_class, host_label=host)
    return MirroredSlot(slot, holder, LeaseTerm(1), 8, is_wanted=True, is_leaving=is_leaving)


def pair(of: MirroredSlot, node_id: str, host: str) -> MirrorPair:
    return MirrorPair(NodeId(node_id), of.holder.node_id, of.lease_term, of.num_blocks, host == of.holder.host_label)


def spares(names: str, numeric_class: str = "cpu") -> list[NodeDescription]:
    """`a1 b1`: a host's letter and a number, in the order in which they are taken."""
    return [node(name, numeric_class=numeric_class, host_label=name[0]) for name in names.split()]


def chosen(
    slots: Sequence[MirroredSlot],
    idle: Sequence[NodeDescription],
    pairs: dict[StageSlot, MirrorPair] | None = None,
    successors: dict[StageSlot, MirrorPair] | None = None,
) -> dict[int, str]:
    found = choose_mirrors(slots, pairs or {}, successors or {}, idle, lambda _, __: True)
    return {slot.index: spare.node_id for slot, spare in found.items()}


def test_a_mirror_is_on_another_host_than_its_holder_although_an_earlier_spare_shares_it() -> None:
    assert chosen([held(0, "a")], spares("a1 b1")) == {0: "b1"}


def test_a_spare_is_left_to_the_slot_that_it_alone_can_follow_from_another_host() -> None:
    assert chosen([held(0, "a"), held(1, "b")], spares("c1 b1")) == {0: "b1", 1: "c1"}


def test_a_mirror_on_the_same_host_is_better_than_none() -> None:
    assert chosen([held(0, "a"), held(1, "a")], spares("a1 b1")) == {0: "b1", 1: "a1"}


def test_who_leaves_gets_the_only_spare_whatever_its_host() -> None:
    assert chosen([held(0, "a"), held(1, "b", is_leaving=True)], spares("b1")) == {1: "b1"}


def test_a_mirror_that_shares_its_holders_host_gets_a_successor_elsewhere_once_there_is_a_spare() -> None:
    slot = held(0, "a")
    pairs = {slot.slot: pair(slot, "a1", "a")}
    assert chosen([slot], spares("a1 a2"), pairs) == {}
    assert chosen([slot], spares("a1 a2 b1"), pairs) == {0: "b1"}
    assert chosen([slot], spares("a1 b1 c1"), pairs, {slot.slot: pair(slot, "b1", "b")}) == {}
    elsewhere = {slot.slot: pair(slot, "b1", "b")}
    assert chosen([slot], spares("b1 c1"), elsewhere) == {}, "a mirror that is elsewhere already stays"


def test_two_mirrors_change_places_where_each_is_on_the_others_host() -> None:
    first, second = held(0, "a"), held(1, "b")
    pairs = {first.slot: pair(first, "a1", "a")}
    assert chosen([first, second], spares("a1 b1"), pairs) == {0: "b1"}
    assert chosen([first, second], spares("a1 b1"), {first.slot: pair(first, "b1", "b")}) == {1: "a1"}


def test_another_host_does_not_make_up_for_another_numeric_class() -> None:
    assert chosen([held(0, "a")], [*spares("b1", "gpu"), *spares("a1")]) == {0: "a1"}


HOSTS = st.sampled_from("abcd")


@given(st.lists(HOSTS, max_size=5), st.lists(HOSTS, max_size=6))
def test_no_choice_has_more_mirrors_nor_more_of_them_on_other_hosts(holders: list[str], of_spares: list[str]) -> None:
    slots = [held(index, host) for index, host in enumerate(holders)]
    idle = [node(str(number), host_label=host) for number, host in enumerate(of_spares)]
    found = chosen(slots, idle)
    assert len(set(found.values())) == len(found) == min(len(slots), len(idle))
    num_elsewhere = sum(of_spares[int(node_id)] != holders[index] for index, node_id in found.items())
    assert num_elsewhere == best(holders, of_spares)


def best(holders: list[str], of_spares: list[str]) -> int:
    """The largest number of pairs on two hosts, by trying all."""
    if not holders:
        return 0
    first, rest = holders[0], holders[1:]
    without = best(rest, of_spares)
    tried = [
        1 + best(rest, [*of_spares[:number], *of_spares[number + 1 :]])
        for number in {host: number for number, host in enumerate(of_spares) if host != first}.values()
    ]
    return max([without, *tried])


class CutLink:
    """A slot whose holder, on host a, reaches the spares of its own host alone. The router reaches all of them."""

    def __init__(self, names: str, fill_s: float = 0.25) -> None:
        self.wanted, self.spares = held(0, "a"), spares(names)
        self.nodes = {of.node_id: of for of in (self.wanted.holder, *self.spares)}
        config, shape = small_model(), small_mesh()
        layers = plan_layers(config, shape.pp)
        messages, sizes = RoleMessages(layers, ((), ""), 0), StageSizes(config, shape, layers)
        self.roles = MirrorRoles(messages, sizes, len(self.spares), self.nodes)
        self.now_s, self.fill_s = 0.0, fill_s
        self.filled_at_s: dict[NodeId, float] = {}

    def replan(self) -> None:
        """Who is told to mirror has loaded at once, and is filled in its time if the holder reaches it."""
        for action in self.roles.replan([self.wanted], self.spares):
            if isinstance(action, Tell) and (number := self.roles.number_of(action.node_id)) is not None:
                self.roles.apply_report(action.node_id, number, is_complete=False)
                self.filled_at_s[action.node_id] = self.now_s + self.fill_s

    def lose(self, name: str) -> None:
        del self.nodes[NodeId(name)]
        self.spares = [spare for spare in self.spares if spare.node_id != name]
        self.replan()

    def mirrors_over(self, time_s: float) -> list[str | None]:
        """Returns the complete mirror at each time at which the router asked whether anything is due."""
        seen: list[str | None] = []
        for _ in range(int(4 * time_s)):
            self.now_s += 0.25
            node_id = self.roles.nodes[self.wanted.slot]
            if node_id.startswith("a") and self.now_s >= self.filled_at_s[node_id]:
                number = self.roles.number_of(node_id)
                assert number is not None
                self.roles.apply_report(node_id, number, is_complete=True)
            if self.roles.is_due(self.now_s):
                self.replan()
            seen.append(self.roles.node_of(self.wanted.slot))
        return seen


@pytest.mark.parametrize("fill_s", [0.25, 20.0])
def test_a_mirror_that_was_not_filled_does_not_come_back_in_place_of_a_complete_one(fill_s: float) -> None:
    mesh = CutLink("a1 b1", fill_s)
    mesh.replan()
    assert mesh.roles.nodes[mesh.wanted.slot] == "b1", "it is on another host"
    mesh.mirrors_over(FILL_PATIENCE_S + fill_s + 0.5)
    assert set(mesh.mirrors_over(300.0)) == {"a1"}


def test_every_spare_is_tried_before_one_that_was_not_filled_is_tried_again() -> None:
    mesh = CutLink("b1 b2 a1")
    mesh.replan()
    mesh.mirrors_over(3 * FILL_PATIENCE_S + 1.0)
    assert set(mesh.mirrors_over(300.0)) == {"a1"}


def test_a_mirror_that_was_not_filled_and_had_a_slot_meanwhile_does_not_come_back_in_place_of_a_complete_one() -> None:
    mesh = CutLink("a1 b1", fill_s=150.0)
    mesh.replan()
    mesh.mirrors_over(FILL_PATIENCE_S + 0.5)
    both, mesh.spares = mesh.spares, mesh.spares[:1]  # another pipeline has taken b1
    mesh.replan()
    assert mesh.mirrors_over(2 * FILL_PATIENCE_S + 60.0)[-1] == "a1", "nobody else can be asked, however long it takes"
    mesh.spares = both
    mesh.replan()
    assert set(mesh.mirrors_over(300.0)) == {"a1"}


def test_a_mirror_that_was_not_filled_is_asked_again_when_the_complete_one_is_lost() -> None:
    mesh = CutLink("a1 b1")
    mesh.replan()
    mesh.mirrors_over(FILL_PATIENCE_S + 0.5)
    assert mesh.roles.node_of(mesh.wanted.slot) == "a1"
    mesh.lose("a1")
    assert mesh.roles.nodes[mesh.wanted.slot] == "b1"
