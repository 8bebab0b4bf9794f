"""The stage's loop, as far as it needs no socket: what an assignment does to what was under way."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch

from common.checkpoint.model_config import read_model_config
from common.errors import ExecutionError
from common.messages import (
    AWAITED_TOKEN,
    NO_ARRAY,
    AssignMirror,
    AssignStage,
    Header,
    Message,
    MirrorReady,
    MirrorRows,
    MirrorTo,
    StageReady,
    Step,
    TensorFrame,
    Unassign,
)
from common.node.loop import LEAVE_DEADLINE_S
from common.node.process import NodeProcess
from common.topology import StageState
from common.wire.array import array_to_frame, frame_to_array
from common.wire.tensor import tensor_to_frame
from common.wire.transport import LinkEvent
from services.stage import service
from services.stage.experts.client import ExpertClient
from services.stage.experts.nodes import ExpertNodes
from services.stage.service import KEEP_STATE_S, StageService
from services.stage.slot.layers import StageLayers
from services.stage.slot.mirror_sender import BACKFILL_BLOCKS
from services.stage.slot.stage_worker import StageWorker
from services.stage.step_output import EMPTY_RESULT
from tests.support.checkpoints.tiny_checkpoints import QWEN3, write_checkpoint
from tests.support.nodes.kernels import one_torch_thread
from tests.support.nodes.listening_router import HELLO, ListeningRouter
from tests.support.nodes.memory_transport import MemorySocket, MemoryTransport
from tests.unit.stage.model.test_micro_batch import step

__all__ = ["one_torch_thread"]
ASSIGN = AssignStage(0, 0, 2, 0, 2, 1, 40, ("tcp://next:1",), "")
LAST = AssignStage(0, 1, 2, 2, 4, 1, 40, ("tcp://router:1",), "", ("tcp://first:1",), "")
SAMPLED = replace(
    EMPTY_RESULT,
    sequence_ids=array_to_frame(np.array([7], dtype=np.int64)),
    token_ids=array_to_frame(np.array([5], dtype=np.int32)),
)
"""What a step of sequence 7 has sampled."""
FOLLOW = AssignMirror(0, 0, 2, 0, 2, 1, 40, ("tcp://holder:1",), "")
FEED, FEED_NUMBER = MirrorTo(1, "stage-9", ("tcp://mirror:1",), ""), 7


class Stage(StageService):
    """A stage whose turns the test takes."""

    def __init__(self, directory: Path) -> None:
        self.transport, self.control = MemoryTransport(), ListeningRouter()
        transport: Any = self.transport
        control: Any = self.control
        self.upstream = MemorySocket("steps", "tcp://own:1")
        self.num_steps_sent = self.last_step = 0
        steps: Any = self.upstream
        log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
        config = read_model_config(directory)
        self.worker = StageWorker(StageLayers(config, directory, 64), transport, "", log)
        experts = ExpertClient(ExpertNodes(transport, "", config.num_experts, log), log)
        nobody: Any = None
        super().__init__(NodeProcess(transport, control, nobody, steps, "", log), self.worker, experts, lambda: 100.0)

    def hear(self, message: Message, generation: int = 0) -> None:
        self.control.asked.append((message, Header(generation=generation)))
        self._receive_control(100.0)
        if self.worker._loading is not None:
            self.worker._loading.load.future.exception(timeout=60)
        self._answer_assignment(self.worker.poll())

    def get_step(self, message: Step, generation: int, number: int) -> None:
        """One more of this generation comes from upstream; nothing else."""
        self.num_steps_sent += 1
        message = replace(message, previous_step=self.last_step)
        self.last_step = number
        header = Header(generation=generation, step=number, sequence_number=self.num_steps_sent, time_left_ms=1000)
        self.upstream.say(message, header)

    @property
    def held_sequences(self) -> dict[int, list[int]]:
        """Blocks by sequence, as they are now."""
        assert self.worker.slot is not None
        return {number: table.tolist() for number, table in self.worker.slot.held.tables._tables.items()}

    def take_slot(self, message: AssignStage, generation: int) -> None:
        self.control.sent.clear()
        self.hear(message, generation)
        (ready,) = self.control.sent
        assert isinstance(ready, StageReady)

    def follow(self, num_used_blocks: int) -> MemorySocket:
        """Have a mirror that has got the first few of these blocks; the socket to it."""
        assert self.worker.slot is not None
        self.worker.slot.held.tables._tables[1] = torch.arange(num_used_blocks, dtype=torch.int32).numpy()
        self.hear(FEED, FEED_NUMBER)
        socket = self.transport.sockets["mirror stage-9"]
        socket.events.append(LinkEvent.CONNECTED)
        self._feed_mirror(100.0)
        ((message, _),) = socket.take_sent()
        assert isinstance(message, MirrorRows)
        assert not message.is_last
        return socket

    def get_rows(self, number: int, *, lease_term: int = FOLLOW.lease_term, is_last: bool = False) -> None:
        """The holder's first stream brings its message of this number, with one row."""
        assert self.worker.mirror is not None
        positions = torch.tensor([3])
        rows = self.worker.mirror.memory.rows(positions)
        frames = (tensor_to_frame(part) for part in (positions, rows.keys, rows.values, rows.hidden))
        header = Header(attempt=1, sequence_number=number)
        self.upstream.say(MirrorRows(lease_term, 5, is_last, *frames), header)
        self._receive_steps(100.0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), QWEN3)


