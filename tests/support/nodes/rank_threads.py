"""The ranks of a stage as threads of the test: the channel, the commands and the arithmetic are the real ones."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import structlog
import torch

from common.checkpoint.model_config import ModelConfig, read_model_config
from common.checkpoint.weights import CheckpointWeights
from common.compute.device import HOST, Device
from common.errors import RankLostError
from common.topology import StageRole
from services.stage.model.decoder import ExpertCall, ForwardPass, StageModel
from services.stage.model.kv_cache import KvStore
from services.stage.model.loading import load_stage
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.paged_attention import KV_BLOCK_TOKENS, KvShape, LayerKvCache
from services.stage.ranks.group import GroupSettings, RankGroup
from services.stage.ranks.shared_channel import SharedChannel, SharedMemory
from services.stage.ranks.worker import RankWorker
from tests.support.nodes.kernels import kernels_for

NUM_POSITIONS = 512


class ThreadSupervisor:
    """In place of RankSupervisor: seats are threads, and a test says which are gone."""

    def __init__(self) -> None:
        self.gone: set[int] = set()
        self.killed: list[int] = []
        self.starts: dict[int, int] = {}

    def process_of(self, seat: int) -> int:
        return 0 if seat in self.gone else self.starts[seat]

    def check(self, seat: int, process: int, waited_s: float) -> None:
        if seat in self.gone:
            raise RankLostError(f"the rank of seat {seat} is gone")
        if self.starts[seat] != process:
            raise RankLostError(f"the rank of seat {seat} was lost, and another process is in its place")
        assert waited_s < 10, "a rank does not answer"

    def kill(self, seat: int, why: str) -> None:
        self.gone.add(seat)
        self.killed.append(seat)

    def end(self) -> None:
        return None


class ThreadRanks:
    """A group and its workers."""

    def __init__(
        self,
        checkpoint: Path,
        settings: GroupSettings,
        slab_bytes: int = 1 << 20,
        new_device: Callable[[], Device] = lambda: HOST,
        within: Callable[[], Any] = nullcontext,
    ) -> None:
        """`new_device`: of each rank, which runs `within`."""
        self.checkpoint = checkpoint
        self.config: ModelConfig = read_model_config(checkpoint)
        kernels = kernels_for("native")
        assert kernels is not None
        self._channel_kernels = kernels
        self._new_device, self._within = new_device, within
        self.device = new_device()
        self.kernels = kernels if self.device.is_host else None
        """To compute with."""
        self.log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
        self.memory = SharedMemory.create(SharedChannel.num_bytes(slab_bytes), "test-ranks")
        self.slab_bytes = slab_bytes
        self.supervisor = ThreadSupervisor()
        self._stopping: dict[int, threading.Event] = {}
        self._process_ids = count(1000)
        self.threads: dict[int, threading.Thread] = {}
        self.workers: dict[int, RankWorker] = {}
        self.errors: list[BaseException] = []
        supervisor: Any = self.supervisor
        self.settings = settings
        self.group = RankGroup(
            settings, self.config, self.channel(), supervisor, self.log, kernels=self.kernels, device=self.device
        )
        for seat in range(1, settings.degree):
            self.start(seat)

    def channel(self) -> SharedChannel:
        """Another view of the same memory, as a process of its own has it."""
        memory = SharedMemory.open(os.getpid(), self.memory.descriptor, self.memory.num_bytes)
        return SharedChannel(memory, self.slab_bytes, self._channel_kernels)

    def start(self, seat: int) -> None:
        """Let a seat's rank begin."""
        worker = RankWorker(
            self.channel(),
            seat,
            self.checkpoint,
            NUM_POSITIONS,
            self.settings.collectives,
            self.kernels,
            self.log,
            self._new_device(),
        )
        self.workers[seat] = worker
        stopping = self._stopping[seat] = threading.Event()
        self.supervisor.starts[seat] = next(self._process_ids)
        worker.join(self.supervisor.starts[seat])
        self.supervisor.gone.discard(seat)

        def run() -> None:
            try:
                with self._within():
                    worker.run(stopping.is_set)
            except BaseException as error:
                self.errors.append(error)
                self.supervisor.gone.add(seat)

        self.threads[seat] = threading.Thread(target=run, daemon=True)
        self.threads[seat].start()

    def lose(self, seat: int) -> None:
        """Its process is gone."""
        self._stopping[seat].set()
        self.threads[seat].join(5)
        self.supervisor.gone.add(seat)

    def model(self, role: StageRole, dtype: torch.dtype) -> StageModel:
        """Load and use a role's layers at the degree that is to be had now."""
        load = self.group.begin_load(role, dtype, replaces=True)
        weights = CheckpointWeights(self.checkpoint, dtype, self.device.place)
        model = load_stage(weights, self.config, role, NUM_POSITIONS, self.kernels, self.device, load.sharding)
        while not self.group.is_loaded(load):
            pass
        self.group.use(load)
        return model

    def run(self, model: StageModel, batch: MicroBatch, caches: list[LayerKvCache]) -> torch.Tensor:
        """A forward pass of all ranks."""
        return finish(self.group.leader.lead(model.forward(batch, caches), batch))

    def allocate(self, dtype: torch.dtype, num_blocks: int = 3) -> KvStore:
        """K and V of all layers."""
        config = self.config
        return self.group.allocate_kv(
            KvShape(config.num_layers, num_blocks, config.num_kv_heads, config.head_dim, dtype)
        )

    def end(self) -> None:
        for seat in self._stopping:
            self._stopping[seat].set()
        for thread in self.threads.values():
            thread.join(5)


@contextmanager
def rank_threads(
    checkpoint: Path,
    degree: int,
    slab_bytes: int = 1 << 20,
    new_device: Callable[[], Device] = lambda: HOST,
    within: Callable[[], Any] = nullcontext,
    **settings: Any,
) -> Iterator[ThreadRanks]:
    """Formed, and ended afterwards; what went wrong on a rank fails the test."""
    ranks = ThreadRanks(checkpoint, GroupSettings(degree, **settings), slab_bytes, new_device, within)
    ranks.group.reform()
    try:
        yield ranks
    finally:
        ranks.end()
    assert not ranks.errors, ranks.errors


def batch_of(hidden: torch.Tensor, start: int, blocks: list[int]) -> MicroBatch:
    """One sequence's rows from position `start` on, in these KV blocks; all of them sample."""
    count = hidden.shape[0]
    positions = torch.arange(start, start + count)
    tables = torch.tensor([blocks], dtype=torch.int32)
    return MicroBatch(
        hidden=hidden,
        positions=positions.to(torch.int32),
        row_sequence=torch.zeros(count, dtype=torch.int32),
        block_tables=tables,
        slots=tables[0][positions // KV_BLOCK_TOKENS].to(torch.int64) * KV_BLOCK_TOKENS + positions % KV_BLOCK_TOKENS,
        sampling_rows=torch.arange(count),
        sampling=None,
    )


def answer_of(wanted: object) -> torch.Tensor | None:
    """A fixed function of what experts are asked; None for what is waited for otherwise."""
    if not isinstance(wanted, ExpertCall):
        return None
    return (wanted.hidden * 0.5 + wanted.weights.sum(dim=1, keepdim=True)).to(wanted.hidden.dtype)


def finish(forward: ForwardPass, answer: torch.Tensor | None = None) -> torch.Tensor:
    """What a forward pass gives whose experts answer by `answer_of`. `answer`: to what it asked already."""
    with torch.inference_mode():
        try:
            while True:
                answer = answer_of(forward.send(answer))
        except StopIteration as stop:
            output: torch.Tensor = stop.value
    return output
