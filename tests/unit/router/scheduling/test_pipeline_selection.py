from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import ConfigurationError
from common.ids import PipelineId
from services.router.scheduling.pipeline_selection import COOLING_S, MAX_OPENINGS, PipelineSelection


def load(
    pipeline: int,
    *,
    num_running: int = 0,
    max_running: int = 8,
    num_queued_tokens: int = 0,
    num_used_blocks: int = 0,
    p99_step_s: float = 0.0,
) -> Any:
    """In place of a PipelineSchedule."""
    return SimpleNamespace(
        pipeline=PipelineId(pipeline),
        running=[None] * num_running,
        max_running=max_running,
        num_queued_tokens=num_queued_tokens,
        allocator=SimpleNamespace(num_blocks=10, num_free=10 - num_used_blocks),
        pace=SimpleNamespace(p99_s=p99_step_s),
    )


def test_least_in_flight_wins() -> None:
    selection = PipelineSelection("least_in_flight")
    assert selection.choose([load(0, num_running=2), load(1, num_running=1), load(2, num_running=3)]) == 1


def test_a_long_prefix_on_one_pipeline_leaves_some_requests_for_the_other() -> None:
    selection, running = PipelineSelection("least_in_flight"), [0, 0]
    for _ in range(8):
        loads = [load(pipeline, num_running=number) for pipeline, number in enumerate(running)]
        pick = selection.choose(loads, [4000, 0])
        assert pick is not None
        running[pick] += 1
    assert running[0] > running[1] > 0


def test_equals_take_turns() -> None:
    selection = PipelineSelection("least_in_flight")
    loads = [load(2), load(0), load(1)]
    assert [selection.choose(loads) for _ in range(4)] == [0, 1, 2, 0]


def test_pipeline_at_its_cap_is_no_candidate() -> None:
    selection = PipelineSelection("least_in_flight")
    assert selection.choose([load(0, num_running=2, max_running=2), load(1, num_running=5)]) == 1
    assert selection.choose([load(0, num_running=2, max_running=2)]) is None
    assert selection.choose([]) is None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (load(0, num_queued_tokens=100), load(1, num_used_blocks=10)),  # 0.4 against 0.3
        (load(0, num_used_blocks=10, p99_step_s=0.1), load(1, num_queued_tokens=9)),  # 0.6 against 0.4
        (load(0, p99_step_s=0.2), load(1, p99_step_s=0.1)),
    ],
)
def test_weighted_takes_queue_utilisation_and_p99(first: Any, second: Any) -> None:
    assert PipelineSelection("weighted").choose([first, second]) == 1


def test_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigurationError, match="'fastest' is unknown; known are least_in_flight, weighted"):
        PipelineSelection("fastest")


def test_flapping_pipeline_cools_off_and_comes_back() -> None:
    selection = PipelineSelection("least_in_flight")
    both = [PipelineId(0), PipelineId(1)]
    for now_s in (0.0, 3.0, 50.0):
        selection.note_opening(PipelineId(0), now_s)
        assert selection.usable(both, now_s) == [0, 1]
    selection.note_opening(PipelineId(0), 60.0)
    assert selection.usable(both, 60.0) == [1]
    assert selection.usable(both, 60.0 + COOLING_S) == [0, 1]


def test_rare_openings_do_not_trip_the_breaker() -> None:
    selection = PipelineSelection("least_in_flight")
    for now_s in (0.0, 21.0, 42.0, 63.0, 84.0):
        selection.note_opening(PipelineId(0), now_s)
        assert selection.usable([PipelineId(0), PipelineId(1)], now_s) == [0, 1]


def test_cooling_pipeline_is_used_if_there_is_no_other() -> None:
    selection = PipelineSelection("least_in_flight")
    for _ in range(MAX_OPENINGS + 1):
        selection.note_opening(PipelineId(0), 1.0)
    assert selection.usable([PipelineId(0), PipelineId(1)], 1.0) == [1]
    assert selection.usable([PipelineId(0)], 1.0) == [0]
