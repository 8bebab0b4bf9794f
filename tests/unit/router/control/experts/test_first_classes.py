"""The numeric class that answers a layer's calls is the router's choice, and changes only where it has to."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from common.ids import NodeId
from common.messages import PublishPlacement
from common.wire.array import Int32Array
from services.router.control.actions import Tell
from services.router.control.experts.first_classes import FirstClasses
from tests.support.router.expert_shards import ALL, PromptRoles, expert, ready_roles, settle
from tests.support.router.mesh_shapes import LAYERS

Held = list[list[bool]]


def owners_of(held: Held) -> Int32Array:
    """One layer; `held` by node and shard."""
    return np.array([[[1 + node if has else 0 for has in row]] for node, row in enumerate(held)], dtype=np.int32)


rows = st.lists(st.booleans(), min_size=3, max_size=3)
placements = st.lists(st.tuples(rows, st.sampled_from(["amd", "intel", "arm"])), min_size=1, max_size=5)


@given(st.lists(placements, min_size=1, max_size=6))
def test_a_class_stays_as_long_as_it_holds_all_that_anybody_holds_and_goes_to_one_that_does(
    history: list[list[tuple[list[bool], str]]],
) -> None:
    first, before = FirstClasses(), ""
    for nodes in history:
        held, classes = [row for row, _ in nodes], [name for _, name in nodes]
        chosen = first.choose(owners_of(held), classes)
        assert chosen == () if len(set(classes)) == 1 else len(chosen) == 1
        shards = {name: {k for row, n in nodes if n == name for k in range(3) if row[k]} for name in classes}
        everything = set().union(*shards.values())
        whole = {name for name, has in shards.items() if has == everything and has}
        now = chosen[0] if chosen else classes[0]
        if before in whole and chosen:
            assert now == before
        elif whole and chosen:
            assert now in whole
        elif everything and chosen:
            assert shards[now]
        before = now


def first_classes(roles: PromptRoles) -> tuple[str, ...]:
    (action,) = roles.publish_to([NodeId("stage")])
    assert isinstance(action, Tell)
    assert isinstance(action.message, PublishPlacement)
    return action.message.first_classes


def test_the_placement_says_the_class_of_each_layer_once_there_are_several() -> None:
    roles = ready_roles("x")
    assert first_classes(roles) == ()
    settle(roles, roles.join(expert("b", numeric_class="another"), 9.0))
    sole = roles.state._nodes[NodeId("x")].numeric_class
    assert roles.num_held["b"] == len(ALL)
    assert first_classes(roles) == (sole,) * LAYERS, "who comes later changes no bits"
    roles.lose(NodeId("x"), 10.0)
    assert first_classes(roles) == ()
