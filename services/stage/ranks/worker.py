"""A rank other than the first: it does its part of each command, in order. It has no socket and no forward pass.

It ends with rank 0's process, and when anything goes wrong: rank 0 sees that, and starts another in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from common.checkpoint.model_config import ModelConfig
from common.checkpoint.weights import CheckpointWeights
from common.compute.device import HOST, Device
from common.compute.device_errors import refusal_to_load
from common.compute.native_library import NativeKernels
from common.errors import MoemeshError, RankLostError
from common.node.loader_thread import LoaderThread
from common.wire.array import Int64Array
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.part_loading import PartLoader
from services.stage.model.rope import RotaryTable
from services.stage.model.tp_shard import RankCut
from services.stage.ranks.collectives import Collectives, Meeting
from services.stage.ranks.commands import KvMove, LoadOrder, Op, cut_of, decode_load, dtype_of
from services.stage.ranks.open_collectives import CollectivesKind, open_collectives
from services.stage.ranks.part_compute import attend, feed
from services.stage.ranks.shared_channel import EpochOver, RankBoard
from services.stage.ranks.stage_part import StagePart, load_part
from services.stage.ranks.worker_memory import FollowerMemory

LOOK_S = 0.05
"""How often a rank without a command looks after its loads."""


@dataclass(slots=True)
class _Load:
    order: LoadOrder
    rank: int
    seats: tuple[int, ...]
    """Of all ranks, in order."""
    future: Future[StagePart]
    reported: bool = False

    @property
    def cut(self) -> RankCut:
        return cut_of(self.order, self.rank)


@dataclass(slots=True)
class _Batch:
    batch: MicroBatch
    rotary: tuple[torch.Tensor, torch.Tensor]


class Follower:
    """The loop of one seat."""

    def __init__(
        self,
        board: RankBoard,
        seat: int,
        config: ModelConfig,
        checkpoint: Path,
        num_positions: int,
        kernels: NativeKernels | None,
        log: structlog.stdlib.BoundLogger,
        device: Device = HOST,
        collectives: CollectivesKind = "board",
    ) -> None:
        """`kernels` and `device`: what it computes with, and where."""
        self._board = board
        self._seat = seat
        self._config = config
        self._checkpoint = checkpoint
        self._num_positions = num_positions
        self._kernels = kernels
        self._device = device
        self._collectives_kind = collectives
        self._log = log
        self._loader = LoaderThread()
        self._epoch = board.get("epoch")
        self._turn = board.get("turn")
        self._loads: dict[int, _Load] = {}
        self._part: StagePart | None = None
        self._cut = RankCut()
        self._memory = FollowerMemory(config, kernels, device)
        self._batches: dict[int, _Batch] = {}
        self._arriving = bytearray()
        """Of a batch that comes in pieces."""
        self._is_out_of_step = False
        """Another rank was lost in the middle of a command: until the next epoch there is nothing to do."""
        self._meeting: Meeting | None = None
        self._collectives: Collectives | None = None
        self._rotary: dict[torch.dtype, RotaryTable] = {}
        if not device.is_host:
            device.while_waiting = self._heed_epoch

    def join(self, process: int) -> None:
        """Say on the board that this seat reads it from now on."""
        self._board.set("taken", self._seat, self._turn)
        self._board.set("settled", self._seat, self._epoch)
        self._board.set("present", self._seat, process)

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Serve until told to stop. Whatever goes wrong is raised, and ends the process."""
        with torch.inference_mode():
            while not should_stop():
                try:
                    if self._board.wait("turn", 0, self._turn + 1, self._epoch, LOOK_S):
                        self._obey()
                except EpochOver:
                    self._begin_epoch()
                except RankLostError as error:
                    self._log.warning("rank_waits_for_epoch", seat=self._seat, reason=str(error))
                    self._is_out_of_step = True
                self._report_loads()

    def _begin_epoch(self) -> None:
        self._epoch = self._board.get("epoch")
        self._turn = self._board.get("turn")
        self._is_out_of_step = False
        self._batches.clear()
        self._loads.clear()
        self._give_up_part()
        self._board.set("taken", self._seat, self._turn)
        self._board.set("settled", self._seat, self._epoch)

    def _obey(self) -> None:
        # Rank 0 says nothing more before this seat has taken it; a seat that is not attached yet may have missed some.
        self._turn = self._board.get("turn")
        command = self._board.command.copy()
        op = Op(int(command[0]))
        if op is Op.MEMORY:
            self._memory.map(command)  # while rank 0 has it open
        self._board.set("taken", self._seat, self._turn)
        if op is Op.LOAD:
            self._load(command)
        elif op is Op.USE:
            self._use(int(command[1]), int(command[2]))
        elif op is Op.FORGET_MEMORY:
            self._memory.forget()
        elif op is Op.FORGET_LOADS:
            self._loads.clear()
        elif op is not Op.MEMORY and self._part is not None and not self._is_out_of_step:
            self._compute(op, command)

    # ---- computing

    def _compute(self, op: Op, command: Int64Array) -> None:
        meeting, collectives, part = self._meeting, self._collectives, self._part
        assert meeting is not None, "USE comes before"
        assert collectives is not None, "USE comes before"
        assert part is not None, "USE comes before"
        meeting.begin(self._turn)
        width = self._config.hidden_size
        if op is Op.BATCH:
            self._take_batch(command)
            meeting.arrive()
        elif op is Op.ATTEND:
            number, layer, start, stop = command[1:5].tolist()
            known = self._batches[number]
            x = collectives.broadcast(None, (stop - start, width), part.dtype)
            rotary = known.rotary[0][start:stop], known.rotary[1][start:stop]
            own = known.batch.rows(start, stop)
            attend(part.attention[layer], self._cut, collectives, x, own, rotary, self._memory.caches[layer])
        elif op is Op.ALLOCATE:
            self._allocate(int(command[1]))
            meeting.arrive()
        elif op is Op.MOVE_KV:
            self._memory.move(KvMove(int(command[1])), int(command[2]))
            meeting.arrive()
        elif op is Op.FEED:
            layer, rows = command[1:3].tolist()
            dense = part.dense[layer]
            assert dense is not None, "rank 0 has the same layers"
            feed(dense, self._cut, collectives, collectives.broadcast(None, (rows, width), part.dtype))
        elif op is Op.EMBED:
            assert part.embedding is not None, "rank 0 has the same layers"
            token_ids = collectives.broadcast(None, (int(command[1]),), torch.int64)
            collectives.gather(part.embedding(token_ids))
        else:
            assert op is Op.PROJECT, "no other is left"
            assert part.lm_head is not None, "rank 0 has the same layers"
            collectives.gather(part.lm_head(collectives.broadcast(None, (int(command[1]), width), part.dtype)))

    def _take_batch(self, command: Int64Array) -> None:
        number, tokens, sequences, blocks, start, count, oldest = command[1:8].tolist()
        if start == 0:
            self._arriving = bytearray()
        self._arriving += bytes(self._board.input[:count].numpy())
        total = tokens * 16 + sequences * blocks * 4
        if start + count < total:
            return
        data = torch.frombuffer(self._arriving, dtype=torch.uint8)
        slots, positions, row_sequence, tables = torch.split(
            data, [8 * tokens, 4 * tokens, 4 * tokens, 4 * sequences * blocks]
        )
        host_positions = positions.view(torch.int32)
        on_device, row_sequence, tables, slots = self._device.to_device(
            host_positions,
            row_sequence.view(torch.int32),
            tables.view(torch.int32).view(sequences, blocks),
            slots.view(torch.int64),
        )
        batch = MicroBatch(
            hidden=torch.zeros(0),
            positions=on_device,
            row_sequence=row_sequence,
            block_tables=tables,
            slots=slots,
            host_positions=host_positions,
            sampling_rows=torch.zeros(0, dtype=torch.int64),
            sampling=None,
            number=number,
        )
        assert self._part is not None
        for gone in [other for other in self._batches if other < oldest]:
            del self._batches[gone]
        self._batches[number] = _Batch(batch, self._part.rotary.rows(batch.positions))

    # ---- weights and memory

    def _load(self, command: Int64Array) -> None:
        order, rank, seats = decode_load(command, self._seat)
        self._loads.clear()  # only the newest is ever used
        if order.replaces:
            self._part = None
            self._device.release()
        if rank < 0:
            self._board.set("loaded", self._seat, order.number)
            return
        future = self._loader.submit(self._read, order, cut_of(order, rank))
        self._loads[order.number] = _Load(order, rank, seats, future)

    def _read(self, order: LoadOrder, cut: RankCut) -> StagePart:
        """In the loader's thread."""
        dtype = dtype_of(order.dtype)
        place = self._device.place
        weights = CheckpointWeights(self._checkpoint, dtype, place)
        if dtype not in self._rotary:
            config = self._config
            self._rotary[dtype] = RotaryTable(config.rope, config.head_dim, self._num_positions, dtype, place)
        try:
            loader = PartLoader(weights, self._config, self._kernels, cut)
            return load_part(loader, self._config, order, self._rotary[dtype], dtype)
        finally:
            weights.close()

    def _report_loads(self) -> None:
        self._loader.check()
        for number, load in self._loads.items():
            if load.reported or not load.future.done():
                continue
            load.reported = True
            error = load.future.exception()
            if error is None:
                self._board.set("loaded", self._seat, number)
                continue
            if not isinstance(error, (MoemeshError, ValueError, RuntimeError, MemoryError, OSError)):
                raise error
            self._refuse("failed", number, error)

    def _use(self, number: int, port: int) -> None:
        load = self._loads.pop(number, None)
        self._give_up_part()
        if load is None:  # no rank in this one
            return
        self._part = load.future.result()
        self._cut = load.cut
        self._loads.clear()
        meeting = Meeting(self._board, load.seats, load.rank, self._wait)
        store = None
        if port:
            from services.stage.ranks.torch_collectives import announce, open_store

            store = open_store(port)
            announce(store, load.rank)
        self._collectives = open_collectives(
            self._collectives_kind,
            load.rank,
            load.order.degree,
            self._board,
            meeting,
            self._device,
            store,
            self._is_epoch_over,
        )
        self._meeting = meeting
        self._memory.use(self._cut)

    def _give_up_part(self) -> None:
        self._part = self._meeting = None
        if self._collectives is not None:
            closed, self._collectives = self._collectives, None
            closed.close()

    def _allocate(self, number: int) -> None:
        """K and V of its own."""
        try:
            self._memory.allocate()
        except (RuntimeError, ValueError, MemoryError) as error:
            self._refuse("refused", number, error)

    def _refuse(self, word: str, number: int, error: Exception) -> None:
        """Say why something is not in place here. Raises DeviceError for a device that is lost."""
        refusal = refusal_to_load(error)
        self._log.error("not_in_place", seat=self._seat, reason=str(refusal))
        self._board.say(self._seat, f"{refusal.code} {refusal}")
        self._board.set(word, self._seat, number)

    def _heed_epoch(self, waited_s: float) -> None:
        """While it waits for its device, which may wait for a rank that is lost."""
        if self._is_epoch_over():
            raise EpochOver

    def _is_epoch_over(self) -> bool:
        return self._board.get("epoch") != self._epoch

    def _wait(self, name: str, seat: int, value: int) -> None:
        while not self._board.wait(name, seat, value, self._epoch, LOOK_S):
            self._loader.check()
