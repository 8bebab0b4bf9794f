"""The mesh thread: observe, decide, send. It alone touches the scheduler, the roles and the sockets.

The HTTP front lives in another thread (asyncio). Requests come in through `submit`, tokens leave through the callbacks
given there, at most one hand-over a step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import structlog

from common.checkpoint.model_config import ModelConfig
from common.errors import FencedError, MoemeshError, NodeLostError, ProtocolError, error_from_wire
from common.ids import NodeId, PipelineId, RequestId, StepId
from common.messages import (
    ExpertHeartbeat,
    Failed,
    Header,
    Heartbeat,
    Hello,
    Leave,
    LeaveAcknowledged,
    Message,
    MirrorReady,
    ShardsReady,
    StageHeartbeat,
    StageReady,
    Welcome,
)
from common.topology import NodeDescription, NodeKind, StageState
from services.router.control.actions import Action, OpenPipeline, SuspendPipeline, Tell
from services.router.control.adoption import Arrival, read_held_slot
from services.router.control.experts.expert_roles import ExpertRoles
from services.router.control.lost_steps import LostSteps
from services.router.control.membership import (
    ChangeReason,
    DeclaredDead,
    Membership,
    MembershipChange,
    NodeState,
    check_hello,
    differing_classes,
    not_linked,
    refuse_other_device,
)
from services.router.control.readiness import MeshEvidence, ProgressWatch, accepts_requests, judge
from services.router.control.retelling import Beliefs, Refusals
from services.router.control.stage_roles import StageRoles
from services.router.engine import GenerationRequest, Readiness
from services.router.mesh.placer import ProcessPlacer
from services.router.mesh.sockets import MeshClient, Witnesses
from services.router.mesh.status import MeshStatus, mesh_evidence, node_statuses
from services.router.mesh.steps import StepFlow

CONTROL_BUDGET_S, COMMANDS_BUDGET_S = 0.001, 0.002
"""Time per turn: where all nodes speak at once, or a client brings hundreds of requests, tokens go out in between."""
STATUS_INTERVAL_S = 0.1
HEARTBEATS = {NodeKind.STAGE: StageHeartbeat, NodeKind.EXPERT: ExpertHeartbeat}


@dataclass(frozen=True, slots=True)
class MeshTerms:
    """What every node is told, and must have."""

    config: ModelConfig
    fingerprint: str
    welcome: Welcome


@dataclass(frozen=True, slots=True)
class MeshRoles:
    """The roles of nodes: slots of stages, shards of experts, and the placer that computes where shards go."""

    stages: StageRoles
    experts: ExpertRoles
    placer: ProcessPlacer


@dataclass(frozen=True, slots=True)
class LoopHooks:
    """What the loop asks of its process. What they raise ends it."""

    clock: Callable[[], float] = time.monotonic
    housekeeping: Callable[[], None] = lambda: None
    """It is called in every turn, and is cheap."""
    outgrow: Callable[[int], None] = lambda term: None
    """It is called with the router's term that a node has obeyed."""


