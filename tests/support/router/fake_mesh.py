"""A mesh loop whose client is a list of messages, and nodes that answer it: everything but sockets and tensors."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import structlog

from common.checkpoint.model_config import ModelConfig
from common.errors import ConfigurationError, MoemeshError, SocketError
from common.ids import NodeId, PipelineId, RequestId
from common.messages import (
    AssignMirror,
    AssignShards,
    AssignStage,
    ExpertHeartbeat,
    Header,
    Hello,
    Message,
    MirrorReady,
    StageHeartbeat,
    StageReady,
    Step,
    StepResult,
    Welcome,
)
from common.topology import CheckpointPart, NodeDescription, NodeKind
from common.wire.array import array_to_frame, frame_to_array
from common.wire.transport import LinkEvent
from services.router.control.experts.expert_roles import ExpertRoles
from services.router.control.experts.placing import PlacementAnswer, PlacementRequest, answer_request
from services.router.control.membership import Membership, patience_for
from services.router.control.stage_roles import StageRoles
from services.router.engine import GenerationRequest, SamplingParameters, Token
from services.router.mesh.loop import LoopHooks, MeshLoop, MeshRoles, MeshTerms
from services.router.mesh.steps import StepFlow
from services.router.scheduling.drafts.drafting import Drafter
from services.router.scheduling.scheduler import Scheduler
from services.router.scheduling.settings import SchedulerSettings
from services.stage.slot.early_steps import EarlySteps
from tests.support.router.expert_shards import all_loaded
from tests.support.router.mesh_shapes import node, small_mesh, small_model

VOCABULARY = 100
TERM = 4
WELCOME = Welcome(250, "float32", "exact", 32, 1, 20_000)
STEP_DEADLINE_S = 10.0
CHUNK_TOKENS = 32
Sent = tuple[str, Any, Header]


def next_token(token_ids: list[int]) -> int:
    """The "model": a checksum over all tokens so far."""
    return zlib.crc32(repr(token_ids).encode()) % VOCABULARY


def reference_tokens(request: GenerationRequest) -> list[int]:
    """What the request must get."""
    tokens = list(request.prompt_token_ids)
    for _ in range(request.sampling.max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(request.prompt_token_ids) :]


def build_request(name: str, prompt_length: int = 5, max_tokens: int = 4) -> GenerationRequest:
    """A greedy one; its prompt is made from its name."""
    prompt = tuple(zlib.crc32(f"{name}{position}".encode()) % VOCABULARY for position in range(prompt_length))
    sampling = SamplingParameters(max_tokens, 0.0, 1.0, 0, 1, None, frozenset())
    return GenerationRequest(RequestId(name), prompt, sampling, choice=0)


@dataclass
class FakeStages:
    """The stages of one pipeline in one generation: tokens of each sequence, but for wrong drafts, are its cache."""

    first_stage: str
    cache: dict[int, list[int]] = field(default_factory=dict)
    takes_steps: bool = True
    answers: deque[tuple[StepResult, Header]] = field(default_factory=deque)
    early_steps: EarlySteps = field(default_factory=EarlySteps)

    def take(self, step: Step, header: Header) -> None:
        """Compute a step, whose tokens are known by now; its answer waits in `answers`."""
        self.early_steps.add(step, header, 0.0)
        arrived = self.early_steps.pop()
        assert arrived is not None, "what it waits for was computed when it came"
        step = self.early_steps.with_tokens(step)
        for sequence in frame_to_array(step.released, "int64", (None,), "released").tolist():
            self.cache.pop(sequence, None)
        tokens = frame_to_array(step.hidden, "int32", (None,), "hidden").tolist()
        sampled: list[tuple[int, int]] = []
        for sequence, start, count, *_, samples in frame_to_array(
            step.sequences, "int64", (None, 6), "sequences"
        ).tolist():
            own = self.cache.setdefault(sequence, [])
            assert start == len(own), "a step goes on where the cache ends"
            own += tokens[:count]
            tokens = tokens[count:]
            if samples:
                sampled += [(sequence, token) for token in drawn(own, samples - 1)]
        result = result_of(sampled)
        self.early_steps.note_samples(header.step, result)
        self.answers.append((result, header))


def drawn(own: list[int], num_drafts: int) -> list[int]:
    """The tokens behind a sequence, the last of whose tokens are drafts; the wrong ones are taken away."""
    tokens: list[int] = []
    stop = len(own) - num_drafts
    while True:
        tokens.append(next_token(own[:stop]))
        if own[stop : stop + 1] != tokens[-1:]:
            del own[stop:]
            return tokens
        stop += 1


def result_of(sampled: list[tuple[int, int]]) -> StepResult:
    """Sequence and token of each row."""
    count = len(sampled)
    return StepResult(
        array_to_frame(np.array([sequence for sequence, _ in sampled], dtype=np.int64)),
        array_to_frame(np.array([token for _, token in sampled], dtype=np.int32)),
        array_to_frame(np.zeros(count, dtype=np.float32)),
        array_to_frame(np.zeros((count, 0), dtype=np.int32)),
        array_to_frame(np.zeros((count, 0), dtype=np.float32)),
    )


class InlinePlacer:
    """Computes at once, in the thread that asks."""

    def __init__(self) -> None:
        self._answers: deque[PlacementAnswer] = deque()

    def begin(self, request: PlacementRequest) -> None:
        self._answers.append(answer_request(request))

    def pop_answer(self) -> PlacementAnswer | None:
        return self._answers.popleft() if self._answers else None


class FakeClient:
    """In place of MeshClient."""

    router_term = TERM

    def __init__(self) -> None:
        self.inbox: deque[tuple[NodeId, Message, Header]] = deque()
        self.sent: list[Sent] = []
        self.lifelines: set[str] = set()
        self.unreachable: set[str] = set()
        """Nodes whose addresses are of another host's kind."""
        self.cleaned_up: list[str] = []
        """Nodes whose socket files were removed."""
        self.events: list[tuple[NodeId, LinkEvent]] = []
        self.pipelines: dict[PipelineId, FakeStages] = {}
        self.results = self
        self.answers: deque[tuple[Any, Header]] = deque()
        self.step_bytes_sent = 0
        self.held: dict[int, dict[int, list[int]]] = {}
        """By pipeline: what its stages have from a router before this one when it opens."""
        self.after_wait: Any = lambda: None
        self.waited_ms = 0
        """At most, last time."""
        self.sockets_left = self.pipeline_sockets_left = 1_000_000
        """How many more lifelines, and pipelines, there are sockets for."""
        self.pulses: list[tuple[NodeId, int]] = []
        self.mute: set[str] = set()
        """Nodes that echo nothing, though their connections stand."""

    def wait(self, timeout_ms: int) -> None:
        self.waited_ms = timeout_ms
        self.after_wait()

    def wake(self) -> None:
        return None

    def receive_control(self) -> tuple[NodeId, Message, Header] | None:
        return self.inbox.popleft() if self.inbox else None

    def tell(self, node_id: NodeId, message: Message, header: Header | None = None) -> bool:
        self.sent.append((node_id, message, header or Header()))
        return True

    def ping(self, nodes: Iterable[NodeId], number: int) -> None:
        self.pulses += [(node_id, number) for node_id in nodes if node_id not in self.mute]

    def echoes(self) -> list[tuple[NodeId, int]]:
        echoes, self.pulses = self.pulses, []
        return echoes

    def watch(self, description: NodeDescription) -> None:
        if description.node_id in self.unreachable:
            raise ConfigurationError("no endpoint can be reached")
        if not self.sockets_left:
            raise SocketError("lifeline: no socket can be opened (too many files)")
        self.sockets_left -= 1
        self.lifelines.add(description.node_id)

    def unwatch(self, node_id: NodeId) -> None:
        self.lifelines.discard(node_id)

    def remove_socket_files(self, description: NodeDescription) -> None:
        self.cleaned_up.append(description.node_id)

    def lifeline_events(self) -> list[tuple[NodeId, LinkEvent]]:
        events, self.events = self.events, []
        return events

    def open_pipeline(self, pipeline: PipelineId, first_stage: NodeDescription) -> None:
        self.close_pipeline(pipeline)
        if not self.pipeline_sockets_left:
            raise SocketError("pipeline: no socket can be opened (too many files)")
        self.pipeline_sockets_left -= 1
        self.pipelines[pipeline] = FakeStages(first_stage.node_id, self.held.pop(pipeline, {}))

    def close_pipeline(self, pipeline: PipelineId) -> None:
        self.pipelines.pop(pipeline, None)

    def send_step(self, pipeline: PipelineId, message: Step, header: Header) -> bool:
        stages = self.pipelines[pipeline]
        if stages.takes_steps:
            stages.take(message, header)
        return stages.takes_steps

    def receive(self) -> tuple[Any, Header] | None:
        return self.answers.popleft() if self.answers else None


