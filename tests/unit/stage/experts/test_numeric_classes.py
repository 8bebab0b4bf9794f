"""Expert nodes of several numeric classes: bits do not change with who has time, and it is counted where they may."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ProtocolError
from common.wire.transport import LinkEvent
from services.stage.experts.hedging import CEILING_S, LONGEST_SILENCE_S
from tests.support.nodes.expert_client_stage import ALL, CALL, Stage, make_call
from tests.support.nodes.kernels import one_torch_thread

__all__ = ["one_torch_thread"]

CLASSES = {"a": "amd", "b": "amd", "c": "intel", "d": "intel"}


def mixed(**holdings: tuple[int, ...]) -> Stage:
    stage = Stage()
    stage.classes = CLASSES
    stage.place(holdings)
    return stage


def asked_classes(stage: Stage) -> set[str]:
    """Of everybody who was asked since the last look; they all answer."""
    classes = set()
    for node in list(stage.client.nodes):
        if messages := stage.asked(node.node_id):
            classes.add(node.numeric_class)
            stage.answer(node.node_id, *messages)
    return classes


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(
        st.lists(st.permutations(ALL).map(lambda order: order[:2]), min_size=1, max_size=6), min_size=1, max_size=6
    ),
    busy=st.fixed_dictionaries(dict.fromkeys("abcd", st.integers(0, 1000))),
    late=st.sets(st.sampled_from("abcd")),
)
def test_calls_of_a_layer_stay_within_one_class_whatever_the_load_and_whoever_is_late(
    calls: list[list[list[int]]], busy: dict[str, int], late: set[str]
) -> None:
    stage = mixed(a=ALL, b=ALL, c=ALL, d=ALL)
    for node in stage.client.nodes:
        node.outstanding_rows = busy[node.node_id]
    asked: set[str] = set()
    for number, experts in enumerate(calls):
        stage.start(make_call(experts), f"call {number}")
        for _ in range(2):
            for node in list(stage.client.nodes):
                if messages := stage.asked(node.node_id):
                    asked.add(node.numeric_class)
                    if node.node_id not in late:
                        stage.answer(node.node_id, *messages)
            stage.pass_time(CEILING_S + 0.01)
    assert asked == {"amd"}
    assert stage.client.counters.other_class_rows == 0


def test_another_class_is_asked_when_no_copy_of_the_first_is_left_and_that_is_counted() -> None:
    stage = mixed(a=(0, 1, 2), c=ALL)
    stage.start(CALL)
    assert asked_classes(stage) == {"intel"}, "it holds everything that the layer needs"
    stage.place({"a": ALL, "c": ALL})
    stage.link("c", LinkEvent.CLOSED)
    stage.start(CALL, "second")
    assert asked_classes(stage) == {"amd"}
    assert stage.client.counters.other_class_rows == CALL.experts.numel()
    assert stage.num_retried > 0, "the answer to the client tells it, too"
    assert len(stage.sums) == 2


def test_only_the_shards_that_the_first_class_has_lost_go_elsewhere() -> None:
    stage = mixed(a=(0, 1), b=(2, 3), c=(2, 3))
    stage.start(CALL)
    assert asked_classes(stage) == {"amd"}
    stage.link("b", LinkEvent.CLOSED)
    stage.start(CALL, "second")
    assert {node for node in "abc" if stage.asked(node)} == {"a", "c"}
    assert stage.client.counters.other_class_rows == 3


def test_a_class_that_comes_later_changes_no_bits_even_where_it_holds_more() -> None:
    stage = mixed(c=ALL)
    stage.start(CALL)
    assert asked_classes(stage) == {"intel"}
    stage.place({"c": ALL, "a": ALL, "b": ALL})
    stage.start(CALL, "second")
    stage.answer_all()  # newcomers, too, who were asked for a probe
    stage.start(CALL, "third")
    assert asked_classes(stage) == {"intel"}
    assert stage.client.counters.other_class_rows == 0


def test_where_the_first_class_no_longer_holds_a_layer_the_one_that_does_answers_all_of_it() -> None:
    stage = mixed(a=ALL, c=ALL)
    stage.start(CALL)
    assert asked_classes(stage) == {"amd"}
    stage.place({"a": (0, 1, 2), "c": ALL})
    stage.start(CALL, "second")
    assert asked_classes(stage) == {"intel"}


def test_a_node_that_hangs_is_replaced_by_another_class_where_its_own_has_no_other_copy() -> None:
    stage = mixed(a=ALL, c=ALL)
    stage.start(CALL)
    stage.asked("a")
    stage.pass_time(CEILING_S + 0.1)
    assert stage.asked("c") == [], "being late is no reason to change the bits"
    for node in stage.client.nodes:
        node.heard_s = stage.now_s if node.node_id == "c" else 0.0
    stage.pass_time(LONGEST_SILENCE_S)
    stage.answer("c", *stage.asked("c"))
    assert len(stage.sums) == 1
    assert stage.client.counters.other_class_rows == CALL.experts.numel()


def test_a_stage_that_starts_later_asks_the_same_class_as_those_that_were_there_before() -> None:
    stage = mixed(c=ALL)
    stage.place({"a": ALL, "c": ALL})
    late = Stage()
    late.take(stage.placement)
    for one in (stage, late):
        for node in "ac":
            one.link(node)
        one.start(CALL)
        one.answer_all()  # newcomers, too
        one.start(CALL, "second")
        assert asked_classes(one) == {"intel"}, "one request gets the same bits on every pipeline"


def test_a_placement_that_names_classes_for_another_number_of_layers_is_refused_and_changes_nothing() -> None:
    stage = mixed(c=ALL)
    with pytest.raises(ProtocolError, match="first_classes names 1 layers of 2"):
        stage.take(replace(stage.placement, version=9, first_classes=("amd",)))
    stage.start(CALL)
    assert asked_classes(stage) == {"intel"}
