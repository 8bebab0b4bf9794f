"""Rank 0's side of what ranks do together: it says what comes next, and takes its own part in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from common.errors import RankLostError
from services.stage.model.decoder import AskedElsewhere, ExpertCall, ForwardPass, OnItsWay
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.tp_shard import WHOLE, TpShard
from services.stage.ranks.collectives import Barrier, TpExchange
from services.stage.ranks.commands import BeginBatch, Command, Resume, encode
from services.stage.ranks.shared_channel import SharedChannel
from services.stage.ranks.supervisor import RankSupervisor

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

LOOK_S = 0.02
"""How long to wait for a rank before looking whether it lives."""


class RankLeader:
    """What the ranks do, `use` having said which they are. After a RankLostError only `begin_epoch` is of use."""

    def __init__(self, channel: SharedChannel, supervisor: RankSupervisor, exchange: TpExchange) -> None:
        """`exchange`: of rank 0's layers."""
        self._channel = channel
        self._supervisor = supervisor
        self._exchange = exchange
        self.epoch = channel.get("epoch")
        self._turn = channel.get("turn")
        self.attached: dict[int, int] = {}
        """Process by seat of those that read messages. Another process in the seat knows nothing of what was said."""
        self.seats: tuple[int, ...] = (0,)
        """Seats of the ranks that work, in order."""
        self.shard: TpShard = WHOLE
        """That of rank 0."""
        self._barrier = Barrier(channel, self.seats, 0, self._turn, self._wait)
        self.is_broken = False
        """Something that all do has not come through: ranks do not agree any more where they are."""
        self._num_batches = 0
        self._batches: dict[int, None] = {}
        """The batches that are not through, in order."""

    def attach(self, processes: Mapping[int, int]) -> None:
        """Lets these seats read messages from now on, whether they have a rank or not."""
        self.attached = dict(processes)
        for seat, process in processes.items():
            self._channel.set("attached", seat, process)

    def begin_epoch(self) -> int:
        """Ends everything that is under way on other ranks."""
        self.epoch += 1
        self._channel.set("epoch", 0, self.epoch)
        self._batches.clear()
        self.is_broken = False
        self.seats = (0,)
        self._exchange.leave()  # what of theirs is under way never ends, and may be in a device's way
        return self.epoch

    def use(self, shard: TpShard, seats: tuple[int, ...], store: Store | None, is_lost: Callable[[], bool]) -> None:
        """Makes seat `seats[r]` rank r from now on. Arguments and errors are those of `TpExchange.join`."""
        self._exchange.leave()
        self.shard, self.seats = shard, seats
        self._barrier = Barrier(self._channel, seats, 0, self._turn, self._wait)
        self._exchange.join(self._barrier, store, is_lost)

    def tell(self, command: Command, *tensors: Tensor) -> None:
        """Says a command to all that are attached. Returns when it is said. Raises RankLostError.

        A seat without a rank that is lost is only left out from then on.
        """
        values, data = encode(command, tensors)
        slab_bytes, total = self._channel.slab_bytes, data.shape[0]
        for start in range(0, max(total, 1), slab_bytes):
            self._wait_until_taken()
            self._channel.write(values, data[start : start + slab_bytes], start, total)
            self._turn += 1
            self._channel.set("turn", 0, self._turn)

    def _wait_until_taken(self) -> None:
        for seat in list(self.attached):
            try:
                self._wait("taken", seat, self._turn)
            except RankLostError:
                if seat in self.seats:
                    raise
                del self.attached[seat]

    def together(self, command: Command, own: Callable[[], None]) -> None:
        """Says a command of which each rank does its part, `own` being rank 0's. Raises RankLostError."""
        self._begin()
        self.tell(command)
        own()
        self._barrier.meet()
        self.is_broken = False

    def lead(self, forward: ForwardPass, batch: MicroBatch) -> ForwardPass:
        """Runs rank 0's forward pass of a micro-batch, which takes along those of the other ranks. Raises
        RankLostError.

        What ranks do together between two yields belongs to what was told last: there is one order on all of them.
        """
        if len(self.seats) == 1 or not batch.slots.shape[0]:  # or the step only releases sequences, or copies blocks
            return (yield from forward)
        self._num_batches += 1
        number = self._num_batches
        self._batches[number] = None
        try:
            begin = BeginBatch(number, next(iter(self._batches)))
            wanted = self._go_on(forward, None, begin, *batch.tensors())
            while True:
                answer = yield wanted
                if isinstance(wanted, ExpertCall):
                    assert answer is not None, "an expert call is answered"
                    wanted = self._go_on(forward, answer, Resume(number), answer)
                else:  # it has waited for its own device, in the middle of nothing that ranks do together
                    wanted = forward.send(None)
        except StopIteration as stop:
            output: Tensor = stop.value
            return output
        finally:
            forward.close()
            self._batches.pop(number, None)

    def _go_on(
        self, forward: ForwardPass, answer: Tensor | None, command: Command, *tensors: Tensor
    ) -> ExpertCall | AskedElsewhere | OnItsWay:
        """Lets all ranks go on with a forward pass, up to where it waits for something. Raises StopIteration at its
        end."""
        self._begin()
        self.tell(command, *tensors)
        try:
            wanted = forward.send(answer)
        except StopIteration:
            self.is_broken = False
            raise
        self.is_broken = False
        return wanted

    def _begin(self) -> None:
        """Begins what all ranks do. What raises until it is through leaves the others waiting."""
        if self.is_broken:
            raise RankLostError("the ranks of this stage are out of step")
        self.is_broken = True

    def _wait(self, name: str, seat: int, value: int) -> None:
        """Waits until a seat's word is as high. Raises RankLostError."""
        waited_s = 0.0
        while not self._channel.wait(name, seat, value, self.epoch, LOOK_S):
            waited_s += LOOK_S
            self._supervisor.check(seat, self.attached.get(seat, 0), waited_s)
            for other in self.seats[1:]:  # the rank waited for may wait for one that is lost
                if other != seat:
                    self._supervisor.check(other, self.attached.get(other, 0), 0.0)
