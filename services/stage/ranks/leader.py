"""Rank 0's side of commands: one after another, each done by all before it returns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from common.errors import RankLostError
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.tp_shard import RankCut
from services.stage.ranks.collectives import BoardCollectives, Collectives, Meeting
from services.stage.ranks.commands import Op, write_command
from services.stage.ranks.part_compute import pieces
from services.stage.ranks.shared_channel import RankBoard

LOOK_S = 0.02
"""How long to wait for a rank before looking whether it lives."""


class Staff(Protocol):
    """Who knows whether ranks live."""

    def check(self, seat: int, process: int, waited_s: float) -> None:
        """Raises RankLostError for a seat whose process is gone (another one may sit there by now), or does nothing
        while rank 0 waits for it."""


class Conductor:
    """What the ranks do, `use` having said which they are. After a RankLostError only `begin_epoch` is of use."""

    def __init__(self, board: RankBoard, staff: Staff) -> None:
        self._board = board
        self._staff = staff
        self.epoch = board.get("epoch")
        self._turn = board.get("turn")
        self.attached: dict[int, int] = {}
        """Process by seat of those that read commands. Another process in the seat knows nothing of what was said."""
        self.seats: tuple[int, ...] = (0,)
        """Of the ranks that work, in order."""
        self._is_broken = False
        self._num_batches = 0
        self._batches: dict[int, None] = {}
        self._dtype = torch.float32
        self._meeting = Meeting(board, (0,), 0, self._wait)
        self.cut = RankCut()
        self._closed_seconds, self._closed_count = 0.0, 0
        self.collectives: Collectives = BoardCollectives(board, 0, 1, self._meeting)

    @property
    def is_broken(self) -> bool:
        """A command has not come through: the ranks do not agree any more where they are."""
        return self._is_broken

    def attach(self, processes: Mapping[int, int]) -> None:
        """These seats read commands from now on, whether they have a rank or not."""
        self.attached = dict(processes)

    def use(
        self,
        cut: RankCut,
        seats: tuple[int, ...],
        dtype: torch.dtype,
        collectives: Callable[[Meeting], Collectives],
    ) -> None:
        """From now on seat `seats[r]` is rank r."""
        self._close_collectives()  # should the new ones not come about
        self.cut = cut
        self._dtype, self.seats = dtype, seats
        self._meeting = Meeting(self._board, seats, 0, self._wait)
        self.collectives = collectives(self._meeting)

    def _close_collectives(self) -> None:
        closed, self.collectives = self.collectives, BoardCollectives(self._board, 0, 1, self._meeting)
        self._closed_seconds += closed.seconds
        self._closed_count += closed.count
        closed.close()

    @property
    def reduces(self) -> tuple[float, int]:
        """Seconds that rank 0 has spent in collectives, over all changes of the group, and how many there were."""
        return self._closed_seconds + self.collectives.seconds, self._closed_count + self.collectives.count

    def begin_epoch(self) -> int:
        """Everything that is under way on other ranks ends."""
        self.epoch += 1
        self._board.set("epoch", 0, self.epoch)
        self._batches.clear()
        self._is_broken = False
        self.seats = (0,)
        self._close_collectives()  # what of theirs is under way never ends, and may be in a device's way
        return self.epoch

    def tell(self, values: Sequence[int]) -> None:
        """A command that is no part of a forward pass. Returns when it is said. Raises RankLostError.

        A seat without a rank that is lost is only left out from then on.
        """
        for seat in list(self.attached):
            try:
                self._wait("taken", seat, self._turn)
            except RankLostError:
                if seat in self.seats:
                    raise
                del self.attached[seat]
        write_command(self._board.command, values)
        self._turn += 1
        self._board.set("turn", 0, self._turn)
        self._meeting.begin(self._turn)

    @contextlib.contextmanager
    def command(self, values: Sequence[int], x: Tensor) -> Iterator[Collectives]:
        """All ranks work on x in the body. Raises RankLostError."""
        self._refuse_if_broken()
        self._is_broken = True  # until it is through: what raises in between leaves the others waiting
        self.collectives.lay_out(x)
        self.tell(values)
        self.collectives.broadcast(x, tuple(x.shape), x.dtype)
        yield self.collectives
        self._is_broken = False

    def together(self, values: Sequence[int], own: Callable[[], None]) -> None:
        """A command of which each rank does its part, `own` being rank 0's. Raises RankLostError."""
        self._refuse_if_broken()
        self._is_broken = True
        self.tell(values)
        own()
        self._meeting.arrive()
        self._meeting.wait_for_all()
        self._is_broken = False

    def in_pieces(self, x: Tensor, columns: int, widest: int, compute: Callable[[int, int], Tensor]) -> Tensor:
        """`compute(start, stop)` for all rows of x, as many at a time as the board holds -> [T, columns].

        `widest`: values of a row of the widest tensor that the ranks exchange for it.
        """
        num_rows = x.shape[0]
        # Token ids are wider than any number of the model.
        dtype = x.dtype if x.dtype.itemsize > self._dtype.itemsize else self._dtype
        spans = pieces(num_rows, widest, self._board.slab_bytes, dtype)
        if len(spans) == 1:
            return compute(0, num_rows)
        whole = torch.empty((num_rows, columns), dtype=self._dtype, device=x.device)
        for start, stop in spans:
            whole[start:stop] = compute(start, stop)
        return whole

    def begin_batch(self, batch: MicroBatch) -> None:
        """Give it a number, and tell the ranks where its rows stand. Raises RankLostError."""
        if not batch.slots.shape[0]:
            return  # the step only releases sequences
        self._refuse_if_broken()
        self._num_batches += 1
        batch.number = self._num_batches
        self._batches[batch.number] = None
        columns = (batch.slots, batch.positions, batch.row_sequence, batch.block_tables)
        data = torch.frombuffer(bytearray(b"".join(column.numpy().tobytes() for column in columns)), dtype=torch.uint8)
        oldest = next(iter(self._batches))
        sizes = (batch.slots.shape[0], *batch.block_tables.shape)
        for start in range(0, data.shape[0], self._board.slab_bytes):
            piece = data[start : start + self._board.slab_bytes]
            self._board.input[: piece.shape[0]] = piece
            self.tell((Op.BATCH, batch.number, *sizes, start, piece.shape[0], oldest))
            self._meeting.arrive()
            self._meeting.wait_for_all()  # before the slab is written again

    def end_batch(self, batch: MicroBatch) -> None:
        """Ranks forget it with the next one."""
        self._batches.pop(batch.number, None)

    def _refuse_if_broken(self) -> None:
        if self._is_broken:
            raise RankLostError("the ranks of this stage are out of step")

    def _wait(self, name: str, seat: int, value: int) -> None:
        waited_s = 0.0
        while not self._board.wait(name, seat, value, self.epoch, LOOK_S):
            waited_s += LOOK_S
            self._staff.check(seat, self.attached.get(seat, 0), waited_s)
            for other in self.seats[1:]:  # who is waited for may wait for one that is lost
                if other != seat:
                    self._staff.check(other, self.attached.get(other, 0), 0.0)