@pytest.fixture
def stage(directory: Path) -> Iterator[Stage]:
    made = Stage(directory)
    yield made
    made.worker.close()


def test_a_mirror_is_not_filled_from_memory_that_is_no_more(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 1)
    socket = stage.follow(40)
    stage.take_slot(replace(ASSIGN, num_blocks=BACKFILL_BLOCKS), 2)
    stage._feed_mirror(101.0)
    assert socket.is_closed
    assert not socket.sent


def test_memory_is_let_go_before_other_is_allocated(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.take_slot(ASSIGN, 1)
    assert stage.worker.slot is not None
    former = weakref.ref(stage.worker.slot.held.memory)
    is_gone: list[bool] = []
    allocate = stage.worker.layers.allocate

    def watched(*arguments: Any, **named: Any) -> Any:
        is_gone.append(former() is None)
        return allocate(*arguments, **named)

    monkeypatch.setattr(stage.worker.layers, "allocate", watched)
    stage.take_slot(replace(ASSIGN, num_blocks=20), 2)
    assert is_gone == [True]


def test_a_back_fill_goes_on_in_a_new_generation_of_the_same_memory(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 1)
    socket = stage.follow(40)
    stage.take_slot(ASSIGN, 2)
    for turn in range(4):
        stage._feed_mirror(101.0 + turn)
    assert [message.is_last for message, _ in socket.take_sent()] == [False, False, False, True]


def test_from_a_hello_to_the_next_assignment_no_step_is_taken(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 1)
    stage.get_step(step([(7, 0, 5, 0, 1, 0)], [3]), 1, 10)
    stage._receive_steps(100.0)
    reported = stage.control.add_held(HELLO)
    assert frame_to_array(reported.held_sequences, "int64", (1, 3), "sequences")[0, 0] == 7
    # The router that was replaced gives the block to another sequence; the step was still on its way.
    stage.get_step(step([(8, 0, 5, 0, 1, 0)], [3], released=[7]), 1, 11)
    stage._receive_steps(100.0)
    assert stage.held_sequences == {7: [3]}, "what was reported is there"
    assert stage._counters.dropped == 1
    assert stage.worker.slot is not None
    assert stage.worker.slot.executor.num_running == 1


def test_steps_that_wait_when_the_assignment_comes_do_not_touch_what_was_reported(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 1)
    stage.get_step(step([(7, 0, 5, 0, 1, 0)], [3]), 1, 10)
    stage._receive_steps(100.0)
    stage.get_step(step([(8, 0, 5, 0, 1, 0)], [3], released=[7]), 1, 11)
    stage.take_slot(ASSIGN, 2)
    assert stage.held_sequences == {7: [3]}


def test_steps_are_taken_again_after_the_assignment(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 1)
    stage.control.add_held(HELLO)
    stage.take_slot(ASSIGN, 2)
    stage.get_step(step([(7, 0, 5, 0, 1, 0)], [3]), 2, 12)
    stage._receive_steps(100.0)
    assert stage.held_sequences == {7: [3]}
    assert stage._counters.dropped == 0


def test_a_step_at_which_reading_breaks_costs_that_step_and_not_the_stage(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise IndexError("a number that nobody thought of")

    stage.take_slot(ASSIGN, 1)
    with monkeypatch.context() as patch:
        patch.setattr(service, "read_micro_batch", breaks)
        stage.get_step(step([(7, 0, 5, 0, 1, 0)], [3]), 1, 10)
        stage._receive_steps(100.0)
    assert stage.control.failures == ["computing failed: a number that nobody thought of"]
    stage.get_step(step([(8, 0, 5, 0, 1, 0)], [4]), 1, 11)
    stage._receive_steps(100.0)
    assert stage.held_sequences == {8: [4]}


def pairs(*wanted: tuple[int, int]) -> TensorFrame:
    return array_to_frame(np.array(wanted, dtype=np.int32))


def test_a_step_saves_and_brings_back_blocks_before_it_is_computed_and_its_mirror_gets_them(stage: Stage) -> None:
    stage.take_slot(replace(ASSIGN, num_tier_slots=2), 1)
    assert stage.worker.slot is not None
    held = stage.worker.slot.held
    held.memory.caches[0].keys[3].fill_(3.0)
    held.memory.log[3 * 32 : 4 * 32].fill_(5.0)
    stage.get_step(replace(step([], []), saves=pairs((3, 1))), 1, 10)
    stage._receive_steps(100.0)
    held.memory.caches[0].keys[3].fill_(4.0)
    mirror = stage.follow(BACKFILL_BLOCKS + 1)
    stage.get_step(replace(step([], []), saves=pairs((3, 0)), restores=pairs((1, 3), (0, 5))), 1, 11)
    stage._receive_steps(100.0)
    keys = held.memory.caches[0].keys
    assert [bool((keys[block] == value).all()) for block, value in ((3, 3.0), (5, 4.0))] == [True, True]
    assert bool((held.memory.log[3 * 32 : 4 * 32] == 5.0).all())
    assert {3, 5} <= set(held.tables.used_blocks()), "a mirror that joins is filled with them"
    stage._run_what_can()
    *_, (message, _) = mirror.take_sent()
    assert isinstance(message, MirrorRows)
    assert message.mark == 11
    positions = frame_to_array(message.positions, "int64", (None,), "positions")
    assert positions.tolist() == [*range(96, 128), *range(160, 192)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"saves": pairs((40, 0))},
        {"saves": pairs((0, 2))},
        {"restores": pairs((2, 0))},
        {"restores": pairs((0, 0)), "computing_slots": (0,)},
    ],
)
def test_a_step_that_copies_from_or_to_a_place_that_is_not_there_fails(stage: Stage, wrong: dict[str, Any]) -> None:
    stage.take_slot(replace(ASSIGN, num_tier_slots=2), 1)
    stage.get_step(replace(step([], []), **wrong), 1, 10)
    stage._receive_steps(100.0)
    assert len(stage.control.failures) == 1


