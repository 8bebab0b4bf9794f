"""The slot that a stage holds or mirrors, and the paged memory that it keeps for it.

The memory outlives generations, and also the slot: `StageReady.kv_mark` tells the router up to which step it is good.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import structlog
import torch

from common.compute.device_errors import LOADING_ERRORS, refusal_to_load
from common.compute.native_library import NativeKernels
from common.errors import ProtocolError, RankLostError
from common.messages import AssignMirror, AssignStage, Header, StageReady
from common.processes.memory import offered_bytes
from common.topology import StageState
from common.wire.endpoints import choose_endpoint
from common.wire.transport import Transport
from services.stage.model.decoder import StageModel
from services.stage.model.executor import Executor
from services.stage.model.kv_cache import PagedMemory
from services.stage.model.micro_batch import BlockTables
from services.stage.model.paged_attention import KV_BLOCK_TOKENS
from services.stage.ranks.group import RankGroup
from services.stage.ranks.memory_needs import Free, against_growth
from services.stage.slot.layers import LayersLoad, LoadedLayers, StageLayers
from services.stage.slot.mirror_receiver import Mirror
from services.stage.slot.session_tier import SessionTier, make_session_tier
from services.stage.slot.slot import (
    HeldMemory,
    Loading,
    MemoryTag,
    RoleRefused,
    RoleTaken,
    Slot,
    role_of,
)
from services.stage.slot.step_watermark import StepWatermark


class StageWorker:
    """At most one slot at a time. The newest assignment wins, also over one that is still loading."""

    def __init__(
        self,
        layers: StageLayers,
        transport: Transport,
        ipc_token: str,
        log: structlog.stdlib.BoundLogger,
        sampling_kernels: NativeKernels | None = None,
        free_bytes: Callable[[], int] = offered_bytes,
    ) -> None:
        """`layers` may have some of an incarnation before this one, whose load ends before another begins. With ranks
        any method may raise RankLostError, which ends the incarnation; with a device, DeviceError."""
        self.layers = layers
        self._ranks = layers.ranks
        self._transport = transport
        self._ipc_token = ipc_token
        self._log = log
        self._sampling_kernels = sampling_kernels
        self._free_bytes = free_bytes
        self.keeps_released = False
        """Whether blocks that were released may be found by others, as the router has said."""
        self._growing: LayersLoad | None = None
        """The layers of the slot that is served, cut for more ranks."""
        self._held: HeldMemory | None = None
        self._loading: Loading | None = None
        self.slot: Slot | None = None
        self.mirror: Mirror | None = None
        """Where this node follows another's slot."""

    def state_of(self, number: int) -> StageState:
        """Returns how far this stage is with the role of this number, the last one that it was told; 0: none."""
        if not number:
            return StageState.SPARE
        if self.slot is not None and self.slot.role.generation == number:
            return StageState.HOLDING
        if self.mirror is not None and self.mirror.number == number:
            return StageState.COMPLETE if self.mirror.is_complete else StageState.FILLING
        is_loading = self._loading is not None and self._loading.header.generation == number
        return StageState.LOADING if is_loading else StageState.REFUSED

    @property
    def lease_term(self) -> int:
        """Returns the term of the slot that is held, mirrored or loaded for; 0: of none."""
        if self.slot is not None:
            return self.slot.role.lease_term
        if self.mirror is not None:
            return self.mirror.role.lease_term
        return self._loading.message.lease_term if self._loading is not None else 0

    def assign(
        self, message: AssignStage | AssignMirror, header: Header, dtype: torch.dtype
    ) -> RoleTaken | RoleRefused | None:
        """Takes or mirrors a slot; None: its layers are being loaded, ask `poll`.

        Raises ProtocolError for layers that the model does not have.
        """
        if not 0 <= message.first_layer < message.stop_layer <= self.layers.config.num_layers:
            raise ProtocolError(f"layers [{message.first_layer}, {message.stop_layer}) are not in this model")
        num_tier_slots = message.num_tier_slots if isinstance(message, AssignStage) else 0
        if message.num_blocks < 1 or num_tier_slots < 0 or not 0 <= message.slot < message.num_slots:
            raise ProtocolError(
                f"invalid slot: {message.slot} of {message.num_slots}, with {message.num_blocks} blocks and "
                f"{num_tier_slots} tier slots"
            )
        self._close_slot()
        if isinstance(message, AssignMirror):
            self._abandon_growing()  # a mirror does not grow
        role = role_of(message, header)
        loading = self._loading
        if loading is not None and (loading.load.layers, loading.load.dtype) == (role.layers, dtype):
            self._loading = replace(loading, message=message, header=header)  # a new generation of the same: load once
            return None
        loaded = self.layers.loaded
        if loaded is not None and (loaded.layers, loaded.dtype) == (role.layers, dtype) and loading is None:
            return self._enter(message, header, loaded)
        self._abandon_growing()
        self._drop_memory()
        self.layers.drop()  # makes room before the new ones come
        self._log.info("loading_layers", first=role.layers.start, stop=role.layers.stop)
        self._loading = Loading(message, header, self.layers.begin_load(role, dtype, replaces=True))
        return None

    def poll(self) -> RoleTaken | RoleRefused | None:
        """Returns what became of the assignment that was loading; None while there is nothing new.

        Raises DeadlineError for a disk that hangs: this node serves no more, and keeps a spare from the slot.
        """
        self.layers.thread.check()
        if self._ranks is not None:
            self._ranks.check()
        loading = self._loading
        if loading is None:
            return None
        try:
            if not self.layers.look(loading.load):
                return None
            loaded = self.layers.loaded = loading.load.future.result()
        except LOADING_ERRORS as error:
            self._loading = None
            return self._refuse(error, loading.header)
        self._loading = None
        if self._ranks is not None and loaded.ranks_load is not None:
            self._ranks.use(loaded.ranks_load, loaded.num_bytes)
        return self._enter(loading.message, loading.header, loaded)

    @property
    def waits_for_quiet(self) -> bool:
        """Returns whether the stage can go back to its full degree once no step is under way: no further one may
        begin."""
        return self._growing is not None and self._growing.is_loaded

    def grow(self) -> None:
        """Goes back to the full degree, where ranks have come back: load beside the work, change over between steps."""
        ranks, slot = self._ranks, self.slot
        if ranks is None or slot is None or self._loading is not None:
            return
        try:
            if self._growing is not None:
                self.layers.look(self._growing)
            elif ranks.may_grow():
                self._begin_growing(ranks, slot)
        except RankLostError as error:
            ranks.check()  # raises where it is one that works
            self._give_up_growing(ranks, error)
        except LOADING_ERRORS as error:
            self._give_up_growing(ranks, refusal_to_load(error))
        if self._growing is not None and self._growing.is_loaded and not slot.executor.num_running:
            self._change_over(slot, self._growing.future.result())

    def _begin_growing(self, ranks: RankGroup, slot: Slot) -> None:
        loaded, device = self.layers.loaded, self.layers.device
        assert loaded is not None, "a slot has layers"
        # What is used now stays until the new parts are there.
        free = Free(self._free_bytes(), None if device.is_host else device.offered_bytes())
        kv = slot.held.memory.kv.shape
        kv_bytes = kv.num_bytes // kv.num_blocks * len(self._used_blocks(slot))
        refusal = against_growth(loaded.num_bytes, ranks.degree, ranks.next_degree(), kv_bytes, free)
        if refusal:
            ranks.postpone_growth(refusal)
            return
        ranks.attach_present()
        self._growing = self.layers.begin_load(slot.role, loaded.dtype, replaces=False)

    def _change_over(self, slot: Slot, loaded: LoadedLayers) -> None:
        """Raises RankLostError: once the ranks are told there is no way back but a new incarnation."""
        assert self._ranks is not None, "it is they who have grown"
        assert loaded.ranks_load is not None, "it was loaded for ranks"
        self.layers.loaded, self._growing = loaded, None
        used_blocks = torch.tensor(self._used_blocks(slot), dtype=torch.int64)
        try:
            with torch.inference_mode():
                self._ranks.change_over(loaded.ranks_load, loaded.num_bytes, used_blocks)
            slot.executor = self._executor(loaded.model, slot.held.memory)
            slot.executor.self_test()
        except LOADING_ERRORS as error:
            raise RankLostError(f"the stage cannot go on with more ranks: {refusal_to_load(error)}") from None

    @staticmethod
    def _used_blocks(slot: Slot) -> list[int]:
        return sorted(set(slot.held.tables.used_blocks()))

    def _give_up_growing(self, ranks: RankGroup, error: Exception) -> None:
        self._growing = None
        ranks.postpone_growth(str(error))

    def _abandon_growing(self) -> None:
        """Gives growth up for a stage that has no slot any more: what was loaded for it makes room."""
        if self._ranks is not None and self._growing is not None:
            self._growing = None
            self._ranks.forget_loads()

    def leave(self) -> None:
        """Forgets steps, what to mirror, and an assignment that is still loading; weights and memory stay."""
        self._loading = None
        self._close_slot()
        self._end_mirror()

    def forget(self) -> None:
        """Leaves, and gives up the memory too."""
        self.leave()
        self._abandon_growing()
        self._drop_memory()

    def _end_mirror(self) -> None:
        """Keeps what was copied, as far as it is good; the next mirror of this memory must get all of it."""
        mirror, self.mirror = self.mirror, None
        if mirror is None:
            return
        mirror.socket.close()
        if self._held is not None and mirror.is_complete:
            self._held.watermark = StepWatermark(mirror.mark)
            self._held.tables.inherit(mirror.written_blocks)

    def _drop_memory(self) -> None:
        self._end_mirror()
        self._held = None
        if self._ranks is not None:
            self._ranks.forget_memory()

    def _close_slot(self) -> None:
        if self.slot is not None:
            self.slot.close()
            self.slot = None

    def close(self) -> None:
        """Gives up what is loading."""
        self.leave()
        self.layers.thread.give_up()

    def _enter(
        self, message: AssignStage | AssignMirror, header: Header, loaded: LoadedLayers
    ) -> RoleTaken | RoleRefused:
        try:
            self._end_mirror()
            held = self._keep_or_allocate(message, loaded)
            if isinstance(message, AssignMirror):
                return self._follow(message, header, held)
            return self._serve_slot(message, header, loaded, held)
        except LOADING_ERRORS as error:
            return self._refuse(error, header)

    def _keep_or_allocate(self, message: AssignStage | AssignMirror, loaded: LoadedLayers) -> HeldMemory:
        """Returns the memory of this very slot as it is, or a new one. A mirror has no session tier."""
        num_tier_slots = 0 if isinstance(message, AssignMirror) else message.num_tier_slots
        tag = MemoryTag(
            message.pipeline, message.slot, message.num_slots, loaded.layers, message.num_blocks, loaded.dtype
        )
        if self._held is not None and self._held.tag == tag:
            self._held.watermark.begin_generation()
            self._held.tables.keeps_released = self.keeps_released
            if self._held.tier.num_slots != num_tier_slots:
                self._held.tier = make_session_tier(self._held.memory, 0, 0)  # the new one needs its room
                self._held.tier = self._make_tier(self._held.memory, num_tier_slots, self._held.watermark.mark)
            return self._held
        self._held = None  # nobody else has it: the new one needs its room
        memory = self.layers.allocate(loaded, message.num_blocks, with_log=message.slot < message.num_slots - 1)
        tier = self._make_tier(memory, num_tier_slots, 0)
        self._held = HeldMemory(tag, memory, self._new_tables(message.num_blocks), StepWatermark(), tier)
        return self._held

    def _make_tier(self, memory: PagedMemory, num_slots: int, since: int) -> SessionTier:
        """Returns one without slots where there is no room: the stage serves all the same."""
        try:
            return make_session_tier(memory, num_slots, since)
        except RuntimeError as error:
            self._log.warning("session_tier_missing", num_slots=num_slots, reason=str(error))
            return make_session_tier(memory, 0, since)

    def _new_tables(self, num_blocks: int) -> BlockTables:
        return BlockTables(KV_BLOCK_TOKENS, num_blocks, keeps_released=self.keeps_released)

    def _executor(self, model: StageModel, memory: PagedMemory) -> Executor:
        return Executor(model, memory) if self._ranks is None else Executor(model, memory, self._ranks.leader.lead)

    def _follow(self, message: AssignMirror, header: Header, held: HeldMemory) -> RoleTaken:
        # Of no use before the copy is complete, and what it held before as the slot's holder is overwritten.
        held.watermark, held.tables = StepWatermark(), self._new_tables(message.num_blocks)
        endpoint = choose_endpoint(message.primary, message.primary_ipc_token, self._ipc_token)
        socket = self._transport.push(
            f"acknowledgements of {message.pipeline}/{message.slot}", endpoint, is_watched=True
        )
        self.mirror = Mirror(message, header.router_term, held.memory, socket, self._log, header.generation)
        self._log.info("mirror_begins", pipeline=message.pipeline, slot=message.slot, lease_term=message.lease_term)
        return RoleTaken(self.mirror.report(), header)

    def _serve_slot(self, message: AssignStage, header: Header, loaded: LoadedLayers, held: HeldMemory) -> RoleTaken:
        role = role_of(message, header)
        executor = self._executor(loaded.model, held.memory)
        executor.self_test()
        endpoint = choose_endpoint(message.downstream, message.downstream_ipc_token, self._ipc_token)
        with ExitStack() as unused:
            downstream = self._transport.push(f"after {role.slot}", endpoint)
            unused.callback(downstream.close)
            slot = Slot(role, header.router_term, executor, held, downstream, self._sampling_kernels)
            if message.first_stage:
                endpoint = choose_endpoint(message.first_stage, message.first_stage_ipc_token, self._ipc_token)
                slot.first_stage = self._transport.push(f"samples of {role.slot}", endpoint)
            unused.pop_all()
        self.slot = slot  # whole, or refused
        self._log.info(
            "slot_taken",
            pipeline=message.pipeline,
            slot=message.slot,
            layers=[role.layers.start, role.layers.stop],
            generation=role.generation,
            lease_term=role.lease_term,
            weight_bytes=loaded.num_bytes,
            kv_bytes=held.memory.num_bytes,
            kv_mark=held.watermark.mark,
        )
        ready = StageReady(
            message.pipeline,
            message.slot,
            message.lease_term,
            held.watermark.mark,
            held.tier.since,
            held.tier.num_slots,
        )
        return RoleTaken(ready, Header(generation=role.generation))

    def _refuse(self, error: Exception, header: Header) -> RoleRefused:
        refusal = refusal_to_load(error)
        self._log.error("slot_not_taken", reason=str(refusal))
        return RoleRefused(refusal, header)
