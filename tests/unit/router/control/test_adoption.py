from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.errors import ProtocolError
from common.ids import NodeId
from common.messages import Hello
from common.topology import LayerRange
from common.wire.array import array_to_frame
from services.router.control.adoption import (
    ADOPT_S,
    MAX_STEPS_APART,
    NEW_S,
    Adoption,
    HeldSequence,
    HeldSlot,
    combine,
    read_held_slot,
)

BLOCK_TOKENS = 4


def slot(index: int, sequences: dict[int, tuple[tuple[int, ...], int]], last_step: int = 50) -> HeldSlot:
    held = {number: HeldSequence(blocks, computed) for number, (blocks, computed) in sequences.items()}
    return HeldSlot(0, index, 2, LayerRange(index, index + 1), 1, 32, last_step, held)


def hello(held_slot: tuple[int, ...], sequences: list[list[int]], blocks: list[int]) -> Hello:
    fields: dict[str, Any] = {
        "node_id": "a",
        "incarnation": 1,
        "node_kind": "stage",
        "capacity_bytes": 1,
        "host_label": "",
        "numeric_class": "",
        "fingerprint": "",
        "endpoints": (),
        "lifeline": (),
        "ipc_token": "",
    }
    return Hello(
        **fields,
        held_slot=held_slot,
        held_sequences=array_to_frame(np.array(sequences, dtype=np.int64).reshape(-1, 3)),
        held_blocks=array_to_frame(np.array(blocks, dtype=np.int32)),
    )


SLOT = (0, 1, 2, 3, 5, 7, 10, 99)


def test_a_sequence_goes_on_as_far_as_every_slot_has_it() -> None:
    held = combine([slot(0, {7: ((1, 2), 8)}), slot(1, {7: ((1,), 4)}, last_step=48)], BLOCK_TOKENS)
    assert held.sequences == {7: HeldSequence((1, 2), 4)}
    assert held.released == ()
    assert held.last_steps == {0: 50, 1: 48}


@pytest.mark.parametrize(
    "other",
    [
        {},
        {7: ((3,), 4)},
        {7: ((1,), 0)},
        {7: ((1, 2), 9)},
    ],
    ids=["missing", "another block", "nothing computed", "more positions than blocks"],
)
def test_what_slots_do_not_agree_on_is_dropped(other: dict[int, tuple[tuple[int, ...], int]]) -> None:
    held = combine([slot(0, {7: ((1, 2), 9)}), slot(1, other)], BLOCK_TOKENS)
    assert held.sequences == {}
    assert held.released == (7,)


def test_two_sequences_do_not_get_one_block() -> None:
    sequences = {7: ((1, 2), 8), 8: ((2,), 4)}
    held = combine([slot(0, sequences), slot(1, sequences)], BLOCK_TOKENS)
    assert (set(held.sequences), held.released) == ({7}, (8,))


def test_only_who_reported_and_has_its_memory_still_has_what_is_held() -> None:
    held = combine([slot(0, {7: ((1,), 4)}), slot(1, {7: ((1,), 4)}, last_step=0)], BLOCK_TOKENS)
    assert [held.is_held_by(0, kv_mark) for kv_mark in (0, 49, 50, 51)] == [False, False, True, True]
    assert [held.is_held_by(1, kv_mark) for kv_mark in (0, 1)] == [False, True], "0: an empty memory"
    assert not held.is_held_by(2, 50)
    assert not held.kept_by({1}).is_held_by(0, 50)


def test_a_hello_says_what_is_held() -> None:
    held = read_held_slot(hello(SLOT, [[7, 40, 2], [8, 3, 1]], [4, 5, 9]))
    assert held is not None
    assert (held.pipeline, held.slot, held.layers, held.lease_term, held.last_step) == (0, 1, (3, 5), 7, 99)
    assert held.sequences == {7: HeldSequence((4, 5), 40), 8: HeldSequence((9,), 3)}
    assert read_held_slot(hello((), [], [])) is None