def awaiting_step(awaited_step: int) -> Step:
    """Sequence 7 goes on, after the token that a step samples."""
    awaited = array_to_frame(np.array([AWAITED_TOKEN], dtype=np.int32))
    return replace(step([(7, 5, 1, 0, 1, 1)], [3]), hidden=awaited, awaited_step=awaited_step)


def test_a_step_begins_once_the_last_stage_has_told_its_tokens_and_not_before_those_it_was_sent_behind(
    stage: Stage,
) -> None:
    stage.take_slot(ASSIGN, 1)
    stage.get_step(awaiting_step(10), 1, 11)
    stage.get_step(step([(8, 0, 5, 0, 1, 0)], [4]), 1, 12)
    stage._receive_steps(100.0)
    assert stage.held_sequences == {}
    assert stage._load().queued == 0, "what waits for a token that was lost is not at work"
    stage.upstream.say(SAMPLED, Header(generation=1, step=10))
    stage._receive_steps(100.0)
    assert stage.held_sequences == {7: [3], 8: [4]}
    assert stage.worker.slot is not None
    (batch, _) = (running.batch for running, _ in stage.worker.slot.executor._runnable)
    assert batch.hidden.tolist() == [5]
    assert stage.control.failures == []


def test_the_time_of_a_step_runs_from_when_it_has_its_tokens(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 1)
    stage.get_step(awaiting_step(10), 1, 11)
    stage._receive_steps(100.0)
    stage.upstream.say(SAMPLED, Header(generation=1, step=10))
    stage._receive_steps(150.0)
    assert stage.worker.slot is not None
    ((running, _),) = stage.worker.slot.executor._runnable
    assert running.deadline_s == 150.0 + running.header.time_left_ms / 1000


