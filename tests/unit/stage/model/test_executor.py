"""Micro-batches that take turns: whichever has its answer goes on, and none takes the others along."""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import DeviceError, RankLostError
from common.messages import Header
from services.stage.model.decoder import ExpertCall
from services.stage.model.executor import Broken, Executor, Finished, RunningBatch, WantsExperts
from services.stage.model.kv_cache import LocalKv, PagedMemory, allocate_paged_memory
from services.stage.model.paged_attention import KvShape
from tests.unit.stage.model.test_micro_batch import step as step_of


@dataclass
class Model:
    """Asks its experts `calls` times and adds up what they say; breaks at call `breaks_at`."""

    calls: int = 2
    breaks_at: int = -1
    closed: list[Any] = field(default_factory=list)
    embedding: Any = None
    lm_head: Any = None

    def run_layers(self, caches: Any) -> None:
        """It has none."""

    def forward(self, batch: Any, caches: Any, run_layers: Any) -> Generator[ExpertCall, Tensor, Tensor]:
        x: Tensor = batch
        try:
            for number in range(self.calls):
                if number == self.breaks_at:
                    raise ZeroDivisionError("an impossible number")
                experts = torch.zeros((x.shape[0], 1), dtype=torch.int64)
                x = x + (yield ExpertCall(number, x, experts, torch.ones(x.shape[0], 1)))
        except GeneratorExit:
            self.closed.append(batch)
            raise
        return x


def executor_of(model: Model) -> Executor:
    given: Any = model
    shape = KvShape(num_layers=0, num_blocks=1, num_kv_heads=1, head_dim=4, dtype=torch.float32)
    memory = PagedMemory(LocalKv.allocate(shape), torch.zeros(0, 2))
    return Executor(given, memory)


def add(executor: Executor, value: float, *sequence_ids: int) -> None:
    batch: Any = torch.full((1, 2), value)
    step = step_of([(sequence_id, 0, 1, 0, 0, 0) for sequence_id in sequence_ids], [])
    executor.add(step, Header(step=int(value)), 9.0, batch)


def wanting_or_done(outcome: Any) -> RunningBatch:
    assert isinstance(outcome, WantsExperts | Finished), outcome
    return outcome.running


def wanting(outcome: Any) -> tuple[RunningBatch, int]:
    assert isinstance(outcome, WantsExperts)
    return outcome.running, outcome.call.layer


def test_a_batch_runs_until_it_wants_experts_and_goes_on_with_their_answer() -> None:
    executor = executor_of(Model())
    assert not executor.has_work
    add(executor, 1.0)
    running, layer = wanting(executor.run_one())
    assert (layer, executor.has_work, executor.num_running) == (0, False, 1)
    executor.resume(running, torch.full((1, 2), 10.0))
    assert executor.has_work
    running, layer = wanting(executor.run_one())
    assert layer == 1
    executor.resume(running, torch.full((1, 2), 100.0))
    outcome = executor.run_one()
    assert isinstance(outcome, Finished)
    assert outcome.output.tolist() == [[111.0, 111.0]]
    assert outcome.running.header == Header(step=1)
    assert (executor.has_work, executor.num_running) == (False, 0)


def test_whichever_has_its_answer_goes_on() -> None:
    executor = executor_of(Model(calls=1))
    for value in (1.0, 2.0, 3.0):
        add(executor, value)
    waiting = [wanting(executor.run_one())[0] for _ in range(3)]
    assert not executor.has_work
    for running in (waiting[2], waiting[0]):
        executor.resume(running, torch.zeros(1, 2))
    outcomes = [wanting_or_done(executor.run_one()) for _ in range(2)]
    assert [running.header.step for running in outcomes] == [3, 1]
    assert executor.num_running == 1


