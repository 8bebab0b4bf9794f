"""A stage's ranks as its first one sees them: who is there, at which degree they work, what they load.

The group outlives an incarnation of the stage. When a rank is lost, the incarnation ends (`RankLostError`), and the
next one begins with `reform`: those that are left, at the highest degree that the model allows. The lost one starts
again by itself; `may_grow` then, and the stage goes back to its full degree between two steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import structlog
import torch
from torch import Tensor

from common.checkpoint.model_config import ModelConfig
from common.compute.device import HOST, Device
from common.compute.native_library import NativeKernels
from common.errors import ConfigurationError, RankLostError
from common.topology import StageRole
from services.stage.model.decoder import StageModel
from services.stage.model.kv_store import KvShape, KvStore
from services.stage.model.tp_shard import RankCut, Reduce, best_degree
from services.stage.ranks.collectives import Collectives, Meeting
from services.stage.ranks.commands import LoadOrder, Op, code_of, cut_of, dtype_of, encode_load
from services.stage.ranks.group_memory import GroupMemory, OwnKv, SharedKv
from services.stage.ranks.hang_detector import HOPELESS_S
from services.stage.ranks.leader import Conductor
from services.stage.ranks.memory_needs import against_degree
from services.stage.ranks.open_collectives import CollectivesKind, open_collectives
from services.stage.ranks.parallel_layers import ParallelStageModel, put_on_ranks
from services.stage.ranks.shared_channel import RankBoard
from services.stage.ranks.supervisor import RankStaff, read_sample

START_S = 30.0
"""For all ranks to come when the process starts; with fewer the stage begins smaller."""
SETTLE_S = 1.0
"""For a rank to hear of a new epoch; one that does not hangs."""
GROW_AGAIN_S = 30.0
"""After growing was not possible."""
SLAB_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """What the operator has set."""

    degree: int
    reduce: Reduce = "ordered"
    collectives: CollectivesKind = "board"


@dataclass(frozen=True, slots=True)
class RankLoad:
    """Weights that ranks load or have loaded."""

    order: LoadOrder
    seats: tuple[int, ...]
    """In order of ranks."""

    @property
    def cut(self) -> RankCut:
        """Rank 0's."""
        return cut_of(self.order, 0)