@pytest.mark.parametrize(
    ("held_slot", "sequences", "blocks", "field"),
    [
        ((1, 2), [], [], "held_slot"),
        ((0, 2, 2, 3, 5, 7, 10, 99), [], [], "held_slot"),
        ((0, 1, 2, 5, 5, 7, 10, 99), [], [], "held_slot"),
        (SLOT, [[7, 40, 2]], [4], "held_blocks"),
        (SLOT, [[7, 40, 1]], [10], "held_blocks"),
        (SLOT, [[7, -1, 1]], [1], "held_blocks"),
    ],
)
def test_a_hello_that_makes_no_sense_is_refused_by_the_field(
    held_slot: tuple[int, ...], sequences: list[list[int]], blocks: list[int], field: str
) -> None:
    with pytest.raises(ProtocolError, match=f"Hello.{field}"):
        read_held_slot(hello(held_slot, sequences, blocks))


def holder(pipeline: int, slot: int, num_blocks: int = 32) -> HeldSlot:
    held = {10 + pipeline: HeldSequence((1,), 4)}
    return HeldSlot(pipeline, slot, 2, LayerRange(slot, slot + 1), 7, num_blocks, 50, held)


def adoption() -> Adoption:
    return Adoption([LayerRange(0, 1), LayerRange(1, 2)], BLOCK_TOKENS, is_wanted=True)


def test_a_pipeline_is_taken_over_once_all_its_holders_are_back_and_another_one_after_it() -> None:
    waiting = adoption()
    waiting.claim(NodeId("a"), holder(0, 0), 10.0)
    assert waiting.pop_complete(10.0) == []
    waiting.claim(NodeId("b"), holder(0, 1), 10.0)
    waiting.claim(NodeId("d"), holder(1, 1), 10.03)
    (first,) = waiting.pop_complete(10.03)
    assert (first.pipeline, first.holders, first.lease_terms) == (0, ("a", "b"), (7, 7))
    assert waiting.is_pending
    assert (waiting.has_claim(NodeId("a")), waiting.has_claim(NodeId("d"))) == (False, True)
    assert (waiting.may_know(10), waiting.may_know(11)) == (False, True)
    waiting.claim(NodeId("c"), holder(1, 0), 10.06)
    waiting.claim(NodeId("e"), holder(0, 0), 10.06)
    (second,) = waiting.pop_complete(10.06)
    assert (second.pipeline, second.holders) == (1, ("c", "d"))
    assert waiting.pop_complete(10.0 + ADOPT_S) == [], "a slot that was given back is not claimed again"
    assert not waiting.is_pending


@pytest.mark.parametrize("order", ["stale first", "stale last"])
def test_of_two_who_claim_a_slot_the_one_that_came_further_in_it_gets_it(order: str) -> None:
    claims = [("stale", replace(holder(0, 0), last_step=20)), ("true", holder(0, 0))]
    waiting = adoption()
    for name, held in claims if order == "stale first" else reversed(claims):
        waiting.claim(NodeId(name), held, 10.0)
    waiting.claim(NodeId("b"), holder(0, 1), 10.0)
    (taken,) = waiting.pop_complete(10.0)
    assert taken.holders == ("true", "b")
    assert not waiting.has_claim(NodeId("stale"))
    assert waiting.pop_losers() == {"stale": 7}
    assert waiting.pop_losers() == {}


def test_a_holder_far_behind_the_others_of_its_pipeline_may_have_been_replaced_so_its_successor_is_waited_for() -> None:
    waiting = adoption()
    waiting.claim(NodeId("a"), replace(holder(0, 0), last_step=51 + MAX_STEPS_APART), 10.0)
    waiting.claim(NodeId("stale"), holder(0, 1), 10.0)
    assert waiting.pop_complete(10.0) == []
    waiting.claim(NodeId("true"), replace(holder(0, 1), last_step=51 + MAX_STEPS_APART), 10.5)
    (taken,) = waiting.pop_complete(10.5)
    assert taken.holders == ("a", "true")
    assert waiting.pop_losers() == {"stale": 7}