def test_tokens_of_another_generation_are_dropped(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 2)
    stage.get_step(awaiting_step(10), 2, 11)
    stage.upstream.say(SAMPLED, Header(generation=1, step=10))
    stage._receive_steps(100.0)
    assert stage.held_sequences == {}
    assert stage._counters.dropped == 1


def test_steps_that_wait_for_tokens_end_with_their_generation(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 1)
    stage.get_step(awaiting_step(10), 1, 11)
    stage._receive_steps(100.0)
    stage.take_slot(ASSIGN, 2)
    stage.upstream.say(SAMPLED, Header(generation=2, step=10))
    stage._receive_steps(100.0)
    assert stage.held_sequences == {}


def test_a_step_whose_token_will_never_come_fails(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 1)
    stage.get_step(awaiting_step(10), 1, 11)
    stage.upstream.say(EMPTY_RESULT, Header(generation=1, step=10))
    stage._receive_steps(100.0)
    assert stage.control.failures == ["step 10 has sampled no token of sequence 7"]


def test_a_step_without_its_tokens_does_not_begin_between_a_hello_and_the_assignment(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 1)
    stage.get_step(awaiting_step(10), 1, 11)
    stage._receive_steps(100.0)
    stage.control.add_held(HELLO)
    assert stage.worker.slot is not None
    stage.worker.slot.early_steps.note_samples(10, SAMPLED)
    stage._begin_steps(100.0)
    assert stage.held_sequences == {}


def test_the_last_stage_tells_the_first_what_it_has_sampled_as_soon_as_that_takes_it(stage: Stage) -> None:
    stage.take_slot(LAST, 1)
    assert stage.worker.slot is not None
    place = stage.worker.slot.role.slot
    first, router = stage.transport.sockets[f"samples of {place}"], stage.transport.sockets[f"after {place}"]
    first.takes_messages = False
    stage._send_on(SAMPLED, Header(generation=1, step=10), 101.0)
    assert [header.step for _, header in router.take_sent()] == [10], "the router does not wait for that"
    stage._send_on(SAMPLED, Header(generation=1, step=11), 101.0)
    first.takes_messages = True
    stage._send_unsent(100.0)
    ((told, header),) = first.take_sent()
    assert (header.step, header.generation) == (11, 1), "the newest"
    assert told == SAMPLED
    stage.take_slot(LAST, 2)
    assert first.is_closed


def test_a_lone_stage_goes_on_with_its_own_tokens(stage: Stage) -> None:
    stage.take_slot(replace(ASSIGN, num_slots=1, stop_layer=4), 1)
    stage.get_step(awaiting_step(10), 1, 11)
    stage._receive_steps(100.0)
    stage._send_on(SAMPLED, Header(generation=1, step=10), 101.0)
    stage._receive_steps(100.0)
    assert stage.held_sequences == {7: [3]}