@dataclass(slots=True)
class RankGroup:
    """Made by `StageProcess`. Everything here belongs to the stage's loop, but `staff`, which has a thread."""

    settings: GroupSettings
    config: ModelConfig
    board: RankBoard
    staff: RankStaff
    log: structlog.stdlib.BoundLogger
    clock: Callable[[], float] = time.monotonic
    kernels: NativeKernels | None = None
    device: Device = HOST
    """What rank 0 computes with, and where."""
    capacity_bytes: int = 0
    """That each rank's device has for weights, K and V; 0: not known, or they share the host's."""
    in_use: RankLoad | None = None
    conductor: Conductor = field(init=False)
    _has_formed: bool = False
    _num_loads: int = 0
    _memory: GroupMemory = field(init=False)
    _store: Any = None
    _grow_after_s: float = 0.0
    _weight_bytes: int = 0
    """Of all ranks together, when they worked last."""
    _kv_bytes: int = 0

    def __post_init__(self) -> None:
        self.conductor = Conductor(self.board, self.staff)
        if self.device.is_host:
            self._memory = SharedKv(self.conductor, self.kernels)
        else:
            self._memory = OwnKv(self.board, self.conductor, self.device)
            self.device.while_waiting = lambda waited_s: self.check()

    # ---- who is there

    @property
    def degree(self) -> int:
        """At which the ranks work now."""
        return self.conductor.cut.degree

    def present(self) -> dict[int, int]:
        """Process by seat of those that are there and read the board."""
        processes = {seat: self.staff.process_of(seat) for seat in range(1, self.settings.degree)}
        return {seat: pid for seat, pid in processes.items() if pid and self.board.get("present", seat) == pid}

    def reform(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Begin an incarnation with those that are there: all of them when the process has just started."""
        if not self._has_formed:
            self._has_formed = True
            deadline_s = self.clock() + START_S
            while len(self.present()) < self.settings.degree - 1 and self.clock() < deadline_s and not should_stop():
                time.sleep(0.02)
        was_lost = not self._attached.items() <= self.present().items()
        if self.in_use is not None and not was_lost and not self.conductor.is_broken:
            self._memory.forget()
            return  # the incarnation has ended for another reason: ranks and weights are as they were
        epoch = self.conductor.begin_epoch()
        settled = {}
        for seat, process in self.present().items():
            if self._settles(seat, process, epoch):
                settled[seat] = process
            else:
                self.staff.kill(seat, "it does not hear of a new epoch")
        self.in_use = None
        self.conductor.attach(settled)
        self._memory.forget()
        self._wait_for_room(should_stop)
        self.log.info("ranks_formed", present=len(self._attached) + 1, degree=self.best(), wanted=self.settings.degree)

    def _wait_for_room(self, should_stop: Callable[[], bool]) -> None:
        """For those that were lost, where what the group held would not fit on the devices of those that are left."""
        deadline_s = self.clock() + START_S
        is_told = False
        while len(self._attached) < self.settings.degree - 1 and not should_stop() and self.clock() < deadline_s:
            refusal = self._against(self.best())
            if not refusal:
                return
            if not is_told:
                self.log.warning("ranks_are_waited_for", reason=refusal, at_most_s=START_S)
            is_told = True
            time.sleep(0.02)
            self.conductor.attach(self._settled())

    def _against(self, degree: int) -> str:
        held = self._weight_bytes, self._kv_bytes
        return against_degree(*held, self.config.num_kv_heads, degree, self.capacity_bytes)

    def _settles(self, seat: int, process: int, epoch: int) -> bool:
        """One that computes may take a while to look up."""
        began_s = heard_s = self.clock()
        cpu_s = -1.0
        while self.board.get("settled", seat) < epoch:
            now_s = self.clock()
            sample = read_sample(process)
            if sample is not None and sample.cpu_s > cpu_s:
                cpu_s, heard_s = sample.cpu_s, now_s
            if now_s - heard_s >= SETTLE_S or now_s - began_s >= HOPELESS_S:
                return False
            time.sleep(0.001)
        return self.board.get("settled", seat) == epoch

    @property
    def _attached(self) -> dict[int, int]:
        return self.conductor.attached

    def best(self) -> int:
        """The highest degree with those that read commands."""
        return self._best_of(1 + len(self._attached))

    def _best_of(self, num_ranks: int) -> int:
        return best_degree(self.config, num_ranks, self._num_parts)

    @property
    def _num_parts(self) -> int:
        """Into which the layers are cut whatever the degree (see RankCut), 0: into as many as there are ranks."""
        return 0 if self.device.is_host or self.settings.reduce == "fast" else self.settings.degree

    def check(self) -> None:
        """Raises RankLostError if a rank that is needed is gone."""
        self._check(self.in_use.seats[1:] if self.in_use is not None else ())

    def _is_any_gone(self, seats: Iterable[int]) -> bool:
        """From any thread."""
        return any(self.staff.process_of(seat) != self._attached.get(seat) for seat in seats)

    def _check(self, seats: Iterable[int], waited_s: float = 0.0) -> None:
        for seat in seats:
            self.staff.check(seat, self._attached.get(seat, 0), waited_s)

    def next_degree(self) -> int:
        """The highest with those that are there now."""
        return self._best_of(1 + len(self._settled()))

    def may_grow(self) -> bool:
        """More ranks are there than work, and enough for a higher degree."""
        if self.in_use is None or self.degree == self.settings.degree or self.clock() < self._grow_after_s:
            return False
        return self.next_degree() > self.degree

    def _settled(self) -> dict[int, int]:
        epoch = self.conductor.epoch
        return {seat: pid for seat, pid in self.present().items() if self.board.get("settled", seat) == epoch}

    def postpone_growth(self, why: str) -> None:
        """It cannot be now. The stage works as it is. Raises RankLostError."""
        self._grow_after_s = self.clock() + GROW_AGAIN_S
        if self._attached:
            self.conductor.tell((Op.FORGET_LOADS,))
        self.log.warning("ranks_do_not_grow", reason=why, again_in_s=GROW_AGAIN_S)

    def attach_present(self) -> None:
        """Let those that have come meanwhile read commands, and know the memory."""
        self.conductor.attach(self._settled())
        self._memory.introduce()

    # ---- weights

    def begin_load(self, role: StageRole, dtype: torch.dtype, replaces: bool) -> RankLoad:
        """Let the ranks load their parts, for the highest degree there is. Raises RankLostError.

        `replaces`: what they have is not used any more, and makes room.
        """
        self._num_loads += 1
        degree = self.best()
        seats = (0, *list(self._attached)[: degree - 1])
        order = LoadOrder(
            number=self._num_loads,
            degree=degree,
            first_layer=role.layers.start,
            stop_layer=role.layers.stop,
            is_first=int(role.is_first),
            is_last=int(role.is_last),
            dtype=code_of(dtype),
            adds_partial_sums=int(self.settings.reduce == "fast" and degree > 1),
            num_parts=self._num_parts or degree,
            replaces=int(replaces),
        )
        if self._attached:
            ranks = [seats.index(seat) if seat in seats else -1 for seat in range(self.settings.degree)]
            self.conductor.tell(encode_load(order, ranks))
        return RankLoad(order, seats)

    def is_loaded(self, load: RankLoad) -> bool:
        """Whether every other rank has its part. Raises RankLostError, or the error that a rank has said."""
        self._check(load.seats[1:])
        for seat in load.seats[1:]:
            if self.board.get("failed", seat) == load.order.number:
                raise self.board.refusal(seat, load.seats.index(seat))
        return all(self.board.get("loaded", seat) >= load.order.number for seat in load.seats[1:])

    def use(self, load: RankLoad, part_bytes: int = 0) -> None:
        """Work with these weights from now on; no micro-batch may be under way. Raises RankLostError.

        `part_bytes`: of rank 0's.
        """
        if self.in_use == load:
            return
        port = 0
        kind = self.settings.collectives
        by_torch = kind != "board" and load.order.degree > 1
        if by_torch:
            from services.stage.ranks.torch_collectives import open_store

            self._store = open_store()
            port = self._store.port
        self.in_use = None  # until it is through: ranks that have heard of it do not work as before
        if self._attached:
            self.conductor.tell((Op.USE, load.order.number, port))
        if by_torch:
            self._wait_for_rendezvous(load)

        def collectives(meeting: Meeting) -> Collectives:
            return open_collectives(
                kind,
                0,
                load.order.degree,
                self.board,
                meeting,
                self.device,
                self._store,
                lambda: self._is_any_gone(load.seats[1:]),
            )

        try:
            self.conductor.use(load.cut, load.seats, dtype_of(load.order.dtype), collectives)
        except RankLostError as error:
            if kind == "nccl" and not self._is_any_gone(load.seats[1:]):
                raise ConfigurationError(
                    f"NCCL does not join the ranks ({error}); TP_COLLECTIVES=board does without it"
                ) from None
            raise
        self.in_use = load
        self._weight_bytes = part_bytes * load.order.degree
        self.log.info(
            "ranks_work",
            degree=load.order.degree,
            seats=list(load.seats),
            reduce=self.settings.reduce,
            collectives=kind,
        )

    def _wait_for_rendezvous(self, load: RankLoad) -> None:
        """Until all are there: once it has begun, it cannot be given up before its time-out."""
        from services.stage.ranks.torch_collectives import is_here

        for rank, seat in enumerate(load.seats[1:], 1):
            began_s = self.clock()
            while not is_here(self._store, rank):
                self._check((seat,), self.clock() - began_s)
                time.sleep(0.005)
            self._check((seat,))

    def put_on(self, model: StageModel, load: RankLoad) -> StageModel | ParallelStageModel:
        """A model of rank 0's parts with the others' behind it; of a single rank, as it is."""
        if load.order.degree == 1:
            return model
        kv_heads = load.cut.kv_heads(self.config.num_kv_heads)
        if not self.device.is_host:
            kv_heads = slice(0, kv_heads.stop - kv_heads.start)
        return put_on_ranks(model, self.conductor, load.cut, self.config, kv_heads)

    # ---- memory

    def allocate_kv(self, shape: KvShape) -> KvStore:
        """Zeroed K and V that all ranks have. Raises OSError, RuntimeError, CapacityError for want of memory,
        RankLostError."""
        self._kv_bytes = shape.num_bytes
        return self._memory.allocate(shape)

    def change_over(self, load: RankLoad, part_bytes: int, block_ids: Tensor) -> None:
        """`use` for a stage that has K and V: what is in these blocks stays. Raises what `allocate_kv` raises."""
        self._memory.change_over(block_ids, lambda: self.use(load, part_bytes))

    def forget_memory(self) -> None:
        """Let K and V go, on all ranks: the slot that had them is over. Raises RankLostError."""
        self._weight_bytes = self._kv_bytes = 0
        self._memory.forget()

    def end(self) -> None:
        """Of the process."""
        self.staff.end()
