"""The slot that a stage holds: the newest assignment wins, and layers are loaded once."""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from common.checkpoint.model_config import read_model_config
from common.errors import CapacityError, DeadlineError, DeviceError, MoemeshError, ProtocolError, SocketError
from common.messages import AssignMirror, AssignStage, Header, MirrorReady, StageReady
from common.node.loader_thread import STUCK_S, LoaderThread
from services.stage.model.kv_cache import PagedMemory, allocate_paged_memory
from services.stage.model.loading import load_stage
from services.stage.slot import stage_worker
from services.stage.slot.layers import StageLayers
from services.stage.slot.mirror_receiver import Mirror
from services.stage.slot.mirror_sender import MirrorSender
from services.stage.slot.session_tier import SessionTier, make_session_tier
from services.stage.slot.slot import RoleRefused, RoleTaken
from services.stage.slot.stage_worker import StageWorker
from tests.support.checkpoints.tiny_checkpoints import QWEN3, write_checkpoint
from tests.support.nodes.kernels import one_torch_thread
from tests.support.nodes.memory_transport import MemorySocket, MemoryTransport
from tests.unit.stage.model.test_micro_batch import step
from tests.unit.stage.slot.test_mirror_receiver import Wire

__all__ = ["one_torch_thread"]
ASSIGN = AssignStage(0, 0, 2, 0, 2, 1, 4, ("tcp://next:1",), "")
FOLLOW = AssignMirror(0, 0, 2, 0, 2, 1, 4, ("tcp://primary:1",), "")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), QWEN3)


class Worker(StageWorker):
    def __init__(self, layers: StageLayers) -> None:
        self.transport = MemoryTransport()
        transport: Any = self.transport
        log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
        super().__init__(layers, transport, "", log)

    def take(self, message: AssignStage, generation: int = 1, dtype: torch.dtype = torch.float32) -> Any:
        return self.assign(message, Header(generation=generation), dtype)

    def finish(self) -> RoleTaken | RoleRefused | None:
        """Wait for the loader."""
        if self._loading is not None:
            self._loading.load.future.exception(timeout=60)
        return self.poll()

    @property
    def downstream(self) -> MemorySocket:
        assert self.slot is not None
        given: Any = self.slot.downstream
        assert isinstance(given, MemorySocket)
        return given


