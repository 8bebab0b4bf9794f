"""The stage process: one loop over control, steps, expert answers and micro-batches. I/O here, arithmetic elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import zmq

from common.compute.device_errors import raise_if_life_ending
from common.errors import DeadlineError, ExecutionError, MoemeshError, ProtocolError
from common.messages import (
    AssignMirror,
    AssignStage,
    Header,
    Hello,
    Message,
    MirrorAck,
    MirrorRows,
    MirrorTo,
    PublishPlacement,
    StageHeartbeat,
    Step,
    StepResult,
    Unassign,
)
from common.node.loop import POLL_MS, NodeLoop
from common.node.process import NodeProcess
from common.wire.array import frame_to_array
from common.wire.tensor import DTYPES, frame_to_tensor
from common.wire.transport import Full, MessageSocket
from services.stage.experts.client import CallDone, CallFailed, ExpertClient
from services.stage.model.executor import Broken, Executor, Finished, RunningBatch, WantsExperts
from services.stage.model.micro_batch import read_micro_batch, read_positions
from services.stage.model.paged_attention import KV_BLOCK_TOKENS
from services.stage.slot.mirror_sender import MirrorLink
from services.stage.slot.session_tier import read_pairs, restored_positions
from services.stage.slot.slot import MemoryTag, RoleRefused, RoleTaken, Slot
from services.stage.slot.stage_worker import StageWorker
from services.stage.step_output import class_number, passed_on, relayed

TURN_S = 0.005
"""How long batches run before a stage looks at its sockets."""
KEEP_STATE_S = 300.0
"""How long K and V are kept without a router: they may belong to requests that a restarted one resumes."""


@dataclass(slots=True)
class StageCounters:
    """What the loop itself counts, since start."""

    busy_seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    dropped: int = 0
    """Messages of an old term, generation, lease or role, and of a stream that a mirror has given up."""


class StageService(NodeLoop[MessageSocket]):
    """One stage."""

    def __init__(
        self,
        node: NodeProcess[MessageSocket],
        worker: StageWorker,
        experts: ExpertClient,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(node, clock)
        self._worker = worker
        self._experts = experts
        self._mirror_link = MirrorLink(node.transport, node.ipc_token, node.log)
        self._last_registered_s = clock()
        node.control.add_held = self._add_held
        self._waiting: dict[int, tuple[Executor, RunningBatch]] = {}
        """Batches that wait for their experts, by number of the call."""
        self._unsent: deque[tuple[Message, Header, float]] = deque()
        """Messages that the downstream did not take yet, with their deadlines; bounded by the steps in flight."""
        self._counters = StageCounters()
        self._role_number = 0
        """Number of the role that is followed now; 0: none."""
        self._newest_role_number = 0
        """The newest number that this stage was told; roles may come late, or twice."""
        self._classes: tuple[str, ...] = ()
        """This stage's numeric class and its experts', and what stands for them, by what stands for those before."""
        self._class_numbers: dict[int, int] = {}

    def _sockets(self) -> Iterable[zmq.Socket[bytes] | int | None]:
        links = *self._experts.poll_sockets(), *self._mirror_link.poll_sockets()
        return self._node.data.raw, self._experts.bell, *links

    def _wait_ms(self, now_s: float) -> int:
        slot = self._worker.slot
        has_work = slot is not None and (slot.executor.has_work or self._mirror_link.wants_to_send)
        return 0 if has_work else self._experts.wait_ms(now_s, POLL_MS)

    def _work(self, now_s: float) -> None:
        self._answer_assignment(self._worker.poll())
        self._worker.grow()
        self._receive_steps(now_s)
        if not self._waiting:
            self._run_what_can()  # first: a lone step waits for nothing else
        if self._worker.mirror is not None:
            self._worker.mirror.look()
        self._end_calls(now_s)
        self._send_unsent(now_s)
        self._feed_mirror(now_s)
        self._run_what_can()
        self._forget_after_long_silence(now_s)

    def _run_what_can(self) -> None:
        slot = self._worker.slot
        if slot is not None and slot.executor.has_work:
            self._run(slot)

    # ---- control

    def _add_held(self, hello: Hello) -> Hello:
        """Adds what goes with a hello. The router counts on it: until the next assignment, which voids all steps of
        before, none is taken that could give a block to another sequence."""
        slot = self._worker.slot
        if slot is None:
            return hello
        slot.takes_steps = False
        return slot.add_to(hello)

    def _forget_after_long_silence(self, now_s: float) -> None:
        if self._control.registered:
            self._last_registered_s = now_s
        elif now_s - self._last_registered_s > KEEP_STATE_S and self._worker.slot is not None:
            self._log.warning("state_forgotten", reason=f"no router for {KEEP_STATE_S:.0f} s")
            self._become_spare()
            self._newest_role_number = 0

    def _obey(self, message: Message, header: Header, now_s: float) -> None:
        if isinstance(message, AssignStage | AssignMirror | Unassign):
            self._follow_role(message, header, now_s)
        elif isinstance(message, MirrorTo):
            self._mirror_to(message, header)
        elif isinstance(message, PublishPlacement):
            self._apply_placement(message, header, now_s)
        else:
            raise ProtocolError(f"a stage does not handle {type(message).__name__}")

    def _follow_role(self, message: AssignStage | AssignMirror | Unassign, header: Header, now_s: float) -> None:
        """Follows the newest role, whenever older ones come; told again, it changes nothing: heartbeats say what became
        of it."""
        number = header.generation
        if number <= self._newest_role_number:
            self._counters.dropped += number < self._newest_role_number
            return
        self._newest_role_number = number
        if isinstance(message, Unassign):
            self._become_spare()
        else:
            self._role_number = number
            self._assign(message, header, now_s)

    def _assign(self, message: AssignStage | AssignMirror, header: Header, now_s: float) -> None:
        if self._worker.slot is not None:
            self._worker.slot.takes_steps = False  # those that wait are void; they must not touch block tables either
        # Rows that wait in the socket are part of what is taken over.
        self._receive_steps(now_s)
        self._forget_steps()
        self._check_block_tokens()
        self._tell_experts_settings()
        former = self._lease_and_memory()
        self._worker.keeps_released = self._control.settings.caches_prefixes
        outcome = self._worker.assign(message, header, self._dtype)
        # Under the same lease, too, a pool of another size is other memory: what the mirror lacks was of the former.
        if former is None or self._lease_and_memory() != former:
            self._mirror_link.stop()
        self._answer_assignment(outcome)

    def _lease_and_memory(self) -> tuple[int, MemoryTag] | None:
        """Returns what distinguishes the slot from another: its lease and its memory. It keeps nothing alive, so that
        new memory finds the old one's room."""
        slot = self._worker.slot
        return None if slot is None else (slot.role.lease_term, slot.held.tag)

    def _mirror_to(self, message: MirrorTo, header: Header) -> None:
        slot = self._worker.slot
        if slot is None or slot.role.lease_term != message.lease_term:
            self._counters.dropped += 1  # of a lease before this one
        else:
            self._mirror_link.obey(message, header)

    def _tell_experts_settings(self) -> None:
        """Hands over the mesh's settings, which calls need also before the first placement."""
        settings = self._control.settings
        self._experts.combine = settings.combine
        self._experts.degrade_after_s = settings.degrade_after_ms / 1000 if settings.expert_loss == "degrade" else None
        self._experts.nodes.expect(settings.num_slices)

    def _apply_placement(self, message: PublishPlacement, header: Header, now_s: float) -> None:
        self._tell_experts_settings()
        slot = self._worker.slot
        before = slot and self._experts.nodes.classes_of(slot.role.layers)
        self._experts.apply_placement(message, header.router_term, self._control.settings.num_slices, now_s)
        if slot is not None and before != self._experts.nodes.classes_of(slot.role.layers):
            slot.executor.mix()

    def _answer_assignment(self, outcome: RoleTaken | RoleRefused | None) -> None:
        if isinstance(outcome, RoleTaken):
            self._control.send(outcome.ready, outcome.header)
        elif isinstance(outcome, RoleRefused):
            self._control.fail(outcome.error, outcome.header)

    def _check_block_tokens(self) -> None:
        block_tokens = self._control.settings.block_tokens
        if block_tokens != KV_BLOCK_TOKENS:
            raise ProtocolError(f"the router has KV blocks of {block_tokens} tokens, this build has {KV_BLOCK_TOKENS}")

    def _become_spare(self) -> None:
        self._role_number = 0
        self._forget_steps()
        self._mirror_link.stop()
        self._worker.forget()

    def _forget_steps(self) -> None:
        self._experts.abandon()
        self._waiting.clear()
        self._unsent.clear()

    # ---- steps

    def _receive_steps(self, now_s: float) -> None:
        """Receives what waits, and begins the steps that can."""
        while (received := self._node.data.receive()) is not None:
            message, header = received
            if isinstance(message, MirrorRows):
                self._copy(message, header)
                continue
            if isinstance(message, MirrorAck):
                self._mirror_link.acknowledged(message, header)
                continue
            slot = self._worker.slot
            stamp = (header.router_term, header.generation)
            if slot is None or not isinstance(message, Step | StepResult) or not slot.takes(stamp):
                self._counters.dropped += 1
                continue
            try:
                if isinstance(message, StepResult):
                    slot.early_steps.note_samples(header.step, message)
                else:
                    self._check_sequence(slot, header)
                    slot.early_steps.add(message, header, now_s)
            except Exception as error:
                self._break_step(error, header)
        self._begin_steps(now_s)

    def _begin_steps(self, now_s: float) -> None:
        """Begins the steps that have come, in their order, up to one whose tokens are not known yet."""
        slot = self._worker.slot
        if slot is None or self._worker.waits_for_quiet:
            return
        while slot.takes_steps and (arrived := slot.early_steps.pop()) is not None:
            try:
                step = slot.early_steps.with_tokens(arrived.step)
                # Its time runs from when it could begin, as the router counts it.
                began_s = now_s if arrived.step.awaited_step else arrived.arrived_s
                self._begin_step(slot, step, arrived.header, began_s)
            except Exception as error:
                self._break_step(error, arrived.header)

    def _copy(self, message: MirrorRows, header: Header) -> None:
        mirror = self._worker.mirror
        if mirror is None or not mirror.follows(message, header):
            self._counters.dropped += 1
        elif mirror.apply(message, header):
            self._control.send(mirror.report(), Header(generation=mirror.number))

    def _feed_mirror(self, now_s: float) -> None:
        if self._worker.slot is not None:
            self._mirror_link.pump(self._worker.slot.held, now_s)

    def _check_sequence(self, slot: Slot, header: Header) -> None:
        """Upstream has a new socket for each generation, and counts its messages from 1."""
        due, slot.last_sequence_number = slot.last_sequence_number + 1, header.sequence_number
        if header.sequence_number != due:
            raise ProtocolError(
                f"step {header.step} came as message {header.sequence_number} when message {due} was due: "
                "messages were lost or damaged in between"
            )

    def _begin_step(self, slot: Slot, step: Step, header: Header, now_s: float) -> None:
        slot.held.watermark.begin(header.step, step.previous_step)
        deadline_s = now_s + header.time_left_ms / 1000
        self._copy_blocks(slot, step)
        if step.computing_slots and slot.role.slot.index not in step.computing_slots:
            self._relay(slot, step, header, deadline_s)
            return
        config = self._worker.layers.config
        if slot.role.is_first:
            tokens = frame_to_array(step.hidden, "int32", (None,), "Step.hidden")
            if tokens.size and not (tokens.min() >= 0 and tokens.max() < config.vocab_size):
                raise ProtocolError(f"Step.hidden holds a token id outside [0, {config.vocab_size})")
            hidden = torch.from_numpy(tokens.astype(np.int64))
        else:
            hidden = frame_to_tensor(step.hidden, self._dtype, (None, config.hidden_size), "Step.hidden")
        adjustments = slot.adjustments if slot.role.is_last else None
        batch = read_micro_batch(step, hidden, slot.held.tables, adjustments)
        slot.executor.add(step, header, deadline_s, batch)

    @staticmethod
    def _copy_blocks(slot: Slot, step: Step) -> None:
        """Copies what a step saves to the session tier, and what it brings back, before anything of it is computed."""
        held, places = slot.held, (slot.held.memory.num_blocks, slot.held.tier.num_slots)
        saved = read_pairs(step.saves, places, "Step.saves")
        restored = read_pairs(step.restores, places[::-1], "Step.restores")
        if restored and step.computing_slots:
            raise ProtocolError("Step.restores is not empty in a replay")
        with torch.inference_mode():
            if saved:
                held.tier.save(*zip(*saved, strict=True))
            if restored:
                held.tier.restore(*zip(*restored, strict=True))
                held.tables.inherit(block_id for _, block_id in restored)

    def _relay(self, slot: Slot, step: Step, header: Header, deadline_s: float) -> None:
        """Relays a replay step that is for other slots: what was sent on for its tokens is sent on again, if a later
        one computes."""
        positions = read_positions(step, slot.held.tables)
        slot.adjustments.release(frame_to_array(step.released, "int64", (None,), "Step.released").tolist())
        slot.held.tables.computed(step)  # by this stage or one before it, or it could not be relayed
        slot.held.watermark.finish(header.step)
        self._send_on(relayed(slot, step, positions, self._class_after(slot, step)), header, deadline_s)

    def _class_after(self, slot: Slot, step: Step) -> int:
        """Returns what stands for the classes of all stages up to this one, and of their experts."""
        ranks = self._worker.layers.ranks
        own = f"{self._node.numeric_class} {0 if ranks is None else ranks.degree}"
        classes = own, *self._experts.nodes.classes_of(slot.role.layers)
        if classes != self._classes:
            self._classes, self._class_numbers = classes, {}
        if step.numeric_class not in self._class_numbers:
            self._class_numbers[step.numeric_class] = class_number(step.numeric_class, classes)
        return self._class_numbers[step.numeric_class]

    def _run(self, slot: Slot) -> None:
        """Runs batches one after the other, as long as one can go on, but looks at the sockets now and then."""
        until_s = self._clock() + TURN_S
        while slot.executor.has_work:
            began_s = self._clock()
            outcome = slot.executor.run_one()
            if outcome is not None:
                self._go_on(slot, outcome)
            ended_s = self._clock()
            self._counters.busy_seconds += ended_s - began_s
            if isinstance(outcome, WantsExperts) and not slot.executor.has_work:
                self._await_answer(slot.executor, outcome.running, until_s)
            elif isinstance(outcome, Finished):
                self._receive_steps(ended_s)  # the next step may be here, and wait for this one's tokens
            if outcome is None or ended_s >= until_s:
                return

    def _go_on(self, slot: Slot, outcome: WantsExperts | Finished | Broken) -> None:
        try:
            if isinstance(outcome, WantsExperts):
                self._call_experts(slot, outcome)
            elif isinstance(outcome, Finished):
                self._pass_on(slot, outcome)
            else:
                raise outcome.error
        except Exception as error:
            slot.executor.drop(outcome.running)
            self._break_step(error, outcome.running.header)

    def _call_experts(self, slot: Slot, outcome: WantsExperts) -> None:
        now_s = self._clock()
        deadline_s = min(outcome.running.deadline_s, now_s + self._control.settings.call_deadline_ms / 1000)
        number = self._experts.start(outcome.call, outcome.running.header, now_s, deadline_s)
        self._waiting[number] = (slot.executor, outcome.running)

    def _await_answer(self, executor: Executor, running: RunningBatch, until_s: float) -> None:
        """Waits a moment for the call that this batch has just begun: its answer may be only microseconds away. A lone
        batch may go on until `until_s`; of two, one must not overtake the other, of whose sequences it may have later
        chunks."""
        number = next(reversed(self._waiting), 0)
        if self._waiting.get(number, (executor, None))[1] is not running:
            return  # its call could not begin
        until_s = until_s if executor.num_running == 1 else 0.0
        if (done := self._experts.await_answer(number, self._clock, until_s)) is not None:
            self._end_call(done)

    def _end_calls(self, now_s: float) -> None:
        for ended in self._experts.poll(now_s):
            self._end_call(ended)

    def _end_call(self, ended: CallDone | CallFailed) -> None:
        executor, running = self._waiting.pop(ended.number)
        if isinstance(ended, CallDone):
            running.degraded_rows |= ended.degraded_rows
            running.is_mixed |= ended.is_mixed
            running.num_retried_calls += ended.num_retried
            executor.resume(running, ended.answer)
        else:
            executor.drop(running)
            self._fail_step(ended.error, running.header)

    def _pass_on(self, slot: Slot, finished: Finished) -> None:
        running, held = finished.running, slot.held
        self._counters.steps += 1
        self._counters.rows += running.batch.slots.shape[0]
        with torch.inference_mode():
            held.memory.log_hidden(running.batch.slots, finished.output)
        held.tables.computed(running.step)
        held.watermark.finish(running.header.step)
        self._send_on(
            passed_on(slot, finished, self._class_after(slot, running.step)), running.header, running.deadline_s
        )
        # After the step itself: the mirror may lag by a step, the client should not.
        written = running.batch.slots
        if running.step.restores.shape[0]:
            written = torch.cat((written, restored_positions(running.step)))
        self._mirror_link.send_rows(held, written)

    def _send_on(self, message: Message, header: Header, deadline_s: float) -> None:
        slot = self._worker.slot
        if isinstance(message, StepResult) and slot is not None:
            self._tell_samples(slot, message, header)
        self._unsent.append((message, header, deadline_s))
        self._send_unsent(self._clock())

    def _tell_samples(self, slot: Slot, result: StepResult, header: Header) -> None:
        """Lets the first stage, which may be this one, know what was sampled: first of all, since it may wait."""
        if slot.role.is_first:
            slot.early_steps.note_samples(header.step, result)
        else:
            slot.untold = result, header
            self._send_untold(slot)

    @staticmethod
    def _send_untold(slot: Slot) -> None:
        if slot.untold is not None and slot.first_stage is not None:
            with suppress(Full):  # not connected yet, perhaps; the next turn tries again
                slot.first_stage.send(*slot.untold)
                slot.untold = None

    def _send_unsent(self, now_s: float) -> None:
        """Sends in order; a downstream that is not connected yet gets them when it is, until their deadline."""
        slot = self._worker.slot
        if slot is not None:
            self._send_untold(slot)
        while self._unsent and slot is not None:
            message, header, deadline_s = self._unsent[0]
            if now_s >= deadline_s:
                self._unsent.popleft()
                self._fail_step(DeadlineError(f"{slot.downstream.name} did not take the step in time"), header)
                continue
            try:
                left_ms = int((deadline_s - now_s) * 1000)
                slot.downstream.send(message, replace(header, time_left_ms=left_ms))
            except Full:
                return
            self._unsent.popleft()

    def _break_step(self, error: Exception, header: Header) -> None:
        """What a step's numbers provoke must not take the other steps along. Raises what is not a step's fault."""
        raise_if_life_ending(error)
        if not isinstance(error, MoemeshError):
            self._log.error("step_crashed", step=header.step, exc_info=error)
            error = ExecutionError(f"computing failed: {error}")
        self._fail_step(error, header)

    def _fail_step(self, error: MoemeshError, header: Header) -> None:
        self._log.error("step_failed", step=header.step, code=error.code, reason=str(error))
        self._control.fail(error, replace(header, time_left_ms=0))

    # ---- small things

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self._control.settings.dtype]

    def _load(self) -> StageHeartbeat:
        worker, experts, slot, mirror = self._worker, self._experts, self._worker.slot, self._worker.mirror
        own, calls, ranks = self._counters, self._experts.counters, worker.layers.ranks
        return StageHeartbeat(
            busy_seconds=own.busy_seconds + experts.busy_seconds,
            steps=own.steps,
            rows=own.rows,
            # What waits for its link is not lost.
            queued=len(self._unsent) + (slot.executor.num_running if slot is not None else 0),
            dropped=own.dropped + calls.late_answers,
            **asdict(calls),
            call_bytes=experts.bytes_sent,
            rank_degree=1 if ranks is None else ranks.degree,
            reduce_seconds=0.0 if ranks is None else ranks.exchange.seconds,
            reduces=0 if ranks is None else ranks.exchange.count,
            role_number=self._role_number,
            role_state=worker.state_of(self._role_number),
            lease_term=worker.lease_term,
            kv_mark=slot.held.watermark.mark if slot is not None else 0,
            tier_since=slot.held.tier.since if slot is not None else 0,
            num_tier_slots=slot.held.tier.num_slots if slot is not None else 0,
            broken_stream=mirror.broken_stream if mirror is not None else 0,
            feed_number=self._mirror_link.feed_number,
            placement_version=experts.nodes.version_of(self._control.router_term),
        )
