"""Each planted bug alone: it does what its name says, so that a verdict that stays green is the verdict's own fault."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.ids import NodeId, StepId
from common.messages import Dispatch, ExpertRows, Header, Message, MirrorTo, StepResult, Unassign
from common.processes.supervisor import Child, LocalMesh
from common.wire.array import array_to_frame, frame_to_array
from common.wire.call_ring import Outcome
from common.wire.transport import MessageSocket
from services.router.mesh.sockets import MeshClient
from services.router.scheduling.blocks.block_allocator import BlockAllocator
from services.router.scheduling.blocks.key_chain import KeyChain
from services.router.scheduling.blocks.prefix_cache import PrefixCache
from services.router.scheduling.blocks.session_tier import SessionTier, TierCounters
from services.stage.experts.rings import Rings
from services.stage.model.micro_batch import SamplingColumns
from services.stage.slot.early_steps import EarlySteps
from tests.chaos import planted_bugs
from tests.chaos.planted_bugs import BUGS, EVERY, module_of, with_num_rows
from tests.support.nodes.kernels import kernels_for
from tests.support.nodes.ring_nodes import ALL, RingMesh


@dataclass(frozen=True)
class Token:
    number: int
    finish_reason: str | None = None


def delivered(plant: Any, count: int) -> list[int]:
    """What comes out when so many tokens go in, one a step, the last one with a finish reason."""
    seen: list[int] = []
    deliver = plant(lambda self, outcomes: seen.extend(token.number for _, token in outcomes))
    for number in range(count):
        deliver(None, [("request", Token(number, "length" if number == count - 1 else None))])
    return seen


def test_a_dropped_token_is_missing_and_the_stream_still_ends() -> None:
    seen = delivered(planted_bugs.drop_token, EVERY + 2)
    assert seen == [number for number in range(EVERY + 2) if number != EVERY - 1]
    assert delivered(planted_bugs.drop_token, 1) == [0]


def test_a_doubled_token_comes_twice() -> None:
    assert delivered(planted_bugs.double_token, EVERY + 2).count(EVERY - 1) == 2
    assert len(delivered(planted_bugs.double_token, EVERY + 2)) == EVERY + 3


def step_result(logprobs: list[float]) -> StepResult:
    count = len(logprobs)
    return StepResult(
        array_to_frame(np.arange(count, dtype=np.int64)),
        array_to_frame(np.zeros(count, dtype=np.int32)),
        array_to_frame(np.array(logprobs, dtype=np.float32)),
        array_to_frame(np.zeros((count, 0), dtype=np.int32)),
        array_to_frame(np.zeros((count, 0), dtype=np.float32)),
    )


def test_one_bit_of_one_logprob_is_flipped_and_only_now_and_then() -> None:
    receive = planted_bugs.flip_logprob_bit(lambda self: (step_result([-1.5, -2.5]), Header()))
    seen = []
    for _ in range(EVERY):
        message, _header = receive(None)
        seen.append(frame_to_array(message.logprobs, "float32", (2,), "logprobs").view(np.int32).tolist())
    true = np.array([-1.5, -2.5], np.float32).view(np.int32).tolist()
    assert seen[:-1] == [true] * (EVERY - 1)
    assert seen[-1] == [true[0] ^ 1, true[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_row_differs_in_one_bit_and_the_log_stays_as_it_is(dtype: torch.dtype) -> None:
    log = torch.full((3, 4), 0.75, dtype=dtype)
    replayed = planted_bugs.flip_replayed_bit(lambda self, rows: log)(None, None)
    assert (replayed != log).sum() == 1
    assert (log == 0.75).all()
    assert (replayed - log).abs().max() < 0.01


def test_a_leaked_block_never_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockAllocator, "free", planted_bugs.leak_block(BlockAllocator.free))
    pool = BlockAllocator(10)
    for _ in range(10):
        blocks = pool.allocate(2)
        assert blocks is not None
        pool.free(blocks)
    assert pool.num_free == 8


def answer(call: int, rows: int, value: float) -> ExpertRows:
    return ExpertRows(call, array_to_frame(np.full((rows, 2), value, dtype=np.float32)))


def question(call: int, rows: int) -> Dispatch:
    empty = array_to_frame(np.zeros(0, dtype=np.float32))
    return Dispatch(call, empty, array_to_frame(np.zeros((3, rows), dtype=np.int32)), empty)


def test_a_late_reply_is_taken_for_the_answer_to_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr("tests.chaos.planted_bugs.time.monotonic", lambda: clock.now_s)
    monkeypatch.setattr(MessageSocket, "send", lambda self, message, header: None)
    arriving: list[Message] = []
    receive = planted_bugs.take_late_reply(lambda self: (arriving.pop(0), Header()) if arriving else None)
    socket: Any = object.__new__(MessageSocket)
    MessageSocket.send(socket, question(1, 3), Header())
    clock.now_s = 0.1
    arriving.append(answer(1, 3, 1.0))
    assert receive(socket)[0].call == 1
    MessageSocket.send(socket, question(2, 3), Header())
    clock.now_s = 1.0
    MessageSocket.send(socket, question(3, 5), Header())
    arriving.extend([answer(2, 3, 2.0), answer(3, 5, 3.0)])
    assert receive(socket)[0].call == 2, "fenced as it comes"
    taken = receive(socket)[0]
    assert (taken.call, taken.rows.shape) == (3, (5, 2))
    assert set(frame_to_array(taken.rows, "float32", (5, 2), "rows").flatten().tolist()) == {2.0}
    assert receive(socket) is None


def test_rows_are_cut_or_repeated_to_the_number_that_is_needed() -> None:
    frame = array_to_frame(np.arange(6, dtype=np.float32).reshape(3, 2))
    shorter = frame_to_array(with_num_rows(frame, 2), "float32", (2, 2), "rows")
    longer = frame_to_array(with_num_rows(frame, 4), "float32", (4, 2), "rows")
    assert shorter.tolist() == [[0, 1], [2, 3]]
    assert longer.tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]


def test_a_hedge_counts_twice_and_other_answers_once() -> None:
    taken: list[float] = []
    refusals: list[Exception] = []

    def kept(self: object, part: object, answer: torch.Tensor | Exception, now_s: float) -> None:
        if isinstance(answer, Exception):
            refusals.append(answer)
        else:
            taken.append(float(answer.sum()))

    take = planted_bugs.count_hedge_twice(kept)
    take(None, SimpleNamespace(is_hedge=False), torch.ones(2), 0.0)
    take(None, SimpleNamespace(is_hedge=True), torch.ones(2), 0.0)
    take(None, SimpleNamespace(is_hedge=True), ValueError("refused"), 0.0)
    assert taken == [2.0, 4.0]
    assert len(refusals) == 1


@dataclass(frozen=True)
class SomeRows:
    keys: torch.Tensor


def test_a_stale_sample_is_the_token_before_of_the_same_sequence_and_only_now_and_then() -> None:
    steps = EarlySteps()
    note_samples = planted_bugs.take_stale_samples(EarlySteps.note_samples)
    for number in range(1, EVERY):
        note_samples(steps, number, samples_of({1: number}))
    assert steps._samples[EVERY - 1] == {1: EVERY - 1}
    note_samples(steps, EVERY, samples_of({1: EVERY, 2: 5}))
    assert steps._samples[EVERY] == {1: EVERY - 1, 2: 5}
    note_samples(steps, EVERY + 1, samples_of({1: 4}))
    assert steps._samples[EVERY + 1] == {1: 4}


def test_a_wrong_draft_is_kept_now_and_then() -> None:
    accepted_rows = planted_bugs.keep_wrong_drafts(SamplingColumns.accepted_rows)
    nothing = np.zeros(3)
    columns = SamplingColumns(*(nothing,) * 8, drafts=np.array([5, 6, -1], dtype=np.int32))  # type: ignore[arg-type]
    for number in range(1, 8):
        token_ids = np.array([4, 6, 7], dtype=np.int32)
        rows = accepted_rows(columns, token_ids).tolist()
        assert (rows, token_ids[0]) == (([0], 4) if number < 7 else ([0, 1, 2], 5))


def samples_of(samples: dict[int, int]) -> StepResult:
    result = step_result([0.0] * len(samples))
    ids, tokens = list(samples), list(samples.values())
    return replace(
        result,
        sequence_ids=array_to_frame(np.array(ids, dtype=np.int64)),
        token_ids=array_to_frame(np.array(tokens, dtype=np.int32)),
    )


def test_rows_of_each_third_step_come_late_and_later_marks_cover_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr("tests.chaos.planted_bugs.time.monotonic", lambda: clock.now_s)
    sent: list[tuple[int, float]] = []
    memory = SimpleNamespace(rows=lambda positions: SomeRows(torch.ones(2)))
    send_rows = planted_bugs.claim_rows_that_are_on_their_way(
        lambda self, memory, positions, mark: sent.append((mark, float(memory.rows(positions).keys.sum())))
    )
    for mark in range(1, 6):
        send_rows(None, memory, None, mark)
    assert sent == [(1, 2.0), (2, 2.0), (3, 0.0), (4, 2.0), (5, 2.0)]
    clock.now_s = planted_bugs.ROWS_LATE_S
    sent.clear()
    send_rows(None, memory, None, 6)
    assert sent == [(3, 2.0), (6, 0.0)]


def test_the_third_feed_is_lost_and_nothing_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def tell(self: Any, node_id: Any, message: Any, header: Any = None) -> None:
        told.append(message)

    monkeypatch.setattr(MeshClient, "tell", tell)
    due = planted_bugs.tell_nothing_again(lambda *arguments: {"role": ["something"]})
    feeds = [MirrorTo(number, "mirror", ("tcp://mirror:1",), "") for number in range(3)]
    to_nobody = MirrorTo(9, "", (), "")
    client: Any = object.__new__(MeshClient)
    messages: list[Message] = [*feeds, to_nobody, Unassign(1)]
    for message in messages:
        MeshClient.tell(client, NodeId("holder"), message)
    assert told == [*feeds[:2], to_nobody, Unassign(1)]
    assert due(None, NodeId("holder"), ["a disagreement"], 9.0) == {}


def test_lost_socket_files_stay_lost() -> None:
    looked: list[float] = []

    def look(transport: object, now_s: float) -> bool:
        looked.append(now_s)
        return True

    assert planted_bugs.leave_files_lost(look)(None, 1.0, at_once=True) is False
    assert looked == []


def test_a_stage_that_trusts_bells_waits_for_one_and_only_where_it_waits_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Rings, "can_run", Rings.can_run)  # so that it is put back
    waited: list[float] = []

    def wait(self: object, asked: object, timeout_s: float) -> bool:
        waited.append(timeout_s)
        return True

    take_in = planted_bugs.await_bells_for_ever(wait)
    take_in(None, None)
    take_in(None, None, 0.002)
    assert waited == [0.0, planted_bugs.FOR_EVER_S]


def test_what_lies_in_the_ring_of_a_node_that_is_gone_is_used_though_it_was_never_written(tmp_path: Path) -> None:
    kernels = kernels_for("native")
    assert kernels is not None
    mesh = RingMesh(tmp_path, kernels, {"a": ALL, "b": ALL}, idle=["a", "b"])
    try:
        mesh.open_rings()
        mesh.start(mesh.call(4))
        (asked,) = mesh.client._in_rings.values()
        gone = mesh.client.nodes[mesh.number("a")]
        followed: list[Any] = []
        follow = planted_bugs.take_unfinished_answers(lambda self, asked, now_s: followed.append(asked))
        follow(mesh.client, asked, 0.0)
        assert all(part.outcome is None for part in asked.parts()), "both are there"
        gone.connected = False
        follow(mesh.client, asked, 0.0)
        parts = asked.parts()
        assert [part.outcome for part in parts if part.rows.node == gone.number] == [Outcome.GIVEN]
        assert [part.outcome for part in parts if part.rows.node != gone.number] == [None]
        assert followed == [asked, asked]
    finally:
        mesh.close()


def test_an_answer_over_a_link_whose_seal_is_wrong_is_used_as_it_is(tmp_path: Path) -> None:
    kernels = kernels_for("native")
    assert kernels is not None
    mesh = RingMesh(tmp_path, kernels, {"a": ALL}, linked=["a"], idle=["a"])
    try:
        mesh.open_rings()
        mesh.start(mesh.call(4))
        (asked,) = mesh.client._in_rings.values()
        sender, question = mesh.links["a"].raw.recv_multipart()
        rows = np.full((len(asked.pairs), asked.rows.shape[1]), 7, dtype=np.float32)
        answer = bytes(8) + question[8:16] + bytes(48) + rows.tobytes()
        mesh.links["a"].raw.send_multipart([sender, answer])
        assert mesh.rings.take_in(asked, 5.0)
        assert asked.outcome(0) is Outcome.DAMAGED
        followed: list[Any] = []
        planted_bugs.take_answers_unchecked(lambda self, asked, now_s: followed.append(asked))(mesh.client, asked, 0.0)
        assert followed == [asked]
        assert asked.outcome(0) is Outcome.GIVEN
        assert (asked.rows == 7).all()
    finally:
        mesh.close()


@pytest.mark.parametrize("name", BUGS)
def test_the_place_of_each_bug_exists(name: str) -> None:
    bug = BUGS[name]
    assert hasattr(getattr(importlib.import_module(bug.module), bug.owner), bug.function)


def test_the_launcher_runs_the_service_with_the_bug_in_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", *module_of("dropped_token")["router"].split()],
        env={name: value for name, value in os.environ.items() if name != "MODEL"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "MODEL is not set" in done.stderr


def test_a_mesh_starts_the_module_that_it_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda words, **_: started.append(words))
    mesh = LocalMesh({}, tmp_path, modules=module_of("leaked_block"))
    for service in ("router", "stage"):
        mesh._start(Child(f"{service}-0", f"services.{service}", {}, tmp_path / "log"))
    assert started[0][1:] == ["-P", "-m", "tests.chaos.planted_bugs", "leaked_block", "services.router"]
    assert started[1][1:] == ["-P", "-m", "services.stage"]


def test_keys_that_forget_the_salt_are_the_same_under_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(salt: str) -> bytes:
        return KeyChain(salt, 1).key(0, 1, lambda start, stop: [5])

    assert key("a") != key("b")
    monkeypatch.setattr(KeyChain, "__init__", planted_bugs.forget_salt(KeyChain.__init__))
    assert key("a") == key("b")


def test_an_entry_that_is_kept_names_a_block_that_somebody_else_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixCache, "evict", planted_bugs.keep_evicted(PrefixCache.evict))
    allocator = BlockAllocator(1)
    (block_id,) = allocator.allocate(1) or ()
    allocator.cache.add(b"key", block_id, 1)
    allocator.free([block_id])
    assert allocator.allocate(1) == (block_id,)
    assert allocator.cache.find(b"key") == block_id


def test_a_tier_slot_that_is_used_again_is_found_under_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SessionTier, "_free_slot", planted_bugs.reuse_tier_slot(SessionTier._free_slot))
    tier = SessionTier(8, TierCounters())
    for step, key in enumerate((b"one", b"other"), 1):
        tier.keep(key, step)
        tier.begin_step(StepId(step), {step}, ())
        tier.end_step(StepId(step), is_done=True)
    assert tier.find(b"one") == tier.find(b"other") == 0
