"""Runs the micro-batches of one stage: one that has its expert answers goes on. No sockets.

Each micro-batch is a generator (`StageModel.forward`) that yields expert calls, and where the stage has a device also
what it waits for there. `run_one` drives the next one that can go on until it yields again or ends; what it wants sent
comes back as a value.

Micro-batches overtake each other, but for chunks of one sequence: a later chunk does each part of its pass, from one
yield to the next, only after the earlier one has. So it finds the K and V of each layer, and leaves the stage after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.compute.device_errors import raise_if_life_ending
from common.messages import Header, Step
from common.wire.records import STEP_SEQUENCE, frame_to_records
from services.stage.model.decoder import AskedElsewhere, ExpertCall, ForwardPass, OnItsWay, StageModel
from services.stage.model.kv_cache import PagedMemory
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.paged_attention import KV_BLOCK_TOKENS


@dataclass(slots=True, eq=False)
class RunningBatch:
    """A micro-batch between its arrival and its departure."""

    step: Step
    header: Header
    deadline_s: float
    batch: MicroBatch
    forward: ForwardPass
    sequence_ids: frozenset[int]
    degraded_rows: set[int] = field(default_factory=set)
    """Token rows that went on here without one of their experts."""
    is_mixed: bool = False
    """Some of its rows were, or may have been, computed by experts of another class than the rest."""
    num_retried_calls: int = 0
    """Expert calls that were asked of another copy too, or instead."""
    num_parts: int = 0
    """How many parts of its forward pass have been run, or have at least begun."""
    ahead: set[RunningBatch] = field(default_factory=set)
    """Those here with earlier chunks of its sequences."""

    @property
    def may_run(self) -> bool:
        """Returns whether all that are ahead have done the part that is its next."""
        return all(other.num_parts > self.num_parts for other in self.ahead)


@dataclass(frozen=True, slots=True)
class WantsExperts:
    """The batch waits for the answer to this call."""

    running: RunningBatch
    call: ExpertCall


@dataclass(frozen=True, slots=True)
class Finished:
    """The batch has left this stage's layers."""

    running: RunningBatch
    output: Tensor
    """What leaves the stage: hidden states [T, D], or logits [S, V] of the rows that sample."""


@dataclass(frozen=True, slots=True)
class Broken:
    """The forward pass raised; the batch is gone, with those that it was ahead of, and the others go on."""

    running: RunningBatch
    error: Exception


