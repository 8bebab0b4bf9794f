"""A run against a mesh in memory: what it records, what it finds, and that it always heals."""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from typing import Any

import pytest

from chaos.experiment import Experiment, parse_experiment
from chaos.faults.kill import Kill
from chaos.faults.kill_child import KillChild
from chaos.record import observer
from chaos.record.history import Event, FaultApplied, FaultHealed, FaultSkipped, History, PhaseBegan
from chaos.runner import CannotRunError, Run, without_long_collections
from chaos.verdicts.judgement import RunJudgement, judge
from chaos.verdicts.verdict import State
from tests.support.chaos.server import FakeMesh
from tests.support.chaos.target import ListedTarget


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(observer, "WHOLE_FOR_S", 0.05)


def experiment(**timeline: Any) -> Experiment:
    faults = [
        {"kind": "kill", "victims": {"kind": "expert"}},
        {"kind": "pause", "victims": {"kind": "stage"}, "heal_after_s": [0.02, 0.05]},
    ]
    fields = {"count": 4, "spacing_s": [0.01, 0.05], "settle_within_s": 5, "faults": faults} | timeline
    return parse_experiment(
        {
            "name": "test",
            "load": {"streams": 4, "requests": 5, "max_tokens": 20, "reattach_within_s": 1},
            "steady_state": {"ready_within_s": 0.2},
            "rollback": {"finish_within_s": 5, "quiet_within_s": 0.5},
            "timeline": fields,
        }
    )


def make_run(mesh: FakeMesh, target: ListedTarget, chosen: Experiment, seed: int = 3) -> Run:
    began_s = time.monotonic()
    clock = lambda: time.monotonic() - began_s  # noqa: E731
    return Run(chosen, target, "listed", seed, History(), clock, 0.0, lambda line: None, mesh.transport)


def judged(run: Run) -> RunJudgement:
    return judge(run.history.events, run.experiment.bounds, sees_processes=False)


def state_of(judgement: RunJudgement, name: str) -> State:
    return next(verdict.state for verdict in judgement.verdicts if verdict.name == name)


def test_an_undamaged_mesh_is_held_and_every_fault_hits_work_in_flight() -> None:
    run = make_run(FakeMesh(), ListedTarget(), experiment())
    asyncio.run(run.execute())
    judgement = judged(run)
    assert judgement.state is State.HELD, [v for v in judgement.verdicts if v.state is not State.HELD]
    assert len(judgement.outcomes) == 4
    phases = [event.phase for event in run.history.events if isinstance(event, PhaseBegan)]
    assert phases == ["steady", "reference", "baseline", "faults", "finish", "quiet", "end"]


@pytest.mark.parametrize("is_stopped", [False, True])
def test_what_faults_say_of_themselves_is_in_the_record(monkeypatch: pytest.MonkeyPatch, is_stopped: bool) -> None:
    def heal(fault: Kill, target: ListedTarget) -> None:
        fault.remark, fault.doubt = "a call was hit", "and another was not"

    monkeypatch.setattr(Kill, "heal", heal)
    run = make_run(FakeMesh(), ListedTarget(), experiment(count=1, faults=[{"kind": "kill"}]))
    if is_stopped:
        run._open_faults[7] = Kill()
        run._heal_all()
    else:
        asyncio.run(run.execute())
    (healed,) = (event for event in run.history.events if isinstance(event, FaultHealed))
    assert (healed.remark, healed.doubt) == ("a call was hit", "and another was not")


def test_the_same_seed_asks_and_hurts_the_same() -> None:
    runs = [make_run(FakeMesh(), ListedTarget(), experiment()) for _ in range(2)]
    for run in runs:
        asyncio.run(run.execute())
    assert runs[0].requests == runs[1].requests
    hurt = [
        [(e.kind, [v.name for v in e.victims]) for e in run.history.events if isinstance(e, FaultApplied)]
        for run in runs
    ]
    assert hurt[0] == hurt[1]
    assert len(hurt[0]) == 4


@pytest.mark.parametrize(
    ("spoil", "verdict"),
    [
        (lambda tokens: tokens[:7] + tokens[8:], "tokens_lost"),
        (lambda tokens: tokens[:8] + tokens[7:], "tokens_doubled"),
        (lambda tokens: [*tokens[:7], 99_999, *tokens[8:]], "tokens_changed"),
    ],
)
def test_a_mesh_that_spoils_one_answer_under_faults_is_found_out(spoil: Any, verdict: str) -> None:
    # The first five requests are the undisturbed ones.
    mesh = FakeMesh(spoil=lambda number, tokens: spoil(tokens) if number == 8 else tokens)
    run = make_run(mesh, ListedTarget(), experiment())
    asyncio.run(run.execute())
    judgement = judged(run)
    assert state_of(judgement, verdict) is State.BROKEN
    assert judgement.sha256_with_faults != judgement.sha256_without_faults


def test_a_block_that_stays_taken_is_found_out() -> None:
    mesh = FakeMesh()

    def leak(number: int, tokens: list[int]) -> list[int]:
        mesh.leaked_blocks = 1 if number > 5 else 0
        return tokens

    mesh.spoil = leak
    run = make_run(mesh, ListedTarget(), experiment(count=1))
    asyncio.run(run.execute())
    assert state_of(judged(run), "leaks_mesh") is State.BROKEN


def test_faults_that_the_target_does_not_offer_are_left_out_and_nothing_is_known() -> None:
    run = make_run(FakeMesh(), ListedTarget(features=frozenset()), experiment(count=2))
    asyncio.run(run.execute())
    skipped = [event for event in run.history.events if isinstance(event, FaultSkipped)]
    assert [event.reason for event in skipped] == ["the target has no processes"] * 2
    assert judged(run).state is State.UNKNOWN