def test_one_that_breaks_leaves_the_others_running() -> None:
    model = Model(calls=2, breaks_at=1)
    executor = executor_of(model)
    add(executor, 1.0)
    first, _ = wanting(executor.run_one())
    add(executor, 2.0)
    executor.resume(first, torch.zeros(1, 2))
    second, _ = wanting(executor.run_one())
    outcome = executor.run_one()
    assert isinstance(outcome, Broken)
    assert outcome.running is first
    assert isinstance(outcome.error, ZeroDivisionError)
    model.breaks_at = -1
    executor.resume(second, torch.zeros(1, 2))
    assert wanting(executor.run_one())[0] is second
    assert executor.num_running == 1


def test_an_answer_for_a_batch_that_was_dropped_is_ignored() -> None:
    model = Model()
    executor = executor_of(model)
    add(executor, 1.0)
    running, _ = wanting(executor.run_one())
    executor.drop(running)
    assert len(model.closed) == 1
    executor.resume(running, torch.zeros(1, 2))
    assert (executor.has_work, executor.num_running) == (False, 0)


def test_a_batch_that_is_dropped_while_it_waits_for_its_turn_does_not_run() -> None:
    executor = executor_of(Model())
    add(executor, 1.0)
    add(executor, 2.0)
    running, _ = wanting(executor.run_one())
    executor.resume(running, torch.zeros(1, 2))
    executor.drop(running)
    executor.drop(running)
    assert wanting(executor.run_one())[0].header.step == 2
    assert not executor.has_work


def test_no_gradient_is_kept() -> None:
    model = Model(calls=0)
    executor = executor_of(model)
    batch: Any = torch.ones((1, 2), requires_grad=True)
    executor.add(step_of([], []), Header(), 9.0, batch)
    outcome = executor.run_one()
    assert isinstance(outcome, Finished)
    assert outcome.running.batch is batch


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), None])
def test_the_self_test_refuses_numbers_that_are_not_finite(damage: float | None) -> None:
    class Layers(Model):
        """Answers the probe with what its weights make of it."""

        def forward(self, batch: Any, caches: Any, run_layers: Any) -> Generator[ExpertCall, Tensor, Tensor]:
            assert batch.slots.tolist() == [32], "block 1 is nobody's"
            hidden = torch.ones((1, 4)) * (1.0 if damage is None else damage)
            yield ExpertCall(0, hidden, torch.zeros((1, 1), dtype=torch.int64), torch.ones(1, 1))
            return hidden

    model: Any = Layers(embedding=torch.ones(3, 4))
    executor = Executor(model, allocate_paged_memory(1, 1, (1, 4), 8, torch.float32, with_log=False))
    if damage is None:
        executor.self_test()
        return
    with pytest.raises(ValueError, match="not finite"):
        executor.self_test()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), DeviceError),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceError),
        (RankLostError("rank 1 is gone"), RankLostError),
    ],
    ids=["out of memory", "device lost", "rank lost"],
)
def test_what_takes_the_whole_stage_along_is_no_broken_step(error: Exception, raised: type[Exception]) -> None:
    class Failing(Model):
        def forward(self, batch: Any, caches: Any, run_layers: Any) -> Any:
            raise error
            yield

    executor = executor_of(Failing())
    add(executor, 1.0)
    with pytest.raises(raised, match=r"GPU|rank"):
        executor.run_one()


class Awaited:
    """Of a device that is as far when a test says so."""

    def __init__(self) -> None:
        self.is_there = False

    def is_ready(self) -> bool:
        return self.is_there


@dataclass
class DeviceModel:
    """Waits for its device before it asks its experts."""

    awaited: dict[float, Awaited] = field(default_factory=dict)

    def run_layers(self, caches: Any) -> None:
        """It has none."""

    def forward(
        self, batch: Any, caches: Any, run_layers: Any
    ) -> Generator[ExpertCall | Awaited, Tensor | None, Tensor]:
        x: Tensor = batch
        awaited = self.awaited[float(x[0, 0])] = Awaited()
        yield awaited
        answer = yield ExpertCall(0, x, torch.zeros((1, 1), dtype=torch.int64), torch.ones(1, 1))
        assert answer is not None
        return x + answer