@pytest.mark.parametrize(("num_steps", "may_run_on"), [(1, True), (2, False)])
def test_a_batch_runs_on_from_layer_to_layer_only_while_it_is_alone(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, num_steps: int, may_run_on: bool
) -> None:
    """Of two one may have a later chunk of the other's sequence, and must not pass it."""
    times_s: list[float] = []
    monkeypatch.setattr(stage._experts, "await_answer", lambda number, clock, until_s: times_s.append(until_s))
    stage.take_slot(ASSIGN, 1)
    for number in range(num_steps):
        stage.get_step(step([(7 + number, 0, 5, 0, 1, 0)], [3 + number]), 1, 10 + number)
    stage._receive_steps(100.0)
    assert stage.worker.slot is not None
    stage._run(stage.worker.slot)
    assert stage.worker.slot.executor.num_running == num_steps
    assert [until_s > 100.0 for until_s in times_s] == [may_run_on]


def test_a_stage_does_not_wait_for_an_older_call_when_one_could_not_begin(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(stage._experts, "await_answer", lambda number, clock, until_s: waited.append(number))
    stage.take_slot(ASSIGN, 1)
    assert stage.worker.slot is not None
    stage.get_step(step([(7, 0, 5, 0, 1, 0)], [3]), 1, 10)
    stage._receive_steps(100.0)
    stage._run(stage.worker.slot)
    assert waited == [1]

    def fails(*_: object) -> int:
        raise ExecutionError("the placement has no such layer")

    monkeypatch.setattr(stage._experts, "start", fails)
    stage.get_step(step([(8, 0, 5, 0, 1, 0)], [4]), 1, 11)
    stage._receive_steps(100.0)
    stage._run(stage.worker.slot)
    assert waited == [1]
    assert stage.control.failures == ["the placement has no such layer"]


def test_a_role_that_is_told_again_loads_nothing_and_goes_on(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 1)
    slot = stage.worker.slot
    stage.get_step(step([(7, 0, 5, 0, 1, 0)], [3]), 1, 10)
    stage._receive_steps(100.0)
    stage.hear(ASSIGN, 1)
    assert stage.worker.slot is slot
    assert slot is not None
    assert slot.executor.num_running == 1
    assert stage._counters.dropped == 0


@pytest.mark.parametrize("late", [ASSIGN, replace(FOLLOW, lease_term=9), Unassign(9)], ids=lambda m: type(m).__name__)
def test_a_role_that_comes_after_a_newer_one_changes_nothing(stage: Stage, late: Message) -> None:
    stage.take_slot(replace(ASSIGN, lease_term=2), 5)
    slot = stage.worker.slot
    stage.hear(late, 4)
    assert stage.worker.slot is slot
    assert stage._counters.dropped == 1


def test_a_heartbeat_says_what_the_stage_believes(stage: Stage) -> None:
    assert stage._load().role_state == StageState.SPARE
    stage.take_slot(ASSIGN, 3)
    stage.follow(40)
    said = stage._load()
    assert (said.role_number, said.role_state, said.lease_term) == (3, StageState.HOLDING, 1)
    assert said.feed_number == FEED_NUMBER
    stage.hear(FOLLOW, 8)
    said = stage._load()
    assert (said.role_number, said.role_state, said.feed_number) == (8, StageState.FILLING, 0)
    assert stage.worker.mirror is not None
    stage.worker.mirror.is_complete = True
    assert stage._load().role_state == StageState.COMPLETE
    stage.hear(Unassign(1), 9)
    assert (stage._load().role_number, stage._load().role_state) == (0, StageState.SPARE)


def test_rows_that_the_mirror_does_not_follow_are_counted_and_not_copied(stage: Stage) -> None:
    stage.hear(FOLLOW, 8)
    stage.control.sent.clear()
    stage.get_rows(1, lease_term=FOLLOW.lease_term - 1, is_last=True)
    assert stage._counters.dropped == 1
    assert stage._load().role_state == StageState.FILLING
    assert stage.control.sent == []
    stage.get_rows(1, is_last=True)
    assert stage._counters.dropped == 1
    assert stage._load().role_state == StageState.COMPLETE


def test_rows_that_come_when_there_is_no_mirror_any_more_are_counted(stage: Stage) -> None:
    stage.hear(FOLLOW, 8)
    stage.upstream.say(MirrorRows(FOLLOW.lease_term, 5, True, *[NO_ARRAY] * 4), Header(attempt=1, sequence_number=1))
    stage.hear(Unassign(1), 9)
    stage._receive_steps(100.0)
    assert stage._counters.dropped == 1


@pytest.mark.parametrize(
    ("number", "is_last", "becomes"),
    [
        pytest.param(2, True, MirrorReady(0, 0, 1, is_complete=True), id="complete"),
        pytest.param(3, False, MirrorReady(0, 0, 1, is_complete=False, broken_stream=1), id="spoilt"),
    ],
)
def test_the_router_hears_once_what_has_become_of_a_copy_and_of_which_role(
    stage: Stage, number: int, is_last: bool, becomes: MirrorReady
) -> None:
    stage.hear(FOLLOW, 8)
    stage.control.sent.clear()
    stage.get_rows(1)
    assert stage.control.sent == [], "neither whole nor spoilt"
    stage.get_rows(number, is_last=is_last)
    assert stage.control.sent == [becomes]
    assert stage.control.last_header == Header(generation=8)
    stage.get_rows(number + 1)
    assert stage.control.sent == [becomes]
    assert stage._counters.dropped == 0


def test_a_role_that_cannot_be_taken_is_said_to_be_refused(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 1)
    stage.hear(replace(ASSIGN, stop_layer=99), 2)
    said = stage._load()
    assert (said.role_number, said.role_state) == (2, StageState.REFUSED)


def test_a_mirror_that_is_fed_already_is_not_filled_anew_when_that_is_told_again(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 1)
    socket = stage.follow(40)
    stage.hear(FEED, FEED_NUMBER)
    assert not socket.is_closed
    stage.hear(FEED, FEED_NUMBER - 1)
    assert not socket.is_closed, "one from before that"
    stage.hear(FEED, FEED_NUMBER + 1)
    assert socket.is_closed, "from the beginning"


def test_a_feed_that_ended_with_the_memory_is_begun_again_when_it_is_told_again(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 1)
    stage.follow(40)
    stage.take_slot(replace(ASSIGN, num_blocks=BACKFILL_BLOCKS), 2)
    assert stage._load().feed_number == 0
    stage.hear(FEED, FEED_NUMBER)
    assert stage._load().feed_number == FEED_NUMBER


def test_what_is_held_without_a_router_is_kept_for_its_time_and_no_longer(stage: Stage) -> None:
    stage.take_slot(ASSIGN, 1)
    stage.control.registered = True
    stage._forget_after_long_silence(200.0)
    stage.control.registered = False
    stage._forget_after_long_silence(200.0 + KEEP_STATE_S)
    assert stage.worker.slot is not None, "K and V may belong to requests that a restarted router goes on with"
    stage._forget_after_long_silence(200.1 + KEEP_STATE_S)
    assert stage.worker.slot is None


def test_a_stage_that_nobody_lets_go_goes_at_the_end_of_its_patience(stage: Stage) -> None:
    now_s = [100.0]
    stage._clock = lambda: now_s[0]
    stage.control.registered = True
    turns: list[float] = []

    def should_stop() -> bool:
        now_s[0] += 1.0
        turns.append(now_s[0])
        return True

    stage._watch_sockets = lambda: None  # type: ignore[method-assign]
    stage.run(should_stop)
    assert turns[-1] - turns[0] == pytest.approx(LEAVE_DEADLINE_S, abs=2.0)