class MeshLoop:
    """See the module. `run` is the thread's function; `submit`, `cancel`, `stop`, `status` are for others."""

    def __init__(
        self,
        terms: MeshTerms,
        client: MeshClient,
        flow: StepFlow,
        roles: MeshRoles,
        membership: Membership,
        log: structlog.stdlib.BoundLogger,
        hooks: LoopHooks,
    ) -> None:
        self._terms = terms
        self._client = client
        self._scheduler = flow.scheduler
        self._stages, self._experts, self._placer = roles.stages, roles.experts, roles.placer
        self._membership = membership
        self._flow = flow
        self._log = log
        self._clock, self._housekeeping, self._outgrow = hooks.clock, hooks.housekeeping, hooks.outgrow
        self._commands: deque[GenerationRequest | RequestId] = deque()
        self._nodes: dict[NodeId, NodeDescription] = {}
        self._arriving: dict[NodeId, Arrival] = {}  # nodes without a role, since the link to them does not stand
        self._heartbeats: dict[NodeId, Heartbeat] = {}
        self._progress = ProgressWatch()
        self._witnesses = Witnesses(client, membership, log)
        self._declared_dead = DeclaredDead()
        self._beliefs = Beliefs(roles.stages, roles.experts)
        self._leaving: set[NodeId] = set()  # nodes that wait for leave
        self._last_failure = ""
        self._refusals = Refusals()
        self._lost_steps = LostSteps()
        self._stopping = False
        self._next_status_s = 0.0
        self.status = MeshStatus(Readiness(False, "no node has registered yet"))

    # ---- from other threads

    def submit(self, request: GenerationRequest) -> None:
        """Hands in a request, or what is left of one; its outcome comes through the sink."""
        self._commands.append(request)
        self._client.wake()

    def cancel(self, request_id: RequestId) -> None:
        """Cancels a request that is not wanted any more."""
        self._commands.append(request_id)
        self._client.wake()

    def stop(self) -> None:
        """Ends `run`."""
        self._stopping = True
        self._client.wake()

    # ---- the thread

    def run(self) -> None:
        """Serves until `stop`."""
        while not self._stopping:
            self._client.wait(0 if self._commands else self._witnesses.wait_ms)
            now_s = self._clock()
            self._membership.turn(now_s)
            self._go_on(now_s)
            self._housekeeping()
            self._apply_commands(now_s)
            self._receive_control(now_s)
            self._look_at_links(now_s)
            self._apply_changes(self._membership.tick(now_s), now_s)
            self._place_shards(now_s)
            if self._stages.waits:
                self._act(self._stages.tick(now_s), now_s)
            self._renew(self._flow.check_deadlines(now_s), now_s)
            self._renew(self._refusals.due(self._stages.pipelines, now_s), now_s)
            self._let_leavers_go(now_s)
            self._publish_news(now_s)
            self._send_plans(now_s)
            self._flow.hand_on()
            self._publish_status(now_s)

    def _go_on(self, now_s: float) -> None:
        """Receives results and sends the steps after them, before anything else: stages wait for that and for nothing
        else here. The tokens are written and shown while the stages compute."""
        num_done = self._flow.totals.pipeline_steps
        try:
            self._renew(self._flow.receive_results(now_s), now_s)
            if self._flow.totals.pipeline_steps > num_done:
                # What nodes have said in the meantime has not been heard yet: nobody's time is up before that.
                self._send_plans(now_s, expires=False)
        finally:
            self._flow.hand_on()  # also where this thread breaks: these tokens have been made

    def _send_plans(self, now_s: float, *, expires: bool = True) -> None:
        is_awaited = partial(self._stages.is_awaited, now_s=now_s)
        self._renew(self._flow.send_plans(now_s, is_awaited, expires=expires), now_s)

    def _apply_commands(self, now_s: float) -> None:
        """Applies what others have asked for; what is restored at once, since only a request in line gets the cache of
        stages that are back."""
        until_s = self._clock() + COMMANDS_BUDGET_S
        while self._commands and (_is_restored(self._commands[0]) or self._clock() <= until_s):
            command = self._commands.popleft()
            try:
                if isinstance(command, GenerationRequest):
                    self._scheduler.add(command, now_s)
                else:
                    self._scheduler.cancel(command)
            except Exception as error:  # also of ours: it costs this request
                self._flow.refuse(command.request_id if isinstance(command, GenerationRequest) else command, error)

    # ---- control

    def _receive_control(self, now_s: float) -> None:
        until_s = self._clock() + CONTROL_BUDGET_S
        while self._clock() <= until_s and (received := self._client.receive_control()) is not None:
            node_id, message, header = received
            try:
                self._control_message(node_id, message, header, now_s)
            except FencedError:
                raise
            except MoemeshError as error:
                self._log.error("control_message_refused", node=node_id, kind=type(message).__name__, reason=str(error))
                self._client.tell(node_id, Failed(error.code, str(error)))

    def _control_message(self, node_id: NodeId, message: Message, header: Header, now_s: float) -> None:
        if isinstance(message, Hello):
            self._register(node_id, message, header.router_term, now_s)
            return
        description = self._nodes.get(node_id)
        if description is None:
            self._declared_dead.refuse(node_id)
            if self._declared_dead.was_let_go(node_id):
                self._client.tell(node_id, LeaveAcknowledged())
            return  # a new router: the node says hello as soon as it sees that its link is new
        if isinstance(message, Heartbeat):
            if not isinstance(message, HEARTBEATS[description.kind]):
                raise ProtocolError(
                    f"{type(message).__name__} is not the heartbeat of a node of kind {description.kind}"
                )
            self._heartbeats[node_id] = message
            self._progress.note(node_id, message, now_s)
            changes = self._membership.heartbeat(
                node_id, description.incarnation, message.steps, message.queued > 0, now_s
            )
            self._apply_changes(changes, now_s)
            if node_id in self._nodes:
                self._compare_beliefs(node_id, message, now_s)
        elif isinstance(message, StageReady):
            self._log.info("stage_ready", node=node_id, pipeline=message.pipeline, slot=message.slot)
            self._act(self._stages.apply_ready(node_id, message, header.generation), now_s)
        elif isinstance(message, MirrorReady):
            self._log.info("mirror_ready", node=node_id, slot=message.slot, is_complete=message.is_complete)
            actions = self._stages.apply_mirror_report(
                node_id, header.generation, is_complete=message.is_complete, broken_stream=message.broken_stream
            )
            self._act(actions, now_s)
        elif isinstance(message, ShardsReady):
            self._act(self._experts.read_report(node_id, message), now_s)
        elif isinstance(message, Leave):
            self._drain(node_id, message.reason, now_s)
        elif isinstance(message, Failed):
            self._node_failed(node_id, message, header, now_s)
        else:
            raise ProtocolError(f"the router does not handle {type(message).__name__} on the control link")

    def _compare_beliefs(self, node_id: NodeId, said: StageHeartbeat | ExpertHeartbeat, now_s: float) -> None:
        """Makes up for what was lost on the way, in either direction: what is believed comes with each heartbeat."""
        if said.is_leaving and node_id not in self._leaving:
            self._drain(node_id, "stopped", now_s)
        if node_id not in self._nodes.keys() - self._arriving.keys():  # it has no role that it could be wrong about
            return
        if isinstance(said, StageHeartbeat) and said.role_state == StageState.REFUSED:
            self._note_refusal(node_id, said.role_number, now_s)
        news, again = self._beliefs.compare(node_id, said, now_s)
        self._act(news, now_s)
        for topic, actions in again.items():
            self._log.info("told_again", node=node_id, topic=topic)
            self._act(actions, now_s)

    def _note_refusal(self, node_id: NodeId, number: int, now_s: float) -> None:
        self._act(self._stages.apply_refusal(node_id, number), now_s)
        if (pipeline := self._stages.waits_for(node_id, number)) is not None:
            self._refusals.note(pipeline, number, now_s)

    def _register(self, node_id: NodeId, hello: Hello, obeyed_term: int, now_s: float) -> None:
        description = check_hello(hello, node_id, self._terms.fingerprint, self._terms.config)
        self._outgrow(obeyed_term)
        refuse_other_device(description, self._nodes.values())
        # Now: what is wrong with it costs this node alone.
        arrival = Arrival(read_held_slot(hello), self._experts.read_held(hello.held_shards))
        self._client.watch(description)  # first: a node that cannot be reached is refused before anything counts on it
        changes = self._membership.join(node_id, description.incarnation, now_s)
        if self._membership.state_of(node_id) is NodeState.DEAD:
            self._client.unwatch(node_id)
            self._apply_changes(changes, now_s)  # a hello, too, may be the moment in which it is found dead
            self._declared_dead.refuse(node_id)
            raise NodeLostError(f"{node_id} was declared dead: it must come back as another incarnation")
        self._nodes[node_id] = description
        self._progress.join(node_id, now_s)
        self._client.tell(node_id, self._terms.welcome)
        self._log.info("node_joined", node=node_id, **description.summary)
        if classes := differing_classes(self._nodes.values(), description.kind):
            self._log.warning("numeric_classes_differ", kind=description.kind, classes=classes)
        self._apply_changes([change for change in changes if change.node_id != node_id], now_s)
        self._arriving[node_id] = arrival
        if description.kind is NodeKind.STAGE:
            self._stages.adoption.see_process(node_id, is_new=not (obeyed_term or hello.held_slot))
        if self._membership.has_stood(node_id):
            self._give_role(node_id, now_s)

    def _give_role(self, node_id: NodeId, now_s: float) -> None:
        """Gives a node its role once the link to it stands: a name that leads nowhere is not a place for one."""
        arrival, description = self._arriving.pop(node_id), self._nodes[node_id]
        if description.kind is NodeKind.STAGE:
            # The placement goes out before the role: a stage that is ready knows which nodes to ask.
            self._act(self._experts.publish_to([node_id]), now_s)
            self._act(self._stages.join(description, now_s, arrival.slot), now_s)
        else:
            self._experts.join(description, now_s, arrival.shards)

    def _node_failed(self, node_id: NodeId, message: Failed, header: Header, now_s: float) -> None:
        error = error_from_wire(message.code, f"{node_id}: {message.message}")
        self._log.error("node_failed", node=node_id, code=message.code, reason=message.message, step=header.step)
        if not header.step:
            self._last_failure = f"{node_id}: {message.message}"
            self._note_refusal(node_id, header.generation, now_s)
            return
        self._renew(self._flow.fail_step(StepId(header.step), header.generation, error, now_s), now_s)

    def _drain(self, node_id: NodeId, reason: str, now_s: float) -> None:
        """Prepares for the end of a node; it goes on until nothing is lost with it, or until its own patience ends."""
        self._leaving.add(node_id)
        self._log.info("node_leaves", node=node_id, reason=reason)
        if node_id in self._arriving:
            self._let_go(node_id, now_s)
        elif self._nodes[node_id].kind is NodeKind.STAGE:
            self._act(self._stages.drain(node_id), now_s)
        else:
            self._experts.drain(node_id, now_s)

    def _let_leavers_go(self, now_s: float) -> None:
        for node_id in (*self._stages.leaving, *self._experts.may_go(now_s)):
            self._let_go(node_id, now_s)

    def _let_go(self, node_id: NodeId, now_s: float) -> None:
        description = self._nodes[node_id]
        self._apply_changes(self._membership.lose(node_id, description.incarnation, ChangeReason.LEFT), now_s)
        self._publish_news(now_s)
        self._declared_dead.let_go(node_id)
        self._client.tell(node_id, LeaveAcknowledged())

    def _look_at_links(self, now_s: float) -> None:
        for pipeline, sent_s in self._flow.pop_answered().items():
            self._witnesses.answered(filter(None, self._stages.pipelines[pipeline].holders), now_s - sent_s)
        self._apply_changes(self._witnesses.look(now_s, self._nodes, self._stages.mirrors.replaceable), now_s)
        for node_id in [node_id for node_id in self._arriving if self._membership.has_stood(node_id)]:
            self._give_role(node_id, now_s)

    def _apply_changes(self, changes: list[MembershipChange], now_s: float) -> None:
        for change in changes:
            if change.after is not NodeState.DEAD:
                if change.before is not None:
                    self._log.info("node_state", node=change.node_id, state=change.after, reason=change.reason)
                continue
            self._log.warning("node_lost", node=change.node_id, reason=change.reason)
            self._client.unwatch(change.node_id)
            description = self._nodes.pop(change.node_id, None)
            if change.reason not in (ChangeReason.LEFT, ChangeReason.REPLACED):
                self._declared_dead.add(change, description)
            if description is not None and change.reason is not ChangeReason.REPLACED:  # that one has the same names
                self._client.remove_socket_files(description)
            self._progress.forget(change.node_id)
            self._beliefs.forget(change.node_id)
            self._leaving.discard(change.node_id)
            self._witnesses.forget(change.node_id)
            self._flow.totals.keep(self._heartbeats.pop(change.node_id, None))
            self._arriving.pop(change.node_id, None)
            self._act(self._stages.lose(change.node_id), now_s)
            self._experts.lose(change.node_id)

    def _act(self, actions: list[Action], now_s: float) -> None:
        for action in actions:
            if isinstance(action, Tell):
                self._client.tell(action.node_id, action.message, action.header)
            elif isinstance(action, OpenPipeline):
                if (failure := self._flow.open(action, self._nodes[action.first_stage], now_s)) is not None:
                    self._last_failure = f"pipeline {action.pipeline}: {failure}"
                    self._refusals.note(action.pipeline, action.generation, now_s)
            elif isinstance(action, SuspendPipeline):
                self._log.warning("pipeline_suspended", pipeline=action.pipeline)
                self._flow.suspend(action.pipeline, now_s)
            else:
                self._log.warning("pipeline_closed", pipeline=action.pipeline)
                self._flow.close(action.pipeline, now_s)

    def _renew(self, broken: list[PipelineId], now_s: float) -> None:
        for pipeline in dict.fromkeys(broken):
            self._act(self._stages.renew(pipeline), now_s)

    def _publish_news(self, now_s: float) -> None:
        if self._experts.has_news:
            stages = [node.node_id for node in self._nodes.values() if node.kind is NodeKind.STAGE]
            self._act(self._experts.pop_news(stages), now_s)

    def _place_shards(self, now_s: float) -> None:
        if (request := self._experts.pop_request(now_s)) is not None:
            self._placer.begin(request)
        while (answer := self._placer.pop_answer()) is not None:
            self._experts.accept_answer(answer)
        self._act(self._experts.tick(now_s), now_s)

    # ---- what others see

    def _publish_status(self, now_s: float) -> None:
        if now_s < self._next_status_s:
            return
        self._next_status_s = now_s + STATUS_INTERVAL_S
        nodes = node_statuses(self._nodes, self._membership, self._heartbeats, self._stages, self._experts)
        self._flow.totals.pipeline_bytes = self._client.step_bytes_sent
        scheduler = self._scheduler.snapshot()
        evidence = mesh_evidence(self._membership, self._progress, self._stages, self._experts, scheduler)
        self.status = MeshStatus(
            readiness=self._readiness(evidence, now_s),
            published_s=now_s,
            served_s=now_s if accepts_requests(evidence, now_s) else self.status.served_s,
            nodes=nodes,
            scheduler=scheduler,
            completions_per_s=self._scheduler.completions_per_s(now_s),
            num_blocks={p: pipeline.num_blocks for p, pipeline in self._stages.pipelines.items() if pipeline.is_open},
            hops=self._flow.totals.snapshot(nodes),
            placement_version=self._experts.version,
            generations={p: pipeline.generation for p, pipeline in self._stages.pipelines.items()},
            redundancy=evidence.redundancy,
            suspended_pipelines=self._stages.num_suspended,
        )
        lost = self._lost_steps.look(evidence, self._flow.unsent, now_s)
        for pipeline in lost:  # its requests are not to blame, so nothing fails
            self._log.warning("step_lost", pipeline=pipeline, reason="it has not been answered, and no stage has it")
        self._renew(lost, now_s)

    def _readiness(self, evidence: MeshEvidence, now_s: float) -> Readiness:
        readiness = judge(evidence, now_s)
        if readiness.ready:
            self._last_failure = ""
            return readiness
        said = not_linked(self._nodes[node_id] for node_id in sorted(self._arriving))
        missing = (*readiness.missing, *said, *filter(None, [self._last_failure]))
        return replace(readiness, detail="; ".join(missing), missing=missing)


def _is_restored(command: GenerationRequest | RequestId) -> bool:
    return isinstance(command, GenerationRequest) and command.is_restored