def test_where_everything_was_started_anew_nobody_is_waited_for() -> None:
    waiting = adoption()
    for name in "ab":
        waiting.see_process(NodeId(name), is_new=True)
        waiting.claim(NodeId(name), None, 10.0)
    assert waiting.pop_complete(10.0 + NEW_S - 0.01) == []
    assert waiting.is_pending
    assert waiting.pop_complete(10.0 + NEW_S) == []
    assert not waiting.is_pending


@pytest.mark.parametrize("seen", [(True,), (True, True, False), (False, False)])
def test_holders_are_waited_for_where_one_process_has_outlived_the_router_or_too_few_have_come(
    seen: tuple[bool, ...],
) -> None:
    waiting = adoption()
    for number, is_new in enumerate(seen):
        waiting.see_process(NodeId(f"{number}"), is_new)
        waiting.claim(NodeId(f"{number}"), None, 10.0)
    waiting.pop_complete(10.0 + ADOPT_S - 0.01)
    assert waiting.is_pending


def test_a_hello_that_is_said_again_is_no_other_process() -> None:
    waiting = adoption()
    for _ in range(2):
        waiting.see_process(NodeId("a"), is_new=True)
        waiting.claim(NodeId("a"), None, 10.0)
    waiting.pop_complete(10.0 + ADOPT_S - 0.01)
    assert waiting.is_pending, "one process is not enough for a pipeline of two"
    waiting.see_process(NodeId("a"), is_new=False)  # it has heard this router meanwhile, and its link broke
    waiting.see_process(NodeId("b"), is_new=True)
    waiting.pop_complete(10.0 + NEW_S)
    assert not waiting.is_pending, "it has heard no router but this one"


def test_a_new_process_that_is_gone_again_does_not_count() -> None:
    waiting = adoption()
    for name in "ab":
        waiting.see_process(NodeId(name), is_new=True)
        waiting.claim(NodeId(name), None, 10.0)
    waiting.withdraw(NodeId("a"))
    waiting.pop_complete(10.0 + ADOPT_S - 0.01)
    assert waiting.is_pending


def test_a_claim_that_is_too_late_or_of_another_shape_loses() -> None:
    waiting = adoption()
    waiting.claim(NodeId("other shape"), replace(holder(0, 0), num_slots=3), 10.0)
    waiting.claim(NodeId("gone again"), replace(holder(0, 0), num_slots=3), 10.0)
    waiting.withdraw(NodeId("gone again"))
    waiting.pop_complete(10.0 + ADOPT_S)
    waiting.claim(NodeId("late"), replace(holder(0, 0), lease_term=8), 12.0)
    assert waiting.pop_losers() == {"other shape": 7, "late": 8}


def test_when_the_time_is_up_a_pipeline_is_taken_over_with_a_hole_and_nobody_is_waited_for() -> None:
    waiting = adoption()
    assert waiting.pop_complete(99.0) == [], "the time runs from the first node that registers"
    waiting.claim(NodeId("s"), None, 10.0)
    waiting.claim(NodeId("b"), holder(0, 1), 11.0)
    waiting.claim(NodeId("d"), holder(1, 1), 11.0)
    waiting.withdraw(NodeId("d"))
    assert waiting.pop_complete(9.99 + ADOPT_S) == []
    (taken,) = waiting.pop_complete(10.0 + ADOPT_S)
    assert (taken.holders, taken.lease_terms) == ((None, "b"), (0, 7))
    assert not waiting.may_know(11)
    waiting.claim(NodeId("c"), holder(1, 0), 12.0)
    assert waiting.pop_complete(12.0) == []
