"""Which experts and layers lie in which folder."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.errors import ConfigurationError
from common.topology import CheckpointPart
from compose.part_plan import deal_experts, plan_parts
from services.router.control.sizes import plan_layers
from tests.support.router.mesh_shapes import EXPERTS, small_model


def test_stages_get_the_layers_that_the_router_gives_its_slots() -> None:
    config = small_model(num_hidden_layers=7, vocab_size=5000)
    parts = plan_parts(config, 3, 1, 1)
    assert [parts[f"stage-{slot}"].layers for slot in range(3)] == plan_layers(config, 3)
    assert all(not parts[f"stage-{slot}"].experts for slot in range(3))


def test_there_is_one_folder_a_role_and_one_for_the_router() -> None:
    parts = plan_parts(small_model(), 2, 3, 2)
    assert list(parts) == ["router", "stage-0", "stage-1", "expert-0", "expert-1", "expert-2"]
    assert parts["router"] == CheckpointPart()
    assert all(parts[f"expert-{number}"].layers is None for number in range(3))


@settings(max_examples=80, deadline=None)
@given(num_experts=st.integers(1, 40), num_folders=st.integers(1, 13), copies=st.integers(1, 4))
def test_every_expert_has_its_copies_and_folders_are_even(num_experts: int, num_folders: int, copies: int) -> None:
    assume(copies <= num_folders <= num_experts * copies)
    dealt = deal_experts(num_experts, num_folders, copies)
    assert len(dealt) == num_folders
    assert Counter(expert for held in dealt for expert in held) == dict.fromkeys(range(num_experts), copies)
    sizes = [len(held) for held in dealt]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 0


def test_what_a_lost_folder_had_lies_in_many_others() -> None:
    first, *others = deal_experts(64, 8, 2)
    assert all(first & other for other in others)


def test_more_copies_than_folders_and_more_folders_than_copies_are_refused_by_the_option() -> None:
    with pytest.raises(ConfigurationError, match="--copies 3: each copy of an expert needs a folder of its own"):
        deal_experts(EXPERTS, 2, 3)
    with pytest.raises(ConfigurationError, match="--experts 7: 3 experts in 2 copies fill 6 folders at most"):
        deal_experts(EXPERTS, 7, 2)
    with pytest.raises(ConfigurationError, match="PP=5"):
        plan_parts(small_model(), 5, 1, 1)