class Executor:
    """Micro-batches that run on one model and one paged memory."""

    def __init__(
        self,
        model: StageModel,
        memory: PagedMemory,
        lead: Callable[[ForwardPass, MicroBatch], ForwardPass] | None = None,
    ) -> None:
        """`lead` makes a forward pass one that takes along those of the stage's other ranks, where there are any."""
        self._model = model
        self._memory = memory
        self._lead = lead
        self._run_layers = model.run_layers(memory.caches) if lead is None else None
        self._runnable: deque[tuple[RunningBatch, Tensor | None]] = deque()
        self._on_device: deque[tuple[RunningBatch, OnItsWay]] = deque()
        """Those whose results are on their way."""
        self._running: set[RunningBatch] = set()

    @property
    def has_work(self) -> bool:
        """Returns whether `run_one` might do something."""
        return bool(self._on_device) or any(running.may_run for running, _ in self._runnable)

    def mix(self) -> None:
        """Notes that experts of another class answer from now on."""
        for running in self._running:
            running.is_mixed = True

    @property
    def num_running(self) -> int:
        """Returns how many batches are here, computing or waiting."""
        return len(self._running)

    def add(self, step: Step, header: Header, deadline_s: float, batch: MicroBatch) -> None:
        """Adds a micro-batch; it runs when its turn comes."""
        sequence_ids = frozenset(
            frame_to_records(step.sequences, STEP_SEQUENCE, None, "Step.sequences")["sequence_id"].tolist()
        )
        running = RunningBatch(step, header, deadline_s, batch, self._forward(batch), sequence_ids)
        running.ahead.update(other for other in self._running if not sequence_ids.isdisjoint(other.sequence_ids))
        self._running.add(running)
        self._runnable.append((running, None))

    def _forward(self, batch: MicroBatch) -> ForwardPass:
        forward = self._model.forward(batch, self._memory.caches, self._run_layers)
        return forward if self._lead is None else self._lead(forward, batch)

    def resume(self, running: RunningBatch, answer: Tensor) -> None:
        """Gives a waiting batch the answer [T, D] of its expert call. One that was dropped meanwhile is ignored."""
        if running in self._running:
            self._runnable.append((running, answer))

    def run_one(self) -> WantsExperts | Finished | Broken | None:
        """Runs the batch that has waited longest until it wants experts, ends or breaks. None: it waits for the device
        now, or all do."""
        able = self._next_able()
        if able is None:
            return None
        running, answer = able
        running.num_parts += 1
        try:
            with torch.inference_mode():
                wanted = running.forward.send(answer)
        except StopIteration as stop:
            self._end(running)
            return Finished(running, stop.value)
        except Exception as error:  # whatever a step's numbers provoke must not take the other steps along
            raise_if_life_ending(error)
            self.drop(running)
            return Broken(running, error)
        if isinstance(wanted, ExpertCall):
            return WantsExperts(running, wanted)
        assert not isinstance(wanted, AskedElsewhere), "this is the rank that asks"
        self._on_device.append((running, wanted))
        return None

    def _next_able(self) -> tuple[RunningBatch, Tensor | None] | None:
        """Returns the batch that runs next. What the device has is sent at once: others wait for it elsewhere. Then the
        device gets more to do."""
        for number, (running, awaited) in enumerate(self._on_device):
            if running.may_run and awaited.is_ready():
                del self._on_device[number]
                return running, None
        for number, (running, answer) in enumerate(self._runnable):
            if running.may_run:
                del self._runnable[number]
                return running, answer
        return None

    def _end(self, running: RunningBatch) -> None:
        self._running.discard(running)
        for other in self._running:
            other.ahead.discard(running)

    def drop(self, running: RunningBatch) -> None:
        """Ends a batch whose step has failed, and those that it is ahead of: what they would read is not there. Their
        steps end with this generation of the pipeline."""
        followers = [other for other in self._running if running in other.ahead]
        self._end(running)
        for follower in followers:
            self.drop(follower)
        self._runnable = deque(entry for entry in self._runnable if entry[0] is not running)
        self._on_device = deque(entry for entry in self._on_device if entry[0] is not running)
        running.forward.close()

    def self_test(self) -> None:
        """Runs one token through all layers, experts answering zero. Raises ValueError if what comes out is not
        finite."""
        probe = _probe_batch(self._model, self._memory.num_blocks)
        forward = self._forward(probe)
        with torch.inference_mode():
            try:
                answer = None
                while True:
                    wanted = forward.send(answer)  # the host waits for what is on its way when it is used
                    answer = torch.zeros_like(wanted.hidden) if isinstance(wanted, ExpertCall) else None
            except StopIteration as stop:
                output: Tensor = stop.value
        if not bool(torch.isfinite(output).all()):
            raise ValueError("the self-test gave numbers that are not finite: the checkpoint is damaged")


def _probe_batch(model: StageModel, block: int) -> MicroBatch:
    """Makes a batch of token 0 at position 0 in a block that no sequence uses: the memory may hold what must not be
    lost."""
    hidden = torch.zeros(1, dtype=torch.int64)
    if model.embedding is None:
        norm = model.layers[0].half.input_norm.weight
        hidden = torch.ones((1, norm.shape[0]), dtype=norm.dtype)
    zero = torch.zeros(1, dtype=torch.int32)
    return MicroBatch(
        hidden=hidden,
        positions=zero,
        row_sequence=zero,
        block_tables=torch.full((1, 1), block, dtype=torch.int32),
        slots=torch.tensor([block * KV_BLOCK_TOKENS]),
        sampling_rows=zero.to(torch.int64),
        sampling=None,
    )