def test_while_one_batch_waits_for_the_device_others_give_it_more_to_do() -> None:
    model: Any = DeviceModel()
    executor = executor_of(model)
    for value in (1.0, 2.0):
        add(executor, value)
    assert [executor.run_one() for _ in range(3)] == [None] * 3, "both have begun, and nothing is there yet"
    assert executor.has_work
    model.awaited[2.0].is_there = True
    add(executor, 3.0)
    running, _ = wanting(executor.run_one())
    assert running.header.step == 2, "what is there goes out before more is begun"
    assert executor.run_one() is None
    assert 3.0 in model.awaited
    executor.resume(running, torch.zeros(1, 2))
    outcome = executor.run_one()
    assert isinstance(outcome, Finished)
    assert outcome.running is running


def test_a_batch_that_is_dropped_while_the_device_is_at_it_does_not_go_on() -> None:
    model: Any = DeviceModel()
    executor = executor_of(model)
    add(executor, 1.0)
    assert executor.run_one() is None
    (running,) = executor._running
    executor.drop(running)
    model.awaited[1.0].is_there = True
    assert not executor.has_work
    assert executor.run_one() is None


def test_a_device_that_hangs_is_not_the_fault_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = DeviceModel()
    executor = executor_of(model)
    add(executor, 1.0)
    assert executor.run_one() is None

    def hangs(self: Awaited) -> bool:
        raise DeviceError("the GPU hangs")

    monkeypatch.setattr(Awaited, "is_ready", hangs)
    with pytest.raises(DeviceError):
        executor.run_one()


CHUNKS = st.lists(st.frozensets(st.integers(0, 2), max_size=2), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(chunks=CHUNKS, waits=st.booleans(), seed=st.integers(0, 1 << 32))
def test_a_later_chunk_of_a_sequence_does_each_part_after_the_earlier_one_and_others_take_turns(
    chunks: list[frozenset[int]], waits: bool, seed: int
) -> None:
    model: Any = DeviceModel() if waits else Model(calls=2)
    executor, chance = executor_of(model), random.Random(seed)
    order: list[tuple[int, int]] = []  # batch and part, as they were run
    waiting: list[RunningBatch] = []
    num_added = num_finished = 0
    while num_finished < len(chunks):
        for awaited in getattr(model, "awaited", {}).values():
            awaited.is_there = awaited.is_there or chance.random() < 0.5
        if num_added < len(chunks) and (num_added == num_finished or chance.random() < 0.5):
            num_added += 1
            add(executor, float(num_added), *chunks[num_added - 1])
        if waiting and chance.random() < 0.5:
            executor.resume(waiting.pop(chance.randrange(len(waiting))), torch.zeros(1, 2))
        before = {running: running.num_parts for running in executor._running}
        outcome = executor.run_one() if executor.has_work else None
        order += [(running.header.step - 1, parts) for running, parts in before.items() if running.num_parts > parts]
        waiting += [outcome.running] if isinstance(outcome, WantsExperts) else []
        num_finished += isinstance(outcome, Finished)
        if not waiting and num_added == len(chunks) and not waits and num_finished < num_added:
            assert executor.has_work, "the oldest can always go on"
    for (batch, part), run in zip(order, range(len(order)), strict=True):
        for later in range(batch + 1, len(chunks)):
            if not chunks[batch].isdisjoint(chunks[later]):
                assert (later, part) not in order[:run], "a chunk has overtaken the one before it"


def test_with_a_batch_that_breaks_go_those_that_need_what_it_leaves_out() -> None:
    model = Model(calls=2, breaks_at=1)
    executor = executor_of(model)
    for value, sequence_ids in ((1.0, (7,)), (2.0, (7, 8)), (3.0, (8,)), (4.0, (9,))):
        add(executor, value, *sequence_ids)
    first, second, third, other = [wanting(executor.run_one())[0] for _ in range(4)]
    for running in (second, first):
        executor.resume(running, torch.zeros(1, 2))
    assert isinstance(executor.run_one(), Broken), "the second waits for the first"
    assert (executor.num_running, executor.has_work) == (1, False)
    model.breaks_at = -1
    for running in (third, other):
        executor.resume(running, torch.zeros(1, 2))
    assert wanting(executor.run_one())[0] is other
    assert len(model.closed) == 2
