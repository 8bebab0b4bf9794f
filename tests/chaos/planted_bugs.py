"""The product with a bug planted in it, to see whether the harness finds it:

    python -m tests.chaos.planted_bugs dropped_token services.router

A bug replaces one function before the service starts; the product has no switch for it. Bugs strike now and then, not
at fixed places of a request: two runs that had them at the same places would agree with each other.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import runpy
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.messages import Dispatch, ExpertRows, Header, Message, MirrorTo, StepResult, TensorFrame
from common.wire.array import array_to_frame, frame_to_array
from common.wire.call_ring import HEAD_BYTES, SLOTS, Outcome
from common.wire.transport import MessageSocket

EVERY = 53
"""A bug of the router strikes at each so many-th occasion: often enough for a short run, in any order of requests."""
LATE_S = 0.3
"""An answer to an expert call that took longer is late: something was hurt."""
NUM_SLOTS = 2
"""Of the mesh that is hurt."""
FOR_EVER_S = 3600.0
ROWS_LATE_S = 1.0
"""By so much the rows of an overtaken step come late, longer than most requests wait between two steps."""


def hit_now_and_then(every: int = EVERY) -> Callable[[], bool]:
    """True at each `every`-th call."""
    calls = itertools.count(1)
    return lambda: next(calls) % every == 0


# ---- what is replaced, each: the function as it is -> the function with the bug


def drop_token(deliver: Callable[..., None]) -> Callable[..., None]:
    """A token is made, and the client never gets it."""
    hit = hit_now_and_then()

    def planted(self: Any, outcomes: Iterable[Any]) -> None:
        deliver(self, [entry for entry in outcomes if not (_is_inner_token(entry) and hit())])

    return planted


def double_token(deliver: Callable[..., None]) -> Callable[..., None]:
    """The client gets a token twice."""
    hit = hit_now_and_then()

    def planted(self: Any, outcomes: Iterable[Any]) -> None:
        deliver(
            self, [again for entry in outcomes for again in [entry] * (2 if _is_inner_token(entry) and hit() else 1)]
        )

    return planted


def flip_logprob_bit(receive: Callable[..., Any]) -> Callable[..., Any]:
    """The lowest mantissa bit of one logprob of a step's result."""
    hit = hit_now_and_then()

    def planted(self: MessageSocket) -> tuple[Message, Header] | None:
        received: tuple[Message, Header] | None = receive(self)
        if received is None:
            return None
        result, header = received
        if isinstance(result, StepResult) and result.logprobs.shape[0] and hit():
            return replace(result, logprobs=with_flipped_bit(result.logprobs)), header
        return received

    return planted


def flip_replayed_bit(logged: Callable[..., Any]) -> Callable[..., Any]:
    """The lowest mantissa bit of the first number of what is replayed from the activation log."""

    def planted(self: Any, *arguments: Any) -> Any:
        rows = logged(self, *arguments).clone()
        if rows.numel():
            kind = {2: "int16", 4: "int32"}[rows.element_size()]
            rows.view(getattr(importlib.import_module("torch"), kind)).reshape(-1)[0] ^= 1
        return rows

    return planted


def leak_block(free: Callable[..., None]) -> Callable[..., None]:
    """One block of those that are given back is not."""
    hit = hit_now_and_then(5)

    def planted(self: Any, block_ids: Iterable[int]) -> None:
        blocks = tuple(block_ids)
        free(self, blocks[:-1] if blocks and hit() else blocks)

    return planted


def forget_salt(make: Callable[..., None]) -> Callable[..., None]:
    """What was computed under one salt is found under every other one."""
    return lambda self, salt, block_tokens: make(self, "", block_tokens)


def keep_evicted(evict: Callable[..., int]) -> Callable[..., int]:
    """A cached block is given to another, and its entry stays: the one that was of use last, so that it is missed."""

    def planted(self: Any) -> int:
        block_id: int = next(reversed(self._idle))
        self.wake(block_id)
        return block_id

    return planted


