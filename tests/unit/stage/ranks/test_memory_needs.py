"""What another degree needs, in plain numbers."""

from __future__ import annotations

import pytest

from services.stage.ranks.memory_needs import Free, against_degree, against_growth


def test_on_a_host_the_parts_of_more_ranks_take_what_all_have_now() -> None:
    assert against_growth(100, 2, 4, 10**9, Free(200, None)) == ""
    refusal = against_growth(100, 2, 4, 0, Free(199, None))
    assert refusal == "the parts of more ranks take 200 bytes beside these, 199 are free"


def test_on_devices_each_rank_needs_its_smaller_part_and_the_host_k_and_v() -> None:
    assert against_growth(100, 2, 4, 70, Free(70, 50)) == ""
    assert "the part of one of 4 ranks takes 50 bytes, its GPU has 49 free" in against_growth(
        100, 2, 4, 70, Free(70, 49)
    )
    assert "K and V take 70 bytes on the host" in against_growth(100, 2, 4, 70, Free(69, 50))


@pytest.mark.parametrize(("degree", "needed"), [(4, 100 + 40), (2, 200 + 40), (1, 400 + 80)])
def test_fewer_ranks_hold_more_each_and_a_kv_head_is_never_cut(degree: int, needed: int) -> None:
    assert against_degree(400, 80, 2, degree, needed) == ""
    assert against_degree(400, 80, 2, degree, needed - 1) == (
        f"with {degree} ranks each needs {needed} bytes, its GPU offers {needed - 1}"
    )


def test_a_capacity_that_is_not_known_refuses_nothing() -> None:
    assert against_degree(10**15, 0, 2, 1, 0) == ""
