"""The ranks of a stage as threads of the test: the board, the commands and the arithmetic are the real ones."""

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
from services.stage.model.decoder import ExpertCall, StageModel
from services.stage.model.device_model import put_on_device
from services.stage.model.kv_store import KvShape, KvStore
from services.stage.model.loading import load_stage
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.paged_attention import KV_BLOCK_TOKENS, LayerKvCache
from services.stage.ranks.commands import cut_of
from services.stage.ranks.group import GroupSettings, RankGroup
from services.stage.ranks.shared_channel import RankBoard
from services.stage.ranks.shared_memory import SharedMemory
from services.stage.ranks.worker import Follower
from tests.support.nodes.kernels import kernels_for

NUM_POSITIONS = 512


class ThreadStaff:
    """In place of RankStaff: seats are threads, and a test says which are gone."""

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
    """A group and its followers."""

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
        self._board_kernels = kernels
        self._new_device, self._within = new_device, within
        self.device = new_device()
        self.kernels = kernels if self.device.is_host else None
        """To compute with."""
        self.log: Any = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
        self.memory = SharedMemory.create(RankBoard.num_bytes(slab_bytes), "test-ranks")
        self.slab_bytes = slab_bytes
        self.staff = ThreadStaff()
        self._stopping: dict[int, threading.Event] = {}
        self._process_ids = count(1000)
        self.threads: dict[int, threading.Thread] = {}
        self.followers: dict[int, Follower] = {}
        self.errors: list[BaseException] = []
        staff: Any = self.staff
        self.settings = settings
        self.group = RankGroup(
            settings, self.config, self.board(), staff, self.log, kernels=self.kernels, device=self.device
        )
        for seat in range(1, settings.degree):
            self.start(seat)

    def board(self) -> RankBoard:
        """Another view of the same memory, as a process of its own has it."""
        memory = SharedMemory.open(os.getpid(), self.memory.descriptor, self.memory.num_bytes)
        return RankBoard(memory, self.slab_bytes, self._board_kernels)

    def start(self, seat: int) -> None:
        """Let a seat's rank begin."""
        board = self.board()
        follower = Follower(
            board,
            seat,
            self.config,
            self.checkpoint,
            NUM_POSITIONS,
            self.kernels,
            self.log,
            self._new_device(),
            self.settings.collectives,
        )
        self.followers[seat] = follower
        stopping = self._stopping[seat] = threading.Event()
        self.staff.starts[seat] = next(self._process_ids)
        follower.join(self.staff.starts[seat])
        self.staff.gone.discard(seat)

        def run() -> None:
            try:
                with self._within():
                    follower.run(stopping.is_set)
            except BaseException as error:
                self.errors.append(error)
                self.staff.gone.add(seat)

        self.threads[seat] = threading.Thread(target=run, daemon=True)
        self.threads[seat].start()

    def lose(self, seat: int) -> None:
        """Its process is gone."""
        self._stopping[seat].set()
        self.threads[seat].join(5)
        self.staff.gone.add(seat)

    def model(self, role: StageRole, dtype: torch.dtype) -> StageModel:
        """Load and use a role's layers at the degree that is to be had now."""
        load = self.group.begin_load(role, dtype, replaces=True)
        weights = CheckpointWeights(self.checkpoint, dtype, self.device.place)
        own = load_stage(weights, self.config, role, NUM_POSITIONS, self.kernels, cut_of(load.order, 0))
        while not self.group.is_loaded(load):
            pass
        self.group.use(load)
        return self.group.put_on(put_on_device(own, self.device), load)

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
    """One sequence's rows from position `start` on, in these KV blocks."""
    count = hidden.shape[0]
    positions = torch.arange(start, start + count)
    tables = torch.tensor([blocks], dtype=torch.int32)
    return MicroBatch(
        hidden=hidden,
        positions=positions.to(torch.int32),
        row_sequence=torch.zeros(count, dtype=torch.int32),
        block_tables=tables,
        slots=tables[0][positions // KV_BLOCK_TOKENS].to(torch.int64) * KV_BLOCK_TOKENS + positions % KV_BLOCK_TOKENS,
        sampling_rows=torch.tensor([count - 1]),
        sampling=None,
    )


def _answer_of(call: ExpertCall) -> torch.Tensor:
    return (call.hidden * 0.5 + call.weights.sum(dim=1, keepdim=True)).to(call.hidden.dtype)


def run_pass(model: StageModel, batch: MicroBatch, caches: list[LayerKvCache]) -> torch.Tensor:
    """A forward pass whose experts answer with a fixed function of what they are asked."""
    forward = model.forward(batch, caches)
    with torch.inference_mode():
        try:
            answer = None
            while True:
                wanted = forward.send(answer)
                answer = _answer_of(wanted) if isinstance(wanted, ExpertCall) else None
        except StopIteration as stop:
            hidden: torch.Tensor = stop.value
    return hidden
