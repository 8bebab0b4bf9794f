"""What the mesh looks like from outside, and when it is whole again."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.record import observer as observer_module
from chaos.record.history import Asked, Ended, Event, HarnessLate, NodesSeen, Tokens
from chaos.record.observer import TICK_S, Observer, Progress, is_whole, sample_process, sum_metrics
from chaos.target import Node, TargetError
from chaos.targets.catalog import RemoteTarget, make_target
from tests.support.chaos.server import FakeMesh
from tests.support.chaos.target import ListedTarget

BEFORE = {"moemesh_ready": 1.0, "moemesh_nodes": 5.0, "moemesh_pipelines_open": 1.0, "moemesh_missing_copies": 0.0}


def test_metrics_are_summed_over_labels_without_buckets_and_strangers() -> None:
    text = (
        "# HELP moemesh_nodes x\n"
        'moemesh_nodes{kind="stage"} 2.0\nmoemesh_nodes{kind="expert"} 3.0\n'
        'moemesh_ttft_bucket{le="1"} 9.0\nmoemesh_x_created 1e9\nprocess_open_fds 7.0\nmoemesh_odd nothing\n'
    )
    assert sum_metrics(text) == {"moemesh_nodes": 5.0}


@given(st.text())
def test_no_text_breaks_the_reader_of_metrics(text: str) -> None:
    assert isinstance(sum_metrics(text), dict)


@pytest.mark.parametrize(
    "change",
    [{"moemesh_ready": 0.0}, {"moemesh_nodes": 4.0}, {"moemesh_pipelines_open": 0.0}, {"moemesh_missing_copies": 2.0}],
)
def test_a_mesh_that_lacks_something_it_had_is_not_whole(change: dict[str, float]) -> None:
    assert is_whole(BEFORE, BEFORE)
    assert not is_whole(BEFORE | change, BEFORE)


def test_more_than_before_is_whole_and_what_was_never_told_is_not_asked_for() -> None:
    assert is_whole(BEFORE | {"moemesh_nodes": 6.0}, BEFORE)
    assert is_whole({}, {})


@pytest.mark.parametrize(("running", "leaked_blocks", "is_quiet"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_a_mesh_is_quiet_once_nothing_runs_and_all_blocks_are_free(
    running: int, leaked_blocks: int, is_quiet: bool
) -> None:
    mesh, record = FakeMesh(), list[Event]()
    mesh.running, mesh.leaked_blocks = running, leaked_blocks

    async def run() -> None:
        async with httpx.AsyncClient(transport=mesh.transport) as http:
            seen = Observer(http, ListedTarget(), record.append, time.monotonic)
            assert await seen.wait_quiet(0.0) == is_quiet

    asyncio.run(run())


def test_a_lost_node_makes_the_mesh_not_whole_until_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer_module, "WHOLE_FOR_S", 1.0)
    mesh, target, record, now = FakeMesh(), ListedTarget(), list[Event](), [0.0]

    async def run() -> None:
        async with httpx.AsyncClient(transport=mesh.transport) as http:
            seen = Observer(http, target, record.append, lambda: now[0])
            await seen.set_baseline()
            assert seen.whole_since_s == 0.0
            target.stop(target.named("expert-0")[0], 1.0)
            now[0] = 5.0
            await seen.look()
            assert seen.whole_since_s is None
            target.start("expert-0")
            now[0] = 8.0
            await seen.look()
            assert seen.whole_since_s == 8.0
            now[0] = 8.5
            assert await seen.wait_whole(6.0, 0.0) is None, "not yet for long enough"
            now[0] = 9.0
            assert await seen.wait_whole(6.0, 1.0) == 8.0
            mesh.is_ready = False
            await seen.look()
            assert seen.whole_since_s is None

    asyncio.run(run())
    assert [len(event.nodes) for event in record if isinstance(event, NodesSeen)] == [5, 4, 5]


def test_a_harness_that_stood_still_notes_how_long() -> None:
    mesh, record, now = FakeMesh(), list[Event](), [0.0]

    async def run() -> None:
        async with httpx.AsyncClient(transport=mesh.transport) as http:
            noted = asyncio.Event()

            def note(event: Event) -> None:
                record.append(event)
                noted.set()

            watching = asyncio.create_task(Observer(http, ListedTarget(), note, lambda: now[0]).watch_harness())
            await asyncio.sleep(0)
            now[0] = 1.0 + TICK_S
            await asyncio.wait_for(noted.wait(), 10)
            watching.cancel()

    asyncio.run(run())
    assert record == [HarnessLate(1.0 + TICK_S, 1.0)]


def test_progress_knows_who_is_in_mid_answer() -> None:
    progress = Progress()
    for number in range(2):
        progress.see(Asked(0.0, f"op-{number}", number, "r", "", "greedy", 1, 3))
    assert (progress.num_streaming, progress.all_since(0.0, 1)) == (0, False)
    progress.see(Tokens(1.0, "op-0", 0, 0, (5,), ("",)))
    assert (progress.num_streaming, progress.all_since(1.0, 1), progress.all_since(1.0, 2)) == (1, True, False)
    progress.see(Tokens(2.0, "op-1", 0, 0, (5,), ("",)))
    progress.see(Ended(2.5, "op-0", {}))
    assert (progress.num_streaming, progress.all_since(1.0, 2), progress.all_since(1.5, 2)) == (1, True, False)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="read from /proc")
def test_a_process_is_seen_with_its_memory_and_files_and_a_dead_one_is_not() -> None:
    before = sample_process(Node("x", "stage", os.getpid()), 1.0)
    with Path(__file__).open():
        during = sample_process(Node("x", "stage", os.getpid()), 1.0)
    assert before is not None
    assert during is not None
    assert before.rss_bytes > 2**20
    assert during.num_files == before.num_files + 1
    assert sample_process(Node("x", "stage", 2**22 + 1), 1.0) is None


def test_an_address_alone_can_be_asked_and_not_hurt(tmp_path: Path) -> None:
    with make_target("local", {}, "http://mesh:8000/", tmp_path) as target:
        assert isinstance(target, RemoteTarget)
        assert (target.url, target.nodes(), target.features) == ("http://mesh:8000", [], frozenset())
        node = Node("a", "stage", 1)
        attempts: list[Callable[[], None]] = [
            lambda: target.signal(node, 9),
            lambda: target.stop(node, 1.0),
            lambda: target.start("a"),
            lambda: target.scale("stage", 2),
        ]
        for attempt in attempts:
            with pytest.raises(TargetError, match="only http://mesh:8000 is known"):
                attempt()


def test_an_unknown_target_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="there is no target 'moon'; there are docker, local"):
        make_target("moon", {}, "", tmp_path)


class _LostAddress:
    """A target whose router's container is stopped."""

    @property
    def url(self) -> str:
        raise TargetError("no router publishes a port now")

    def nodes(self) -> list[Node]:
        return []


def test_a_target_that_cannot_say_its_address_now_is_one_that_does_not_answer() -> None:
    record: list[Event] = []

    async def run() -> None:
        async with httpx.AsyncClient(transport=FakeMesh().transport) as http:
            target: Any = _LostAddress()
            seen = Observer(http, target, record.append, lambda: 0.0)
            await seen.look()
            assert seen.metrics == {}
            assert seen.whole_since_s is None
            assert await seen.look_at_roles() == {}

    asyncio.run(run())