@pytest.fixture
def worker(directory: Path) -> Any:
    made = Worker(StageLayers(read_model_config(directory), directory, 64))
    yield made
    made.close()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Layer ranges that were read."""
    seen: list[Any] = []

    def counted(weights: Any, config: Any, role: Any, *rest: Any) -> Any:
        seen.append(role.layers)
        return load_stage(weights, config, role, *rest)

    monkeypatch.setattr("services.stage.slot.layers.load_stage", counted)
    return seen


def test_a_slot_is_taken_once_its_layers_are_loaded(worker: Worker) -> None:
    assert worker.poll() is None
    assert worker.take(ASSIGN, 3) is None
    outcome = worker.finish()
    assert isinstance(outcome, RoleTaken)
    assert outcome.header.generation == 3
    assert isinstance(outcome.ready, StageReady)
    assert (outcome.ready.pipeline, outcome.ready.slot, outcome.ready.lease_term) == (0, 0, 1)
    kv_values, log_values = 2 * 2 * QWEN3.kv_heads * QWEN3.head_width, QWEN3.width
    assert worker.slot is not None
    num_bytes = worker.slot.held.memory.num_bytes
    assert num_bytes == (4 + 1) * 32 * (kv_values + log_values) * 4, "and a block for self-tests"
    assert worker.slot.role.is_first
    assert worker.downstream.endpoints == ("tcp://next:1",)
    assert worker.poll() is None


def test_a_slot_that_cannot_reach_the_first_stage_is_refused_whole(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[MemorySocket] = []

    def push(name: str, endpoint: str, *, is_watched: bool = False) -> MemorySocket:
        if name.startswith("samples"):
            raise SocketError("no such endpoint")
        pushed.append(MemoryTransport.push(worker.transport, name, endpoint, is_watched=is_watched))
        return pushed[-1]

    monkeypatch.setattr(worker.transport, "push", push)
    worker.take(replace(ASSIGN, first_stage=("tcp://first:1",)))
    assert isinstance(worker.finish(), RoleRefused)
    assert worker.slot is None
    assert [socket.is_closed for socket in pushed] == [True]


def test_a_new_generation_keeps_weights_and_memory_and_says_how_far_it_is_filled(
    worker: Worker, loads: list[Any]
) -> None:
    worker.take(ASSIGN, 1)
    worker.finish()
    assert worker.slot is not None
    former, loaded, socket = worker.slot, worker.layers.loaded, worker.downstream
    former.held.watermark.begin(17, 0)
    former.held.memory.caches[0].keys.fill_(3.0)
    outcome = worker.take(replace(ASSIGN, downstream=("tcp://other:1",)), 2)
    assert isinstance(outcome, RoleTaken)
    assert isinstance(outcome.ready, StageReady)
    assert outcome.header.generation == 2
    assert outcome.ready.kv_mark == 17, "what was under way then is void, and all before it is there"
    assert socket.is_closed
    assert worker.downstream.endpoints == ("tcp://other:1",)
    assert worker.layers.loaded is loaded
    assert worker.slot.held is former.held
    router_blocks = worker.slot.held.memory.caches[0].keys[: ASSIGN.num_blocks]
    assert bool((router_blocks == 3.0).all()), "the self-test writes elsewhere"
    assert len(loads) == 1


@pytest.mark.parametrize("other", [replace(ASSIGN, num_blocks=5), replace(ASSIGN, pipeline=1)])
def test_memory_of_another_slot_or_size_is_of_no_use(worker: Worker, other: AssignStage) -> None:
    worker.take(ASSIGN, 1)
    worker.finish()
    assert worker.slot is not None
    worker.slot.held.watermark.begin(17, 0)
    outcome = worker.take(other, 2)
    assert isinstance(outcome, RoleTaken)
    assert isinstance(outcome.ready, StageReady)
    assert outcome.ready.kv_mark == 0


def test_a_mirror_takes_over_with_what_it_has_copied(worker: Worker) -> None:
    assert worker.assign(FOLLOW, Header(), torch.float32) is None
    outcome = worker.finish()
    assert isinstance(outcome, RoleTaken)
    assert outcome.ready == MirrorReady(0, 0, 1, False)
    assert worker.slot is None
    assert worker.mirror is not None
    worker.mirror.is_complete, worker.mirror.mark = True, 41
    taken = worker.take(replace(ASSIGN, lease_term=2), 2)
    assert isinstance(taken, RoleTaken)
    assert isinstance(taken.ready, StageReady)
    assert taken.ready.kv_mark == 41
    assert worker.mirror is None


def test_a_mirror_that_is_not_complete_takes_over_with_nothing(worker: Worker) -> None:
    worker.assign(FOLLOW, Header(), torch.float32)
    worker.finish()
    assert worker.mirror is not None
    worker.mirror.mark = 41
    taken = worker.take(replace(ASSIGN, lease_term=2), 2)
    assert isinstance(taken, RoleTaken)
    assert isinstance(taken.ready, StageReady)
    assert taken.ready.kv_mark == 0


def test_a_session_tier_goes_on_with_its_memory_and_is_empty_where_another_one_begins(worker: Worker) -> None:
    def since(num_tier_slots: int, generation: int) -> tuple[int, int]:
        outcome = worker.take(replace(ASSIGN, num_tier_slots=num_tier_slots), generation)
        outcome = worker.finish() if outcome is None else outcome
        assert isinstance(outcome, RoleTaken)
        assert isinstance(outcome.ready, StageReady)
        assert worker.slot is not None
        assert worker.slot.held.tier.num_slots == num_tier_slots
        return outcome.ready.tier_since, outcome.ready.kv_mark

    assert since(3, 1) == (0, 0)
    assert worker.slot is not None
    tier = worker.slot.held.tier
    worker.slot.held.watermark.begin(17, 0)
    assert since(3, 2) == (0, 17)
    assert worker.slot.held.tier is tier
    assert since(2, 3) == (17, 17), "another size"
    assert since(0, 4) == (17, 17)


def test_a_session_tier_without_room_costs_no_slot_and_the_one_before_it_makes_room_first(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def num_slots(wanted: int, generation: int) -> int:
        outcome = worker.take(replace(ASSIGN, num_tier_slots=wanted), generation)
        outcome = worker.finish() if outcome is None else outcome
        assert isinstance(outcome, RoleTaken)
        assert isinstance(outcome.ready, StageReady)
        assert worker.slot is not None
        assert worker.slot.held.tier.num_slots == outcome.ready.num_tier_slots
        return outcome.ready.num_tier_slots

    too_many = 1 << 40
    assert num_slots(too_many, 1) == 0
    assert num_slots(3, 2) == 3
    assert worker.slot is not None
    former = weakref.ref(worker.slot.held.tier)
    is_gone = list[bool]()

    def watched(memory: PagedMemory, num_slots: int, since: int) -> SessionTier:
        is_gone.append(former() is None)
        return make_session_tier(memory, num_slots, since)

    monkeypatch.setattr(stage_worker, "make_session_tier", watched)
    assert num_slots(5, 3) == 5
    assert is_gone == [False, True], "the first of these has no slots"


def test_a_mirror_that_takes_over_has_an_empty_session_tier(worker: Worker) -> None:
    worker.assign(FOLLOW, Header(), torch.float32)
    worker.finish()
    assert worker.mirror is not None
    worker.mirror.is_complete, worker.mirror.mark = True, 41
    for generation in (2, 3):  # the first may never have opened
        taken = worker.take(replace(ASSIGN, lease_term=2, num_tier_slots=3), generation)
        assert isinstance(taken, RoleTaken)
        assert isinstance(taken.ready, StageReady)
        assert (taken.ready.tier_since, taken.ready.kv_mark) == (41, 41)


def memory_of_another_holder() -> PagedMemory:
    kv_shape = QWEN3.kv_heads, QWEN3.head_width
    return allocate_paged_memory(2, ASSIGN.num_blocks, kv_shape, QWEN3.width, torch.float32, with_log=True)


def copy(source: PagedMemory, used_blocks: list[int], mirror: Mirror, rows: list[int]) -> None:
    """What a holder sends to a mirror that has just connected, and then of a step that writes `rows`."""
    wire = Wire()
    given: Any = wire
    sender = MirrorSender(given, 0, FOLLOW.lease_term, attempt=1)
    sender.begin(used_blocks)
    while sender.wants_to_send:
        sender.send_blocks(source, mark=41)
    sender.send_rows(source, torch.tensor(rows, dtype=torch.int64), mark=42)
    for message in wire.waiting:
        mirror.apply(*message)


def test_the_mirror_of_a_former_mirror_gets_all_that_was_copied_before_any_step_has_told_whose_it_is(
    worker: Worker,
) -> None:
    first = memory_of_another_holder()
    for cache in first.caches:
        cache.keys[[0, 2]] = 1.0
        cache.values[[0, 2]] = 2.0
        cache.keys[1, :, :, 5] = 3.0
    worker.assign(FOLLOW, Header(), torch.float32)
    worker.finish()
    assert worker.mirror is not None
    copy(first, [0, 2], worker.mirror, rows=[32 + 5])
    worker.take(replace(ASSIGN, lease_term=2), 2)
    assert worker.slot is not None
    held, back = worker.slot.held, Wire()
    given: Any = back
    second = Mirror(FOLLOW, 0, memory_of_another_holder(), given, worker._log)
    copy(held.memory, held.tables.used_blocks(), second, rows=[])
    assert (second.is_complete, second.mark) == (True, 42)
    for cache, copied in zip(first.caches, second.memory.caches, strict=True):
        assert torch.equal(cache.keys[: ASSIGN.num_blocks], copied.keys[: ASSIGN.num_blocks])
        assert torch.equal(cache.values[: ASSIGN.num_blocks], copied.values[: ASSIGN.num_blocks])


def test_a_copy_that_was_not_complete_is_not_copied_on(worker: Worker) -> None:
    worker.assign(FOLLOW, Header(), torch.float32)
    worker.finish()
    assert worker.mirror is not None
    worker.mirror.written_blocks.add(2)
    worker.take(replace(ASSIGN, lease_term=2), 2)
    assert worker.slot is not None
    assert worker.slot.held.tables.used_blocks() == []


def test_a_former_holder_that_mirrors_its_slot_knows_of_none_of_its_sequences_any_more(worker: Worker) -> None:
    worker.take(ASSIGN, 1)
    worker.finish()
    assert worker.slot is not None
    worker.slot.held.tables.apply(step([(7, 0, 5, 0, 1, 0)], [3]))
    assert isinstance(worker.assign(FOLLOW, Header(), torch.float32), RoleTaken)
    worker.take(replace(ASSIGN, lease_term=2), 2)
    assert len(worker.slot.held.tables) == 0


def test_a_new_generation_while_the_same_layers_load_does_not_load_them_again(worker: Worker, loads: list[Any]) -> None:
    for generation in (1, 2, 3):
        assert worker.take(replace(ASSIGN, lease_term=generation), generation) is None
    outcome = worker.finish()
    assert isinstance(outcome, RoleTaken)
    assert (outcome.header.generation, outcome.ready.lease_term) == (3, 3)
    assert loads == [(0, 2)]


def test_other_layers_replace_those_that_are_loading(worker: Worker, loads: list[Any]) -> None:
    worker.take(ASSIGN, 1)
    worker.take(replace(ASSIGN, slot=1, first_layer=2, stop_layer=5), 2)
    outcome = worker.finish()
    assert isinstance(outcome, RoleTaken)
    assert outcome.header.generation == 2
    assert worker.slot is not None
    assert worker.slot.role.layers == (2, 5)
    assert worker.slot.role.is_last


def test_another_incarnation_has_the_layers_of_the_one_before_and_none_of_its_cache(
    worker: Worker, loads: list[Any]
) -> None:
    worker.take(ASSIGN, 1)
    worker.finish()
    assert worker.slot is not None
    worker.slot.held.watermark.begin(7, 0)
    worker.slot.held.watermark.finish(7)
    following = Worker(worker.layers)
    outcome = following.take(ASSIGN, 2)
    assert isinstance(outcome, RoleTaken)
    assert isinstance(outcome.ready, StageReady)
    assert outcome.ready.kv_mark == 0
    assert loads == [(0, 2)], "read once"
    following.close()


def test_another_dtype_is_another_load(worker: Worker, loads: list[Any]) -> None:
    worker.take(ASSIGN, 1)
    worker.finish()
    assert worker.take(ASSIGN, 2, torch.bfloat16) is None
    assert isinstance(worker.finish(), RoleTaken)
    assert len(loads) == 2
    assert worker.layers.loaded is not None
    assert worker.layers.loaded.model.layers[0].half.input_norm.weight.dtype == torch.bfloat16


def test_a_load_that_hangs_ends_the_node_also_when_its_slot_was_taken_away(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, release = [100.0], threading.Event()
    worker.layers.thread = LoaderThread(lambda: now_s[0], lambda thread: 0.5)
    monkeypatch.setattr("services.stage.slot.layers.load_stage", lambda *given: release.wait(timeout=60))
    worker.take(ASSIGN, 1)
    worker.leave()

    def look_for(seconds: float) -> None:
        for _ in range(round(seconds)):
            now_s[0] += 1.0
            assert worker.poll() is None

    look_for(STUCK_S - 1)
    with pytest.raises(DeadlineError, match="the disk of the checkpoint hangs"):
        look_for(2)
    release.set()


def test_whoever_is_let_go_while_it_loads_takes_nothing(worker: Worker) -> None:
    worker.take(ASSIGN, 1)
    worker.leave()
    assert worker.finish() is None
    assert worker.slot is None
    worker.take(ASSIGN, 2)
    assert isinstance(worker.finish(), RoleTaken)


def test_leaving_closes_the_link_downstream(worker: Worker) -> None:
    worker.take(ASSIGN, 1)
    worker.finish()
    socket = worker.downstream
    worker.leave()
    assert socket.is_closed
    assert worker.slot is None
    assert isinstance(worker.take(ASSIGN, 2), RoleTaken), "the weights have stayed"


@pytest.mark.parametrize(
    "changes",
    [
        {"stop_layer": 6},
        {"first_layer": 2},
        {"first_layer": 3, "stop_layer": 2},
        {"num_blocks": 0},
        {"slot": 2},
        {"num_slots": 0},
    ],
    ids=str,
)
def test_an_assignment_that_makes_no_sense_is_refused_and_changes_nothing(
    worker: Worker, changes: dict[str, int]
) -> None:
    worker.take(ASSIGN, 1)
    worker.finish()
    with pytest.raises(ProtocolError):
        worker.take(replace(ASSIGN, **changes), 2)  # type: ignore[arg-type]
    assert worker.slot is not None
    assert worker.slot.role.generation == 1


def test_what_cannot_be_loaded_is_refused_with_the_reason_and_may_be_tried_again(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise MemoryError("not enough")

    with monkeypatch.context() as patched:
        patched.setattr("services.stage.slot.layers.load_stage", broken)
        worker.take(ASSIGN, 4)
        outcome = worker.finish()
    assert isinstance(outcome, RoleRefused)
    assert isinstance(outcome.error, MoemeshError)
    assert "not enough" in str(outcome.error)
    assert outcome.header.generation == 4
    assert worker.slot is None
    worker.take(ASSIGN, 5)
    assert isinstance(worker.finish(), RoleTaken)


def test_a_downstream_that_cannot_be_reached_is_refused(worker: Worker) -> None:
    worker.take(replace(ASSIGN, downstream=("ipc:///elsewhere",)), 1)
    outcome = worker.finish()
    assert isinstance(outcome, RoleRefused)
    assert "tcp" in str(outcome.error)
    assert isinstance(worker.take(ASSIGN, 2), RoleTaken)


def test_a_slot_that_does_not_fit_the_gpu_is_refused_and_one_on_a_lost_gpu_ends_the_process(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> None:
        def load(*arguments: Any) -> Any:
            raise error

        monkeypatch.setattr("services.stage.slot.layers.load_stage", load)
        worker.take(ASSIGN)

    fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    outcome = worker.finish()
    assert isinstance(outcome, RoleRefused)
    assert isinstance(outcome.error, CapacityError)
    assert "the GPU has no room for it, set CAPACITY_BYTES lower: CUDA out of memory" in str(outcome.error)
    fail(RuntimeError("CUDA error: unspecified launch failure"))
    with pytest.raises(DeviceError, match="the GPU has failed: CUDA error: unspecified launch failure"):
        worker.finish()