def test_kinds_that_the_target_does_not_offer_are_left_out_once_and_as_many_faults_come_all_the_same() -> None:
    kinds = [
        {"kind": "kill", "victims": {"kind": "expert"}},
        {"kind": "frames", "weight": 50, "heal_after_s": [0.01, 0.02]},
    ]
    run = make_run(FakeMesh(), ListedTarget(), experiment(faults=kinds, count=6))
    asyncio.run(run.execute())
    judgement = judged(run)
    assert [outcome.kind for outcome in judgement.outcomes] == ["kill"] * 6
    assert [(s.fault, s.kind, s.reason) for s in judgement.skipped] == [(-2, "frames", "the target has no proxy")]
    assert judgement.state is State.HELD


def test_a_mesh_that_is_not_ready_is_not_judged() -> None:
    run = make_run(FakeMesh(is_ready=False), ListedTarget(), experiment())
    with pytest.raises(CannotRunError, match="not ready within 0 s: 1 of 2 stage nodes"):
        asyncio.run(run.execute())


def test_a_mesh_that_fails_without_faults_is_not_judged() -> None:
    run = make_run(FakeMesh(spoil=lambda number, tokens: tokens[:0]), ListedTarget(), experiment())
    with pytest.raises(CannotRunError, match=r"without any fault .* ended_early"):
        asyncio.run(run.execute())


def test_a_run_that_is_cancelled_wakes_whom_it_has_paused() -> None:
    target = ListedTarget()
    pause = [{"kind": "pause", "victims": {"kind": "stage"}, "heal_after_s": [60, 60]}]
    run = make_run(FakeMesh(), target, experiment(count=1, faults=pause))

    async def cancel_in_the_middle() -> None:
        task = asyncio.create_task(run.execute())
        hurt = asyncio.Event()
        run.history.sink = lambda line: hurt.set() if "fault_applied" in line else None
        await hurt.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_in_the_middle())
    assert [number for _, _, number in target.done] == [signal.SIGSTOP, signal.SIGCONT]


@pytest.mark.parametrize("takes", [True, False])
def test_penalties_are_asked_for_only_where_the_server_takes_them(takes: bool) -> None:
    mesh = FakeMesh(takes_penalties=takes)
    chosen = experiment(count=1)
    load = chosen.load.model_copy(update={"penalties": 1.0})
    run = make_run(mesh, ListedTarget(), chosen.model_copy(update={"load": load}))
    asyncio.run(run.execute())
    assert all(("presence_penalty" in body) == takes for body in mesh.bodies)


def test_overlapping_faults_are_both_applied_before_either_is_healed() -> None:
    faults = [{"kind": "pause", "victims": {"kind": "stage"}, "heal_after_s": [0.2, 0.2]}]
    target = ListedTarget()
    run = make_run(FakeMesh(), target, experiment(count=2, overlap=1.0, faults=faults))
    asyncio.run(run.execute())
    assert [number for _, _, number in target.done] == [signal.SIGSTOP] * 2 + [signal.SIGCONT] * 2


def test_a_run_that_nobody_watches_any_more_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(FakeMesh(), ListedTarget(), experiment(settle_within_s=0.2))
    looks = [0]
    look = observer.Observer.look

    async def break_down(self: observer.Observer) -> None:
        looks[0] += 1
        if looks[0] > 8:
            raise KeyError("x")
        await look(self)

    monkeypatch.setattr(observer.Observer, "look", break_down)
    with pytest.raises(CannotRunError, match="the observer failed: KeyError"):
        asyncio.run(run.execute())


def test_a_kind_that_no_node_of_its_kind_can_be_hurt_by_is_left_out_once_though_others_could_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As the router of a mesh without ranks has a child process, and no stage has one.
    monkeypatch.setattr(KillChild, "can_hurt", lambda self, node: node.kind == "router")
    kinds = [
        {"kind": "kill", "victims": {"kind": "expert"}},
        {"kind": "kill_child", "weight": 50, "victims": {"kind": "stage"}},
    ]
    run = make_run(FakeMesh(), ListedTarget(), experiment(faults=kinds, count=4))
    asyncio.run(run.execute())
    judgement = judged(run)
    assert judgement.state is State.HELD, [v for v in judgement.verdicts if v.state is not State.HELD]
    assert [outcome.kind for outcome in judgement.outcomes] == ["kill"] * 4
    assert [(s.fault, s.reason) for s in judgement.skipped] == [(-2, "no stage has what it hurts")]


def num_full_collections_while_a_record_grows() -> int:
    collected: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        collected.append(info["generation"])

    gc.callbacks.append(note)
    try:
        _record = [[number] for number in range(400_000)]
    finally:
        gc.callbacks.remove(note)
    assert 0 in collected
    return collected.count(2)


def test_the_record_is_not_looked_through_for_garbage_while_it_grows() -> None:
    gc.freeze()  # as in a process that has nothing else
    try:
        gc.collect()
        assert num_full_collections_while_a_record_grows() > 0
        before = gc.get_threshold()
        with without_long_collections():
            assert num_full_collections_while_a_record_grows() == 0
        assert gc.get_threshold() == before
    finally:
        gc.unfreeze()


def test_a_run_makes_its_record_like_that(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []
    record = History.add

    def watch(history: History, event: Event) -> None:
        seen.append(gc.get_threshold())
        record(history, event)

    monkeypatch.setattr(History, "add", watch)
    before = gc.get_threshold()
    asyncio.run(make_run(FakeMesh(), ListedTarget(), experiment(count=1)).execute())
    assert seen
    assert {threshold[:2] for threshold in seen} == {before[:2]}
    assert min(threshold[2] for threshold in seen) > 1_000_000
