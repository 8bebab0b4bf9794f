"""What one pipeline has, and what may be waited for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.ids import Generation, NodeId
from services.router.control.adoption import HeldCache, HeldSequence
from services.router.control.pipeline_state import Pipeline

A, B = NodeId("a"), NodeId("b")
HELD = HeldCache({7: HeldSequence((1,), 4)}, (), {0: 50, 1: 50})


@pytest.mark.parametrize(
    ("pipeline", "sequence_id", "has_all"),
    [
        (Pipeline(Generation(1), (A, B), 32, held=HELD), 7, True),
        (Pipeline(Generation(1), (A, B), 32, held=HELD), 8, False),
        (Pipeline(Generation(1), (A, B), 32, held=replace(HELD, last_steps={0: 50})), 7, False),
        (Pipeline(Generation(1), (A, None), 32, held=HELD), 7, False),
        (Pipeline(Generation(1), (A, B), 32), 7, False),
    ],
    ids=["whole", "another sequence", "a slot did not report", "a reporter is gone", "nothing held"],
)
def test_a_sequence_is_worth_waiting_for_where_everybody_who_reported_it_is_there(
    pipeline: Pipeline, sequence_id: int, has_all: bool
) -> None:
    assert pipeline.has_all_of(sequence_id) is has_all