class FakeMesh:
    """A mesh loop, a clock moved by hand, and nodes that do what they are told unless a test says otherwise."""

    def __init__(
        self,
        *,
        adopts: bool = False,
        plans_ahead: bool = False,
        config: ModelConfig | None = None,
        placer: Any = None,
        drafter: Drafter | None = None,
        **mesh: Any,
    ) -> None:
        """`adopts`: nodes may hold slots of a router before this one. `plans_ahead`: a step may be sent before the one
        that it goes on from is answered; else each comes alone."""
        self.now_s = 1000.0
        self.client = FakeClient()
        self.outcomes: dict[str, list[Token | MoemeshError]] = {}
        config, shape = config or small_model(), small_mesh(**mesh)
        self.logged = structlog.testing.CapturingLogger()
        log: Any = structlog.wrap_logger(self.logged, processors=[])
        client: Any = self.client
        placer = placer or InlinePlacer()
        settings = SchedulerSettings(
            block_tokens=shape.block_tokens, prefill_chunk_tokens=CHUNK_TOKENS, plans_ahead=plans_ahead
        )
        self.scheduler = Scheduler(settings, TERM << 32, drafter=drafter)
        self.stages = StageRoles(config, shape, ("tcp://router:9",), "", adopts=adopts)
        self.experts = ExpertRoles(config, shape, 1)
        self.membership = Membership(patience_for(STEP_DEADLINE_S, WELCOME.heartbeat_interval_ms / 1000))
        self.loop = MeshLoop(
            MeshTerms(config, "print", WELCOME),
            client,
            StepFlow(client, self.scheduler, STEP_DEADLINE_S, VOCABULARY, self._sink, log),
            MeshRoles(self.stages, self.experts, placer),
            self.membership,
            log,
            LoopHooks(lambda: self.now_s),
        )
        self.client.after_wait = self.loop.stop
        self.mirrors_fill = False
        """Whether spares that are to mirror a slot have a complete copy at once."""
        self.unready: set[str] = set()
        """Nodes that do not answer what they are told."""
        self.alive: dict[str, NodeDescription] = {}
        self.kv_marks: dict[str, int] = {}
        """What nodes say of their memory, where it is not empty."""

    def _sink(self, outcomes: list[tuple[RequestId, Token | MoemeshError]]) -> None:
        for request_id, outcome in outcomes:
            self.outcomes.setdefault(request_id, []).append(outcome)

    def turn(self, seconds: float = 0.0) -> list[Sent]:
        """One round of the loop; what it told the nodes."""
        self.now_s += seconds
        self.loop._stopping = False
        self.loop.run()
        sent, self.client.sent = self.client.sent, []
        for name, message, header in sent:
            self._obey(name, message, header)
        return sent

    def _obey(self, name: str, message: Any, header: Header) -> None:
        if name in self.alive and name not in self.unready:
            if isinstance(message, AssignStage):
                ready = StageReady(message.pipeline, message.slot, message.lease_term, self.kv_marks.get(name, 0))
                self.say(name, ready, Header(generation=header.generation))
            elif isinstance(message, AssignMirror) and self.mirrors_fill:
                copied = MirrorReady(message.pipeline, message.slot, message.lease_term, is_complete=True)
                self.say(name, copied, Header(generation=header.generation))
            elif isinstance(message, AssignShards):
                self.say(name, all_loaded(message))

    def say(self, name: str, message: Message, header: Header | None = None) -> None:
        """Let a node say something on the control link."""
        self.client.inbox.append((NodeId(name), message, header or Header()))

    def hello(self, name: str, kind: NodeKind = NodeKind.STAGE, **changes: Any) -> NodeDescription:
        """Let a node say hello."""
        description = node(name, kind, **changes)
        self.alive[name] = description
        self.say(name, hello_of(description))
        self.client.events.append((description.node_id, LinkEvent.CONNECTED))
        return description

    def come_back(self, name: str, pipeline: int, slot: int, sequences: dict[int, tuple[int, int]]) -> None:
        """Let a stage say hello that holds a slot from a router before this one.

        `sequences`: of each one block and how many positions are computed.
        """
        layers, last_step = self.stages.layers[slot], 950
        rows = np.array([(number, computed, 1) for number, (_, computed) in sequences.items()], dtype=np.int64)
        blocks = np.array([block for block, _ in sequences.values()], dtype=np.int32)
        self.hello(name)
        _, hello, header = self.client.inbox.pop()
        assert isinstance(hello, Hello)
        held = (pipeline, slot, 2, layers.start, layers.stop, 3, 32, last_step)
        frames = array_to_frame(rows.reshape(-1, 3)), array_to_frame(blocks)
        self.say(name, replace(hello, held_slot=held, held_sequences=frames[0], held_blocks=frames[1]), header)
        self.kv_marks[name] = last_step

    def lose(self, name: str) -> None:
        """End a node's process; its lifeline closes."""
        self.alive.pop(name, None)
        self.client.events.append((NodeId(name), LinkEvent.CLOSED))

    def beat(self, queued: int = 0) -> None:
        """Heartbeats of all who live, with so much work in hand."""
        for name, description in self.alive.items():
            kind = StageHeartbeat if description.kind is NodeKind.STAGE else ExpertHeartbeat
            self.say(name, kind(queued=queued))

    def answer(self, count: int = 1000) -> None:
        """Let the pipelines answer so many of the steps that they have computed."""
        for stages in self.client.pipelines.values():
            while stages.answers and count:
                self.client.answers.append(stages.answers.popleft())
                count -= 1

    def start(self, stages: str = "ab", experts: str = "x") -> None:
        """Until it is ready."""
        for name in experts:
            self.hello(name, NodeKind.EXPERT)
        for name in stages:
            self.hello(name)
        self.settle()

    def settle(self, rounds: int = 12) -> None:
        """Let everybody answer everything for a while."""
        for _ in range(rounds):
            self.answer()
            self.beat()
            self.turn(0.2)

    def tokens(self, name: str) -> list[int]:
        """What a request has got."""
        return [outcome.token_id for outcome in self.outcomes.get(name, []) if isinstance(outcome, Token)]

    def errors(self, name: str) -> list[MoemeshError]:
        """How it failed."""
        return [outcome for outcome in self.outcomes.get(name, []) if isinstance(outcome, MoemeshError)]


def hello_of(description: NodeDescription) -> Hello:
    """As the node would say it."""
    part = description.part or CheckpointPart()
    return Hello(
        node_id=description.node_id,
        incarnation=description.incarnation,
        node_kind=description.kind.value,
        capacity_bytes=description.capacity_bytes,
        host_label=description.host_label,
        numeric_class=description.numeric_class,
        fingerprint=description.fingerprint,
        endpoints=description.endpoints,
        lifeline=description.lifeline,
        ipc_token=description.ipc_token,
        part_layers=part.layers or (),
        part_experts=tuple(sorted(part.experts)),
    )


def said_to(name: str, sent: list[Sent]) -> list[Any]:
    """Messages to one node."""
    return [message for to, message, _ in sent if to == name]


def kinds(messages: list[Any]) -> list[type]:
    """Their classes, in order."""
    return [type(message) for message in messages]


def ready_mesh() -> FakeMesh:
    """One that has started and says that it is ready."""
    made = FakeMesh()
    made.start()
    assert made.loop.status.readiness.ready, made.loop.status.readiness.detail
    return made
