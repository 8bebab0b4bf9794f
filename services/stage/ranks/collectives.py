"""How ranks put their parts together. One face; the board serves ranks on CPUs of one host, torch.distributed the rest.

T rows, C columns of a part, n ranks. Every rank calls the same method with parts of one shape, in the order of rank 0's
commands.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from services.stage.ranks.shared_channel import RankBoard, slab_view

MAX_PHASES = 8
"""Of one command."""


class Collectives(Protocol):
    """What parallel layers need. Results are valid until the next command."""

    @property
    def degree(self) -> int:
        """Ranks that take part."""

    @property
    def seconds(self) -> float:
        """That this rank has spent in them; where a device does them in its own time, in asking for them."""

    @property
    def count(self) -> int:
        """How many there were."""

    def lay_out(self, x: Tensor) -> None:
        """Rank 0, before the command: make x ready for `broadcast`."""

    def broadcast(self, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Rank 0's x on every rank."""

    def all_gather(self, part: Tensor) -> Tensor:
        """[T, C] of each rank -> [T, n * C] on every rank, in order of ranks."""

    def gather(self, part: Tensor) -> Tensor | None:
        """[T, C] of each rank -> [T, n * C] on rank 0, None elsewhere."""

    def sum(self, part: Tensor) -> Tensor | None:
        """[T, C] of each rank -> their sum [T, C] on rank 0, None elsewhere."""

    def close(self) -> None:
        """No more of them. What is under way ends, wherever the others are."""


class Meeting:
    """Phases of a command that its ranks reach together; `begin` each command. A phase is numbered by its command, so
    that ranks agree which one it is, whatever became of the command before."""

    def __init__(
        self, board: RankBoard, seats: tuple[int, ...], rank: int, wait: Callable[[str, int, int], None]
    ) -> None:
        """`seats` in order of ranks. `wait` for a seat's word to reach a value; it raises what ends the wait."""
        self._board = board
        self._others = tuple(seat for seat in seats if seat != seats[rank])
        self._seat = seats[rank]
        self._wait = wait
        self._phase = 0

    def begin(self, turn: int) -> None:
        """Phases of this command come now."""
        self._phase = turn * MAX_PHASES

    def arrive(self) -> None:
        """What this rank had to write is written."""
        self._phase += 1
        self._board.set("arrived", self._seat, self._phase)

    def wait_for_all(self) -> None:
        """Until the others are as far."""
        for seat in self._others:
            self._wait("arrived", seat, self._phase)


class BoardCollectives:
    """Parts are written where they are needed: the slab that ranks write into is the tensor that they read."""

    def __init__(self, board: RankBoard, rank: int, degree: int, meet: Meeting) -> None:
        self._board = board
        self._rank = rank
        self.degree = degree
        self._meet = meet
        self.seconds = 0.0
        self.count = 0

    def lay_out(self, x: Tensor) -> None:
        slab_view(self._board.input, x.shape, x.dtype).copy_(x)

    def broadcast(self, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return slab_view(self._board.input, shape, dtype) if x is None else x

    def all_gather(self, part: Tensor) -> Tensor:
        began_s = time.perf_counter()
        whole = self._write(self._board.middle, part)
        self._meet.arrive()
        self._meet.wait_for_all()
        self._count(began_s)
        return whole

    def gather(self, part: Tensor) -> Tensor | None:
        began_s = time.perf_counter()
        whole = self._write(self._board.output, part)
        return whole if self._hand_in(began_s) else None

    def sum(self, part: Tensor) -> Tensor | None:
        began_s = time.perf_counter()
        parts = slab_view(self._board.output, (self.degree, *part.shape), part.dtype)
        parts[self._rank] = part
        if not self._hand_in(began_s):
            return None
        total = parts[0].to(torch.float32)
        for other in range(1, self.degree):
            total = total + parts[other]
        return total.to(part.dtype)

    def close(self) -> None:
        return None

    def _write(self, slab: Tensor, part: Tensor) -> Tensor:
        rows, columns = part.shape
        whole = slab_view(slab, (rows, columns * self.degree), part.dtype)
        whole[:, self._rank * columns : (self._rank + 1) * columns] = part
        return whole

    def _hand_in(self, began_s: float) -> bool:
        """Whether this is the rank that gets it."""
        self._meet.arrive()
        if self._rank == 0:
            self._meet.wait_for_all()
        self._count(began_s)
        return self._rank == 0

    def _count(self, began_s: float) -> None:
        self.seconds += time.perf_counter() - began_s
        self.count += 1
