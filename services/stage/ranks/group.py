"""A stage's ranks as its first one sees them: which are there, at which degree they work, what they load.

The group outlives an incarnation of the stage. When a rank is lost, the incarnation ends (`RankLostError`), and the
next one begins with `reform`: those that are left, at the highest degree that the model allows. The lost one starts
again by itself; `may_grow` then, and the stage goes back to its full degree between two steps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
import torch
from torch import Tensor

from common.checkpoint.model_config import ModelConfig
from common.compute.device import HOST, Device
from common.compute.native_library import NativeKernels, load_native_kernels
from common.errors import ConfigurationError, RankLostError
from common.node.process import NodeResources
from common.processes.cores import compute_threads
from common.processes.fork_server import ForkedProcess, ForkServer
from common.topology import StageRole
from services.stage.model.kv_cache import KvStore, positions_of_blocks
from services.stage.model.paged_attention import KvShape
from services.stage.model.sharded_linear import Sharding
from services.stage.model.tp_shard import Reduce, best_degree, check_degree
from services.stage.ranks.collectives import CollectivesKind, TpExchange
from services.stage.ranks.commands import ForgetLoads, LoadShard, UseShard
from services.stage.ranks.kv_memory import GroupKv, RankKv
from services.stage.ranks.leader import RankLeader
from services.stage.ranks.memory_needs import against_degree, num_memories
from services.stage.ranks.shared_channel import SharedChannel, SharedMemory
from services.stage.ranks.supervisor import HOPELESS_S, RankSupervisor, read_sample

START_S = 30.0
"""How long to wait for all ranks when the process starts; with fewer the stage begins smaller."""
SETTLE_S = 1.0
"""How long to wait until a rank hears of a new epoch; one that does not hangs."""
GROW_AGAIN_S = 30.0
"""How long to wait after growing was not possible."""
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

    order: LoadShard
    seats: tuple[int, ...]
    """The seats, in order of ranks."""

    sharding: Sharding
    """That of rank 0."""


@dataclass(slots=True)
class RankGroup:
    """Made by `StageProcess`. Everything here belongs to the stage's loop, but `supervisor`, which has a thread."""

    settings: GroupSettings
    config: ModelConfig
    channel: SharedChannel
    supervisor: RankSupervisor
    log: structlog.stdlib.BoundLogger
    clock: Callable[[], float] = time.monotonic
    kernels: NativeKernels | None = None
    device: Device = HOST
    """What rank 0 computes with, and where."""
    capacity_bytes: int = 0
    """What each rank's device has for weights, K and V; 0: not known, or they share the host's."""
    in_use: RankLoad | None = None
    exchange: TpExchange = field(init=False)
    """The collectives of rank 0's layers, over all changes of the group."""
    leader: RankLeader = field(init=False)
    _has_formed: bool = False
    _num_loads: int = 0
    _memory: GroupKv = field(init=False)
    _own_memory: RankKv = field(init=False)
    _store: Any = None
    _grow_after_s: float = 0.0
    _weight_bytes: int = 0
    """Those of all ranks together, when they worked last."""
    _kv_bytes: int = 0

    def __post_init__(self) -> None:
        self.exchange = TpExchange(self.channel, self.settings.collectives, self.device)
        self.leader = RankLeader(self.channel, self.supervisor, self.exchange)
        self._own_memory = RankKv(self.config, self.kernels, self.device)
        self._memory = GroupKv(self.channel, self.leader, self._own_memory, self.device)
        if not self.device.is_host:
            self.device.while_waiting = lambda waited_s: self.check()

    # ---- which are there

    @property
    def degree(self) -> int:
        """Returns the degree at which the ranks work now."""
        return self.leader.shard.degree

    def present(self) -> dict[int, int]:
        """Returns process by seat of those that are there and read the channel."""
        processes = {seat: self.supervisor.process_of(seat) for seat in range(1, self.settings.degree)}
        return {seat: pid for seat, pid in processes.items() if pid and self.channel.get("present", seat) == pid}

    def reform(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Begins an incarnation with those that are there: all of them when the process has just started."""
        self.exchange.seconds, self.exchange.count = 0.0, 0  # as the router adds up what incarnations have counted
        if not self._has_formed:
            self._has_formed = True
            deadline_s = self.clock() + START_S
            while len(self.present()) < self.settings.degree - 1 and self.clock() < deadline_s and not should_stop():
                time.sleep(0.02)
        was_lost = not self.leader.attached.items() <= self.present().items()
        if self.in_use is not None and not was_lost and not self.leader.is_broken:
            self.forget_loads()
            self._memory.forget()
            return  # the incarnation has ended for another reason: ranks and weights are as they were
        epoch = self.leader.begin_epoch()
        settled = {}
        for seat, process in self.present().items():
            if self._settles(seat, process, epoch):
                settled[seat] = process
            else:
                self.supervisor.kill(seat, "it did not acknowledge the new epoch")
        self.in_use = None
        self.leader.attach(settled)
        self._memory.forget()
        self._wait_for_room(should_stop)
        self.log.info(
            "ranks_formed", present=len(self.leader.attached) + 1, degree=self.best(), wanted=self.settings.degree
        )

    def _wait_for_room(self, should_stop: Callable[[], bool]) -> None:
        """Waits for those that were lost, where what the group held would not fit on the devices of those that are
        left."""
        deadline_s = self.clock() + START_S
        is_told = False
        while len(self.leader.attached) < self.settings.degree - 1 and not should_stop() and self.clock() < deadline_s:
            refusal = self._against(self.best())
            if not refusal:
                return
            if not is_told:
                self.log.warning("waiting_for_ranks", reason=refusal, at_most_s=START_S)
            is_told = True
            time.sleep(0.02)
            self.leader.attach(self._settled())

    def _against(self, degree: int) -> str:
        held = self._weight_bytes, self._kv_bytes
        return against_degree(*held, self.config.num_kv_heads, degree, self.capacity_bytes)

    def _settles(self, seat: int, process: int, epoch: int) -> bool:
        """Returns whether a rank hears of the epoch; one that computes may take a while to look up."""
        began_s = heard_s = self.clock()
        cpu_s = -1.0
        while self.channel.get("settled", seat) < epoch:
            now_s = self.clock()
            sample = read_sample(process)
            if sample is not None and sample.cpu_s > cpu_s:
                cpu_s, heard_s = sample.cpu_s, now_s
            if now_s - heard_s >= SETTLE_S or now_s - began_s >= HOPELESS_S:
                return False
            time.sleep(0.001)
        return self.channel.get("settled", seat) == epoch

    def best(self) -> int:
        """Returns the highest degree with those that read messages."""
        return self._best_of(1 + len(self.leader.attached))

    def _best_of(self, num_ranks: int) -> int:
        return best_degree(self.config, num_ranks, self._num_parts)

    @property
    def _num_parts(self) -> int:
        """Returns into how many parts the layers are cut whatever the degree (see TpShard), 0: into as many as there
        are ranks."""
        return 0 if self.device.is_host or self.settings.reduce == "fast" else self.settings.degree

    def check(self) -> None:
        """Raises RankLostError if a rank that is needed is gone."""
        self._check(self.in_use.seats[1:] if self.in_use is not None else ())

    def _is_any_gone(self, seats: Iterable[int]) -> bool:
        """Returns whether one of these seats has lost its process; may be called from any thread."""
        return any(self.supervisor.process_of(seat) != self.leader.attached.get(seat) for seat in seats)

    def _check(self, seats: Iterable[int], waited_s: float = 0.0) -> None:
        for seat in seats:
            self.supervisor.check(seat, self.leader.attached.get(seat, 0), waited_s)

    def next_degree(self) -> int:
        """Returns the highest degree with those that are there now."""
        return self._best_of(1 + len(self._settled()))

    def may_grow(self) -> bool:
        """Returns whether more ranks are there than work, and enough for a higher degree."""
        if self.in_use is None or self.degree == self.settings.degree or self.clock() < self._grow_after_s:
            return False
        return self.next_degree() > self.degree

    def _settled(self) -> dict[int, int]:
        epoch = self.leader.epoch
        return {seat: pid for seat, pid in self.present().items() if self.channel.get("settled", seat) == epoch}

    def postpone_growth(self, why: str) -> None:
        """Gives growth up for now. The stage works as it is. Raises RankLostError."""
        self._grow_after_s = self.clock() + GROW_AGAIN_S
        self.forget_loads()
        self.log.warning("rank_growth_postponed", reason=why, again_in_s=GROW_AGAIN_S)

    def attach_present(self) -> None:
        """Lets those that have come meanwhile read messages, and know the memory."""
        self.leader.attach(self._settled())
        self._memory.introduce()

    # ---- weights

    def begin_load(self, role: StageRole, dtype: torch.dtype, replaces: bool) -> RankLoad:
        """Lets the ranks load their parts, for the highest degree there is. Raises RankLostError.

        `replaces`: what they have is not used any more, and makes room.
        """
        self._num_loads += 1
        degree = self.best()
        seats = (0, *list(self.leader.attached)[: degree - 1])
        order = LoadShard(
            number=self._num_loads,
            degree=degree,
            first_layer=role.layers.start,
            stop_layer=role.layers.stop,
            slot=role.slot.index,
            num_slots=role.num_slots,
            dtype=dtype,
            adds_partial_sums=self.settings.reduce == "fast" and degree > 1,
            num_parts=self._num_parts or degree,
            replaces=replaces,
        )
        if self.leader.attached:
            self.leader.tell(order, torch.tensor(seats))
        return RankLoad(order, seats, Sharding(order.shard(0), self.exchange))

    def forget_loads(self) -> None:
        """Lets the ranks give up what they load or have loaded beside what they use. Raises RankLostError."""
        if self.leader.attached:
            self.leader.tell(ForgetLoads())

    def is_loaded(self, load: RankLoad) -> bool:
        """Returns whether every other rank has its part. Raises RankLostError, or the error that a rank has said."""
        self._check(load.seats[1:])
        for seat in load.seats[1:]:
            if self.channel.get("failed", seat) == load.order.number:
                raise self.channel.refusal(seat, load.seats.index(seat))
        return all(self.channel.get("loaded", seat) >= load.order.number for seat in load.seats[1:])

    def use(self, load: RankLoad, part_bytes: int = 0) -> None:
        """Lets the ranks work with these weights from now on; no micro-batch may be under way. Raises RankLostError.

        `part_bytes`: of rank 0's.
        """
        if self.in_use == load:
            return
        kind = self.settings.collectives
        by_torch = kind != "board" and load.order.degree > 1
        if by_torch:
            from services.stage.ranks.torch_collectives import open_store

            self._store = open_store()
        self.in_use = None  # until it is through: ranks that have heard of it do not work as before
        if self.leader.attached:
            self.leader.tell(UseShard(load.order.number, self._store.port if by_torch else 0))
        if by_torch:
            self._wait_for_rendezvous(load)
        others = load.seats[1:]
        try:
            store = self._store if by_torch else None
            self.leader.use(load.sharding.shard, load.seats, store, lambda: self._is_any_gone(others))
        except RankLostError as error:
            if kind == "nccl" and not self._is_any_gone(others):
                raise ConfigurationError(
                    f"NCCL does not join the ranks ({error}); TP_COLLECTIVES=board does without it"
                ) from None
            raise
        self._own_memory.use(load.sharding.shard)
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
        """Waits until all are there: once it has begun, it cannot be given up before its time-out."""
        from services.stage.ranks.torch_collectives import is_here

        for rank, seat in enumerate(load.seats[1:], 1):
            began_s = self.clock()
            while not is_here(self._store, rank):
                self._check((seat,), self.clock() - began_s)
                time.sleep(0.005)
            self._check((seat,))

    # ---- memory

    def allocate_kv(self, shape: KvShape) -> KvStore:
        """Returns zeroed K and V that all ranks have. Raises OSError, RuntimeError, CapacityError for want of memory,
        RankLostError."""
        self._kv_bytes = shape.num_bytes
        return self._memory.allocate(shape)

    def change_over(self, load: RankLoad, part_bytes: int, block_ids: Tensor) -> None:
        """Does `use` for a stage that has K and V: what is in these blocks stays. K and V of devices are on the host
        meanwhile. Raises what `allocate_kv` raises."""
        if self.device.is_host:
            self.use(load, part_bytes)
            return
        positions = positions_of_blocks(block_ids)
        keys, values = self._memory.rows(positions)
        self.use(load, part_bytes)
        self._memory.allocate_on_devices()
        self._memory.put_rows(positions, keys, values)

    def forget_memory(self) -> None:
        """Lets K and V go, on all ranks: the slot that had them is over. Raises RankLostError."""
        self._weight_bytes = self._kv_bytes = 0
        self._memory.forget()


def fork_server_of_ranks() -> ForkServer:
    """Forks this process, which must have one thread: ranks begin with what it has imported, torch above all."""
    forks = ForkServer(["services.stage.ranks.worker"], os.environ)
    forks.fork_off()
    return forks


def open_group(
    resources: NodeResources,
    num_positions: int,
    collectives: CollectivesKind,
    kernels: NativeKernels | None,
    device: Device,
    forks: ForkServer,
    places: Sequence[str],
) -> RankGroup:
    """Starts the ranks of this process's stage. Raises ConfigurationError for a degree that cannot be.

    `kernels`, `device`: rank 0's; `places`: where each rank computes, as DEVICE says it.
    """
    settings, config = resources.settings, resources.config
    check_degree(config, settings.tp)
    channel_kernels = kernels or load_native_kernels(threads=compute_threads(settings.threads))
    if channel_kernels is None:
        raise ConfigurationError(
            f"TP={settings.tp} needs the native kernels, by which ranks wait for each other: install a C++ compiler"
        )
    memory = SharedMemory.create(SharedChannel.num_bytes(SLAB_BYTES), "moemesh-ranks")
    options = {
        "channel": memory.descriptor,
        "bytes": memory.num_bytes,
        "slab": SLAB_BYTES,
        "checkpoint": resources.checkpoint,
        "positions": num_positions,
        "threads": settings.threads,
        "library_threads": settings.library_threads,
        "collectives": collectives,
    }
    supervisor = RankSupervisor(settings.tp - 1, _spawner(memory, options, places, forks), resources.log)
    supervisor.start()
    capacity_bytes = settings.capacity_bytes // num_memories(settings.tp, config.num_kv_heads)
    return RankGroup(
        GroupSettings(settings.tp, settings.tp_reduce, collectives),
        config,
        SharedChannel(memory, SLAB_BYTES, channel_kernels),
        supervisor,
        resources.log,
        kernels=kernels,
        device=device,
        capacity_bytes=0 if device.is_host else capacity_bytes,
    )


def _spawner(
    memory: SharedMemory, options: Mapping[str, object], places: Sequence[str], forks: ForkServer
) -> Callable[[int], ForkedProcess]:
    def spawn(seat: int) -> ForkedProcess:
        given = {**options, "seat": seat, "device": places[seat]}
        arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        return forks.spawn("services.stage.ranks", arguments, os.environ, {memory.descriptor: memory.descriptor})

    return spawn
