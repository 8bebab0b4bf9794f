"""A rank other than the first: it runs the forward passes that rank 0 runs, as far as it is told. It has no socket.

It ends with rank 0's process, and when anything goes wrong: rank 0 sees that, and starts another in its place.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from torch import Tensor

from common.checkpoint.model_config import ModelConfig, read_model_config
from common.checkpoint.weights import CheckpointWeights
from common.compute.cuda import open_device
from common.compute.device import HOST, Device
from common.compute.device_errors import LOADING_ERRORS, refusal_to_load
from common.compute.native_library import NativeKernels, load_native_kernels
from common.errors import ConfigurationError, RankLostError
from common.node.loader_thread import LoaderThread
from common.processes.cores import compute_threads
from services.stage.model.decoder import ForwardPass, StageModel
from services.stage.model.loading import load_stage
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.sharded_linear import Sharding
from services.stage.ranks.collectives import Barrier, CollectivesKind, TpExchange
from services.stage.ranks.commands import (
    AllocateKv,
    BeginBatch,
    Command,
    ForgetLoads,
    ForgetMemory,
    LoadShard,
    MoveKv,
    OpenMemory,
    Resume,
    UseShard,
    decode,
)
from services.stage.ranks.kv_memory import RankKv
from services.stage.ranks.shared_channel import EpochOver, SharedChannel, SharedMemory

LOOK_S = 0.05
"""How often a rank that is told nothing looks after its loads."""


@dataclass(slots=True)
class _Load:
    order: LoadShard
    seats: tuple[int, ...]
    """The seats of all ranks, in order."""
    rank: int
    future: Future[StageModel]
    is_reported: bool = False


class RankWorker:
    """The loop of one seat."""

    def __init__(
        self,
        channel: SharedChannel,
        seat: int,
        checkpoint: Path,
        num_positions: int,
        collectives: CollectivesKind,
        kernels: NativeKernels | None,
        log: structlog.stdlib.BoundLogger,
        device: Device = HOST,
    ) -> None:
        """`kernels` and `device`: what it computes with, and where."""
        self._channel = channel
        self._seat = seat
        self._config: ModelConfig = read_model_config(checkpoint)
        self._checkpoint = checkpoint
        self._num_positions = num_positions
        self._kernels = kernels
        self._device = device
        self._log = log
        self._loader = LoaderThread()
        self._process = 0
        self._epoch = channel.get("epoch")
        self._turn = channel.get("turn")
        self._arriving = torch.empty(0, dtype=torch.uint8)
        """What has come of a message that comes in pieces."""
        self._num_arrived = 0
        self._loads: dict[int, _Load] = {}
        self._model: StageModel | None = None
        self._exchange = TpExchange(channel, collectives, device)
        self._barrier: Barrier | None = None
        self._memory = RankKv(self._config, kernels, device)
        self._forwards: dict[int, ForwardPass] = {}
        """Those that wait for their experts, by number of the batch."""
        self._is_out_of_step = False
        """Another rank was lost in the middle of something: until the next epoch there is nothing to do."""
        if not device.is_host:
            device.while_waiting = self._heed_epoch

    def join(self, process: int) -> None:
        """Says in the channel that this process has the seat. It reads messages once rank 0 has attached it."""
        self._process = process
        self._channel.set("taken", self._seat, self._turn)
        self._channel.set("settled", self._seat, self._epoch)
        self._channel.set("present", self._seat, process)

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Serves until told to stop. Whatever goes wrong is raised, and ends the process."""
        with torch.inference_mode():
            while not should_stop():
                try:
                    if self._channel.wait("turn", 0, self._turn + 1, self._epoch, LOOK_S):
                        self._obey()
                except EpochOver:
                    self._begin_epoch()
                except RankLostError as error:
                    self._log.warning("rank_waits_for_epoch", seat=self._seat, reason=str(error))
                    self._is_out_of_step = True
                self._report_loads()

    def _begin_epoch(self) -> None:
        self._epoch = self._channel.get("epoch")
        self._turn = self._channel.get("turn")
        self._num_arrived = 0
        self._is_out_of_step = False
        self._loads.clear()
        self._give_up_model()
        self._channel.set("taken", self._seat, self._turn)
        self._channel.set("settled", self._seat, self._epoch)

    def _obey(self) -> None:
        message = self._read_message()
        if message is not None and isinstance(message[0], OpenMemory):
            self._memory.open(message[0])  # while rank 0 has it open
        self._channel.set("taken", self._seat, self._turn)
        if message is None:
            return
        command, tensors = message
        if isinstance(command, LoadShard):
            self._load(command, tensors[0].tolist())
        elif isinstance(command, UseShard):
            self._use(command)
        elif isinstance(command, ForgetMemory):
            self._forwards.clear()  # those that are dropped hold it until then
            self._memory.forget()
        elif isinstance(command, ForgetLoads):
            self._loads.clear()
        elif self._model is not None and not self._is_out_of_step:
            self._work(self._model, command, tensors)

    def _read_message(self) -> tuple[Command, list[Tensor]] | None:
        """Returns the newest message, once all of it is here; a copy, since rank 0 writes the next one over it."""
        self._turn = self._channel.get("turn")
        if self._channel.get("attached", self._seat) != self._process:
            return None  # rank 0 does not wait for this seat: it may be writing the next one
        values, piece, start, total = self._channel.read()
        if start == 0:
            self._arriving, self._num_arrived = torch.empty(total, dtype=torch.uint8), 0
        if start != self._num_arrived:
            return None  # it began before this seat was attached
        self._num_arrived += piece.shape[0]
        self._arriving[start : self._num_arrived] = piece
        return decode(values, self._arriving) if self._num_arrived == total else None

    # ---- computing

    def _work(self, model: StageModel, command: Command, tensors: list[Tensor]) -> None:
        if isinstance(command, BeginBatch):
            self._forwards = {number: kept for number, kept in self._forwards.items() if number >= command.oldest}
            batch = MicroBatch.of_tensors(tensors, sampling=None)  # tokens are drawn by the first rank
            self._forwards[command.number] = model.forward(batch, self._memory.caches)
            self._go_on(command.number, None)
        elif isinstance(command, Resume):
            self._go_on(command.number, tensors[0])
        elif isinstance(command, AllocateKv):
            self._allocate(command.number)
            self._meet()
        elif isinstance(command, MoveKv):
            self._memory.move(command)
            self._meet()

    def _go_on(self, number: int, answer: Tensor | None) -> None:
        """Goes on up to the next expert call, which rank 0 makes, or to the end, of which rank 0 has all."""
        try:
            self._forwards[number].send(answer)
        except StopIteration:
            del self._forwards[number]

    def _meet(self) -> None:
        assert self._barrier is not None, "UseShard comes before"
        self._barrier.meet()

    # ---- weights and memory

    def _load(self, order: LoadShard, seats: Sequence[int]) -> None:
        self._loads.clear()  # only the newest is ever used
        if order.replaces:
            self._model = None
            self._forwards.clear()
            self._device.release()
        if self._seat not in seats:
            self._channel.set("loaded", self._seat, order.number)
            return
        rank = seats.index(self._seat)
        future = self._loader.submit(self._read_weights, order, rank)
        self._loads[order.number] = _Load(order, tuple(seats), rank, future)

    def _read_weights(self, order: LoadShard, rank: int) -> StageModel:
        """Loads its shard, in the loader's thread."""
        sharding = Sharding(order.shard(rank), self._exchange)
        with closing(CheckpointWeights(self._checkpoint, order.dtype, self._device.place)) as weights:
            return load_stage(
                weights, self._config, order.role, self._num_positions, self._kernels, self._device, sharding
            )

    def _report_loads(self) -> None:
        self._loader.check()
        for number, load in self._loads.items():
            if load.is_reported or not load.future.done():
                continue
            load.is_reported = True
            error = load.future.exception()
            if error is None:
                self._channel.set("loaded", self._seat, number)
            elif isinstance(error, LOADING_ERRORS):
                self._refuse("failed", number, error)
            else:
                raise error

    def _use(self, command: UseShard) -> None:
        load = self._loads.pop(command.number, None)
        self._give_up_model()
        if load is None:  # no rank in this one
            return
        self._model = load.future.result()
        self._loads.clear()
        store = None
        if command.port:
            from services.stage.ranks.torch_collectives import announce, open_store

            store = open_store(command.port)
            announce(store, load.rank)
        self._barrier = Barrier(self._channel, load.seats, load.rank, self._turn, self._wait)
        self._exchange.join(self._barrier, store, self._is_epoch_over)
        self._memory.use(load.order.shard(load.rank))

    def _give_up_model(self) -> None:
        self._model = self._barrier = None
        self._forwards.clear()
        self._exchange.leave()

    def _allocate(self, number: int) -> None:
        """Allocates K and V of its own."""
        try:
            self._memory.allocate()
        except (RuntimeError, ValueError, MemoryError) as error:
            self._refuse("refused", number, error)

    def _refuse(self, word: str, number: int, error: Exception) -> None:
        """Says why something is not in place here. Raises DeviceError for a device that is lost."""
        refusal = refusal_to_load(error)
        self._log.error("rank_setup_failed", seat=self._seat, reason=str(refusal))
        self._channel.say(self._seat, f"{refusal.code} {refusal}")
        self._channel.set(word, self._seat, number)

    def _heed_epoch(self, waited_s: float) -> None:
        """Raises EpochOver while it waits for its device, which may wait for a rank that is lost."""
        if self._is_epoch_over():
            raise EpochOver

    def _is_epoch_over(self) -> bool:
        return self._channel.get("epoch") != self._epoch

    def _wait(self, name: str, seat: int, value: int) -> None:
        while not self._channel.wait(name, seat, value, self._epoch, LOOK_S):
            self._loader.check()


def serve_rank(log: structlog.stdlib.BoundLogger) -> None:
    """Does the work of a rank, until rank 0 ends. Raises MoemeshError."""
    parser = argparse.ArgumentParser(prog="python -m services.stage.ranks")
    for name in ("seat", "channel", "bytes", "slab", "positions", "library_threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    for name in ("device", "collectives", "threads"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # rank 0 hears it too, and ends in order
    torch.set_num_threads(options.library_threads)
    kernels = load_native_kernels(threads=compute_threads(options.threads))
    if kernels is None:
        raise ConfigurationError("a rank needs the native kernels that rank 0 has")
    device = open_device(options.device)
    worker = RankWorker(
        SharedChannel(SharedMemory(options.channel, options.bytes), options.slab, kernels),
        options.seat,
        options.checkpoint,
        options.positions,
        options.collectives,
        kernels if device.is_host else None,
        log,
        device,
    )
    worker.join(os.getpid())
    worker.run()
