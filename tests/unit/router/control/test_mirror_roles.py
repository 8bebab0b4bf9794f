"""Which spare mirrors which slot, on which host."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from common.ids import LeaseTerm, NodeId, PipelineId, SlotIndex
from common.topology import NodeDescription, StageSlot
from services.router.control.mirror_roles import MirroredSlot, MirrorPair, choose_mirrors
from tests.support.router.mesh_shapes import node


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