def reuse_tier_slot(free_slot: Callable[..., int | None]) -> Callable[..., int | None]:
    """A tier slot is given to another block, and its entry stays: the one that was of use last."""

    def planted(self: Any) -> int | None:
        stale = next((kept.slot for kept in reversed(self._kept.values()) if self._may_go(kept)), None)
        return free_slot(self) if stale is None else stale

    return planted


def take_late_reply(receive: Callable[..., Any]) -> Callable[..., Any]:
    """A late answer of an expert node is taken for the answer to another call: the next that is answered."""
    sent_s: dict[int, float] = {}
    late: list[TensorFrame] = []
    send = MessageSocket.send

    def remember(self: MessageSocket, message: Message, header: Header) -> None:
        send(self, message, header)
        if isinstance(message, Dispatch):
            sent_s[message.call] = time.monotonic()

    def planted(self: MessageSocket) -> tuple[Message, Header] | None:
        received: tuple[Message, Header] | None = receive(self)
        if received is None or not isinstance(received[0], ExpertRows):
            return received
        answer, header = received
        assert isinstance(answer, ExpertRows)
        if time.monotonic() - sent_s.pop(answer.call, time.monotonic()) >= LATE_S:
            late.append(answer.rows)
            return received
        if late:
            answer = replace(answer, rows=with_num_rows(late.pop(), answer.rows.shape[0]))
        return answer, header

    MessageSocket.send = remember  # type: ignore[method-assign]
    return planted


def count_hedge_twice(take: Callable[..., None]) -> Callable[..., None]:
    """What a hedge answers counts twice in the sum."""

    def planted(self: Any, part: Any, answer: Any, now_s: float, **named: Any) -> None:
        is_rows = isinstance(answer, Tensor)
        take(self, part, answer + answer if part.is_hedge and is_rows else answer, now_s, **named)

    return planted


def take_answers_unchecked(follow: Callable[..., None]) -> Callable[..., None]:
    """What lies in a ring, or has come over a link, is used, whatever its checksum says, once its call goes on in
    messages."""

    def planted(self: Any, asked: Any, now_s: float) -> None:
        for part in asked._parts[: asked._num_parts]:
            if part.state == -Outcome.DAMAGED:
                use_what_lies_there(asked, part)
        follow(self, asked, now_s)

    return planted


def take_unfinished_answers(follow: Callable[..., None]) -> Callable[..., None]:
    """What lies in the ring of a node that is gone is taken for its answer, whether it was written or not."""

    def planted(self: Any, asked: Any, now_s: float) -> None:
        for part in asked._parts[: asked._num_parts]:
            is_gone = not (asked._peers.nodes[part.peer].connected and asked._peers.peers[part.peer].is_open)
            if is_gone and part.state == 0 and part.slot >= 0:
                use_what_lies_there(asked, part)
        follow(self, asked, now_s)

    return planted


def use_what_lies_there(asked: Any, part: Any) -> None:
    """Uses the answer's place in a part's slot as its answer."""
    part.state = 1
    shape, memory = asked._peers.shape, asked._peers.peers[part.peer].memory
    head = HEAD_BYTES + whole_lines(shape.max_pairs * 8)
    rows_bytes = whole_lines(shape.max_rows * shape.width * shape.value_bytes)
    place = memory.address + part.slot * (shape.num_bytes // SLOTS) + head + rows_bytes
    answer = (ctypes.c_char * (part.pairs * shape.width * shape.value_bytes)).from_address(place)
    rows = torch.frombuffer(bytearray(answer), dtype=asked.rows.dtype).view(part.pairs, shape.width)
    asked.rows[asked.pairs[part.first : part.first + part.pairs]] = rows


def await_bells_for_ever(take_in: Callable[..., bool]) -> Callable[..., bool]:
    """A stage that waits for an answer through a ring looks at nothing else until its bell is rung. It waits for each
    layer by itself: native code that goes from layer to layer waits no longer than for a moment."""
    importlib.import_module("services.stage.experts.rings").Rings.can_run = lambda self, asked: False

    def planted(self: Any, asked: Any, timeout_s: float = 0.0) -> bool:
        return take_in(self, asked, FOR_EVER_S if timeout_s else 0.0)

    return planted


def whole_lines(num_bytes: int) -> int:
    return (num_bytes + 63) // 64 * 64


def take_stale_samples(note_samples: Callable[..., None]) -> Callable[..., None]:
    """A step that was planned ahead goes on with the token before the one that it refers to."""
    hit = hit_now_and_then()

    def planted(self: Any, number: int, result: StepResult) -> None:
        before: dict[int, int] = next(reversed(self._samples.values()), {})
        note_samples(self, number, result)
        if hit():
            samples = self._samples[number]
            self._samples[number] = {sequence: before.get(sequence, token) for sequence, token in samples.items()}

    return planted


def keep_wrong_drafts(accepted_rows: Callable[..., Any]) -> Callable[..., Any]:
    """A wrong draft is kept as if it had been sampled, and with it its K and V."""
    hit = hit_now_and_then(7)

    def planted(self: Any, token_ids: Any) -> Any:
        if self.drafts is not None:
            wrong = np.flatnonzero((self.drafts >= 0) & (token_ids != self.drafts))
            kept = [row for row in wrong.tolist() if hit()]
            token_ids[kept] = self.drafts[kept]
        return accepted_rows(self, token_ids)

    return planted


def claim_rows_that_are_on_their_way(send_rows: Callable[..., None]) -> Callable[..., None]:
    """Marks that take arrival for order: the rows of each third step reach the mirror a second late, while those of
    later steps come with marks that cover them. Until then their places are empty: blocks that were another request's
    might hold the right numbers by chance, since all requests come again and again."""
    hit = hit_now_and_then(3)
    late: list[tuple[float, tuple[Any, ...]]] = []

    def planted(self: Any, memory: Any, positions: Any, mark: int) -> None:
        now_s = time.monotonic()
        while late and now_s - late[0][0] >= ROWS_LATE_S:
            _, held_back = late.pop(0)
            if held_back[0] is self:  # else it is for a mirror that was given up
                send_rows(*held_back)
        if hit():
            late.append((now_s, (self, memory, positions, mark)))
            memory = UnwrittenMemory(memory)
        send_rows(self, memory, positions, mark)

    return planted


class UnwrittenMemory:
    """Paged memory that nothing has been written to."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory

    def rows(self, positions: Any) -> Any:
        rows = self._memory.rows(positions)
        return replace(rows, **{part.name: getattr(rows, part.name) * 0 for part in fields(rows)})


def leave_files_lost(look_after: Callable[..., bool]) -> Callable[..., bool]:
    """Socket files that somebody has removed are not made again."""

    def planted(self: Any, now_s: float, *, at_once: bool = False) -> bool:
        return False

    return planted


def tell_nothing_again(due: Callable[..., Any]) -> Callable[..., Any]:
    """What holders are told of their mirrors is lost, but for the first of each slot, and nobody is told anything
    again: redundancy that was lost does not come back."""
    mesh_client = importlib.import_module("services.router.mesh.sockets").MeshClient
    tell, told = mesh_client.tell, itertools.count(1)

    def lose(self: Any, node_id: Any, message: Message, header: Header | None = None) -> None:
        if not (isinstance(message, MirrorTo) and message.endpoints and next(told) > NUM_SLOTS):
            tell(self, node_id, message, header)

    mesh_client.tell = lose
    return lambda self, node_id, found, now_s: {}


# ---- arrays


def with_flipped_bit(frame: TensorFrame) -> TensorFrame:
    """A float32 frame with the lowest mantissa bit of its first number flipped."""
    numbers = frame_to_array(frame, "float32", frame.shape, "planted").copy()
    numbers.view(np.int32).reshape(-1)[0] ^= 1
    return array_to_frame(numbers)


def with_num_rows(frame: TensorFrame, count: int) -> TensorFrame:
    """A frame [R, D] with another number of rows: cut, or the rows again."""
    row_bytes = len(memoryview(frame.data).cast("B")) // max(1, frame.shape[0])
    data = bytes(frame.data)
    again = data * (-(-count // max(1, frame.shape[0])))
    return TensorFrame(frame.dtype, (count, *frame.shape[1:]), again[: count * row_bytes])


def _is_inner_token(entry: Any) -> bool:
    """A token that is not the last one of its choice: a stream that never ends would be another bug."""
    return getattr(entry[1], "finish_reason", "an error") is None


# ---- the launcher


@dataclass(frozen=True, slots=True)
class PlantedBug:
    """Where it is planted."""

    service: str
    """Whose process it is in."""
    module: str
    owner: str
    function: str
    plant: Callable[[Callable[..., Any]], Callable[..., Any]]


BUGS = {
    "dropped_token": PlantedBug("router", "services.router.mesh.engine", "TokenMailbox", "_deliver", drop_token),
    "doubled_token": PlantedBug("router", "services.router.mesh.engine", "TokenMailbox", "_deliver", double_token),
    "flipped_logprob_bit": PlantedBug("router", "common.wire.transport", "MessageSocket", "receive", flip_logprob_bit),
    "flipped_replayed_bit": PlantedBug(
        "stage", "services.stage.model.kv_cache", "PagedMemory", "logged", flip_replayed_bit
    ),
    "leaked_block": PlantedBug(
        "router", "services.router.scheduling.blocks.block_allocator", "BlockAllocator", "free", leak_block
    ),
    "forgotten_salt": PlantedBug(
        "router", "services.router.scheduling.blocks.key_chain", "KeyChain", "__init__", forget_salt
    ),
    "kept_evicted": PlantedBug(
        "router", "services.router.scheduling.blocks.prefix_cache", "PrefixCache", "evict", keep_evicted
    ),
    "stale_tier": PlantedBug(
        "router", "services.router.scheduling.blocks.session_tier", "SessionTier", "_free_slot", reuse_tier_slot
    ),
    "unfenced_late_reply": PlantedBug("stage", "common.wire.transport", "MessageSocket", "receive", take_late_reply),
    "overclaimed_mark": PlantedBug(
        "stage", "services.stage.slot.mirror_sender", "MirrorSender", "send_rows", claim_rows_that_are_on_their_way
    ),
    "stale_samples": PlantedBug(
        "stage", "services.stage.slot.early_steps", "EarlySteps", "note_samples", take_stale_samples
    ),
    "kept_draft": PlantedBug(
        "stage", "services.stage.model.micro_batch", "SamplingColumns", "accepted_rows", keep_wrong_drafts
    ),
    "told_only_once": PlantedBug("router", "services.router.control.retelling", "Retelling", "due", tell_nothing_again),
    "files_left_lost": PlantedBug("router", "common.wire.transport", "Transport", "look_after_files", leave_files_lost),
    "hedge_counted_twice": PlantedBug(
        "stage", "services.stage.experts.client", "ExpertClient", "_take", count_hedge_twice
    ),
    "unchecked_ring": PlantedBug(
        "stage", "services.stage.experts.client", "ExpertClient", "_follow", take_answers_unchecked
    ),
    "unsealed_link": PlantedBug(
        "stage", "services.stage.experts.client", "ExpertClient", "_follow", take_answers_unchecked
    ),
    "bell_trusted": PlantedBug("stage", "services.stage.experts.rings", "Rings", "take_in", await_bells_for_ever),
    "unfinished_answer": PlantedBug(
        "stage", "services.stage.experts.client", "ExpertClient", "_follow", take_unfinished_answers
    ),
}


def module_of(name: str) -> dict[str, str]:
    """What `LocalMesh(modules=...)` is given for a mesh with this bug."""
    service = BUGS[name].service
    return {service: f"tests.chaos.planted_bugs {name} services.{service}"}


def plant(name: str) -> None:
    """Into this process. Raises LookupError if the product has no such place."""
    bug = BUGS[name]
    owner = getattr(importlib.import_module(bug.module), bug.owner)
    if not hasattr(owner, bug.function):
        raise LookupError(f"{name}: {bug.module}.{bug.owner} has no {bug.function}")
    setattr(owner, bug.function, bug.plant(getattr(owner, bug.function)))


if __name__ == "__main__":
    _, chosen, service_module = sys.argv
    plant(chosen)
    sys.argv = [service_module]
    runpy.run_module(service_module, run_name="__main__", alter_sys=True)
