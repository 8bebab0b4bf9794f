"""Every message of the mesh, grouped by link. A kind that asks is an imperative, one that tells is not.

The codec (`common/wire/codec.py`) turns these to frames and back; field types are limited to what it checks: int,
float, str, bool, tuples of int or str, and TensorFrame. Terms, generation, attempt, step, time left and trace are in
`Header`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PROTOCOL_VERSION: Final = 9
"""It counts what messages hold: a change that adds a field raises it, and gives the field a default."""
OLDEST_VERSION: Final = 9
"""Messages of this version are understood too; they may lack the fields that have a default. A change that takes a
field or a kind away, or gives a field another meaning, raises it as well."""

# ---- what every message is made of: arrays beside the header, and the header


@dataclass(frozen=True, slots=True)
class TensorFrame:
    """A dense row-major array beside the header; the bytes are not copied on their way to the socket."""

    dtype: str
    """`float32`, `bfloat16`, `float16`, `int64`, `int32`, `uint8` or `float64`."""
    shape: tuple[int, ...]
    data: memoryview | bytes
    """Contiguous; its length is the product of the shape times the item size."""


NO_ARRAY = TensorFrame("uint8", (0,), b"")
"""The value of a tensor field in which a message has nothing to say."""


@dataclass(frozen=True, slots=True)
class Header:
    """What every message carries besides its own fields; zero where it does not apply."""

    router_term: int = 0
    generation: int = 0
    attempt: int = 0
    step: int = 0
    layer: int = 0
    sequence_number: int = 0
    """Counts the messages of one socket from 1; a stage that sees a gap reports it."""
    time_left_ms: int = 0
    """How long the sender will wait from now on; restamped at every hop, so clocks need not agree. 0: no limit."""
    trace: str = ""


# ---- router -> first stage -> ... -> last stage -> router: the pipeline

NO_PENALTIES = TensorFrame("float64", (0, 5), b"")
NO_TOKEN_COUNTS = TensorFrame("int32", (0, 4), b"")
NO_BIASES = TensorFrame("float64", (0, 3), b"")
NOT_ADJUSTED = TensorFrame("int64", (0, 3), b"")
NO_DRAFTS = TensorFrame("int32", (0,), b"")
NO_PAIRS = TensorFrame("int32", (0, 2), b"")
FIRST_CLASS = 1
"""`Step.numeric_class` before any stage has added its own."""
AWAITED_TOKEN: Final = -1
"""In `Step.hidden`: the token that `Step.awaited_step` samples for the same sequence."""


@dataclass(frozen=True, slots=True)
class Step:
    """One micro-batch on its way through a pipeline. Q sequences, T tokens in all, S sequences that sample tokens."""

    hidden: TensorFrame
    """int32 [T] token ids, or AWAITED_TOKEN, towards the first stage; model dtype [T, D] hidden states between
    stages."""
    sequences: TensorFrame
    """int64 [Q, 6], `records.STEP_SEQUENCE`: sequence id, start position, tokens, blocks known before, new blocks, how
    many of its rows sample, the last ones: 0, 1, or one more than it has drafts."""
    new_blocks: TensorFrame
    """int32 [sum of new blocks]: KV block ids, in order of the sequences."""
    released: TensorFrame
    """int64 [*]: sequences whose state can be dropped before this step."""
    sampling: TensorFrame
    """float64 [S, 4], `records.SAMPLING`: temperature (0 greedy), top_p, top_k (0 off), number of top logprobs (-1: no
    logprobs)."""
    seeds: TensorFrame
    """int64 [S, 2], `records.SEED`: request seed, choice."""
    computing_slots: tuple[int, ...] = ()
    """The slots that compute a replay step; those before them answer from their activation log, those after them do
    nothing. Empty: an ordinary step, all compute."""
    penalties: TensorFrame = NO_PENALTIES
    """float64 [*, 5]: row in [0, S), min_p, presence, frequency and repetition penalty; of rows that are told anew and
    have any."""
    token_counts: TensorFrame = NO_TOKEN_COUNTS
    """int32 [*, 4]: row in [0, S), token id, times generated, 1 if in the prompt: what penalties look at; of rows that
    are told anew. The last stage counts on by itself."""
    biases: TensorFrame = NO_BIASES
    """float64 [*, 3]: row in [0, S), token id, what is added to its logit; -inf: must not be drawn; of rows that are
    told anew."""
    degraded: TensorFrame = NO_ARRAY
    """uint8 [Q]: 1 where a stage before went on without an expert; [0] where none did."""
    numeric_class: int = 0
    """Stands for the numeric classes of the stages before and of the experts of their layers, as `class_number` makes
    it of those; 0: rows were computed by several. The router sends `FIRST_CLASS`."""
    retried_calls: int = 0
    """Expert calls that stages before asked of another copy too, or instead."""
    previous_step: int = 0
    """Number of the step that the router sent before this one in the same generation of the pipeline; 0: it is the
    first. Steps overtake each other, so this alone tells a stage whether all that come before one have come."""
    adjusted: TensorFrame = NOT_ADJUSTED
    """int64 [*, 3]: row in [0, S), tokens generated so far, 1 if it is told anew; only rows with a penalty, a min_p or
    a bias. A row is told anew when its sequence first samples in a generation, and when its biases change; else the
    last stage goes on with what it keeps, which must have as many tokens."""
    awaited_step: int = 0
    """Number of the step whose samples stand for AWAITED_TOKEN: the router sent this one before it knew them. The first
    stage begins it, and what comes behind it, once it does. 0: all tokens are told."""
    drafts: TensorFrame = NO_DRAFTS
    """int32 [*], of the sequences in their order: the tokens of all rows that sample but the first one of a sequence.
    They are guesses; the last stage compares them with what it samples."""
    saves: TensorFrame = NO_PAIRS
    """int32 [*, 2]: KV block, tier slot. Each stage copies them to its session tier before it does anything else: the
    blocks are others' with this step."""
    restores: TensorFrame = NO_PAIRS
    """int32 [*, 2]: tier slot, KV block. Each stage copies them back next; they are of sequences that are not in this
    step."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Last stage -> router: the sampled tokens of a step, A in all: one of each sequence that samples, and one more for
    each draft that was right. P is the largest number of top logprobs asked for. Last stage -> first stage too, where
    there are several: steps may wait there for these tokens."""

    sequence_ids: TensorFrame
    """int64 [A]: a sequence once for each of its tokens, in their order."""
    token_ids: TensorFrame
    """int32 [A]."""
    logprobs: TensorFrame
    """float32 [A] of the sampled tokens, before penalties, temperature and filters."""
    top_token_ids: TensorFrame
    """int32 [A, P]."""
    top_logprobs: TensorFrame
    """float32 [A, P]."""
    degraded: TensorFrame = NO_ARRAY
    """uint8 [Q], of all sequences of the step: 1 where a stage went on without an expert; [0] where none did."""
    numeric_class: int = 0
    """As in Step, of all stages."""
    retried_calls: int = 0
    """Expert calls of all stages that were asked of another copy too, or instead."""


# ---- stage <-> expert node


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Stage -> expert node: one layer's rows for that node. Answer in the header's time: ExpertRows or Failed."""

    call: int
    """The stage's number for this call; echoed in the answer."""
    hidden: TensorFrame
    """model dtype [T, D], each token row once."""
    routing: TensorFrame
    """int32 [3, R]: row of `hidden`, expert, slice of each routed row; sorted by (expert, slice)."""
    weights: TensorFrame
    """float32 [R] gate weights for combine mode `partial`; [0] for `exact`."""


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Expert node -> stage. Exact: model dtype [R, D] as asked. Partial: float32 [T, D], weighted and summed."""

    call: int
    rows: TensorFrame


@dataclass(frozen=True, slots=True)
class CancelCall:
    """Stage -> expert node: these calls are not wanted any more; what still queues is dropped. Not answered."""

    calls: tuple[int, ...]
    """The stage's numbers; unknown ones are not errors."""


# ---- stage -> its mirror, in order; acknowledgements come back


@dataclass(frozen=True, slots=True)
class MirrorRows:
    """Stage -> mirror: what a step wrote, or, of a stage that had a past, what whole blocks hold now.

    T positions, L layers, H KV heads, W head width, D model width.
    """

    lease_term: int
    mark: int
    """All steps up to this one have been sent whole."""
    is_last: bool
    """The back-fill ends with these: the copy is complete."""
    positions: TensorFrame
    """int64 [T]: block * block size + offset."""
    keys: TensorFrame
    """model dtype [L, T, H, W]."""
    values: TensorFrame
    """model dtype [L, T, H, W]."""
    hidden: TensorFrame
    """model dtype [T, D], for the activation log; [0, D] on the last stage, which has none."""


@dataclass(frozen=True, slots=True)
class MirrorAck:
    """Mirror -> stage: everything up to the message of this sequence number is applied."""

    lease_term: int
    applied: int


# ---- node <-> router, control


@dataclass(frozen=True, slots=True)
class Hello:
    """Node -> router: I exist. Answer: Welcome or Failed."""

    node_id: str
    incarnation: int
    node_kind: str
    capacity_bytes: int
    host_label: str
    numeric_class: str
    fingerprint: str
    endpoints: tuple[str, ...]
    lifeline: tuple[str, ...]
    ipc_token: str
    process: str = ""
    held_slot: tuple[int, ...] = ()
    """What a stage holds from a router before this one, as `topology.SlotReport` names it. Empty: nothing."""
    held_sequences: TensorFrame = NO_ARRAY
    """int64 [N, 3], `records.HELD_SEQUENCE`: sequence id, positions whose K and V are there, blocks."""
    held_blocks: TensorFrame = NO_ARRAY
    """int32 [*]: KV block ids, in order of `held_sequences`."""
    held_shards: TensorFrame = NO_ARRAY
    """uint8 [L, E, S]: what an expert node holds; [0] before it was told how experts are cut."""
    part_layers: tuple[int, ...] = ()
    """For a node that sees a part of the checkpoint: first and stop layer of what it can load, without experts. Empty:
    no layers, or, where `part_experts` is empty too, the whole checkpoint."""
    part_experts: tuple[int, ...] = ()
    """The experts that it can load, of every MoE layer."""
    links: tuple[str, ...] = ()
    """Where an expert node's native code takes calls over tcp (protocol.md). Empty: nowhere."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """Router -> node: you are registered; these settings hold for the whole mesh."""

    heartbeat_interval_ms: int
    dtype: str
    combine: str
    block_tokens: int
    num_slices: int
    call_deadline_ms: int
    expert_loss: str = "wait"
    """`wait` for an expert shard that no node can be asked for, or `degrade`: go on without it."""
    degrade_after_ms: int = 500
    """How long `degrade` waits first."""
    pulse: tuple[str, ...] = ()
    """Endpoints of the router's pulse socket: the node connects to one, under its id, and sends back what comes. Empty:
    there is none."""
    pulse_ipc_token: str = ""
    caches_prefixes: bool = False
    """Whether the router may count on what is in blocks of sequences that were released."""


@dataclass(frozen=True, slots=True)
class AssignStage:
    """Router -> stage: hold this slot. Answer: StageReady or Failed. Repeated with a new generation when the pipeline
    changed elsewhere: weights, K and V and the activation log stay, steps in flight are forgotten."""

    pipeline: int
    slot: int
    num_slots: int
    first_layer: int
    stop_layer: int
    lease_term: int
    num_blocks: int
    downstream: tuple[str, ...]
    """Endpoints of the next slot's data socket; of the router's results socket for the last slot."""
    downstream_ipc_token: str
    first_stage: tuple[str, ...] = ()
    """Endpoints of the first slot's data socket, for the last slot of several."""
    first_stage_ipc_token: str = ""
    num_tier_slots: int = 0
    """Blocks that its session tier is to have room for. 0: it has none."""


@dataclass(frozen=True, slots=True)
class Unassign:
    """Router -> stage: leave your slot, or the one that you mirror, and become a spare. Not answered; the header's
    generation is the number of this role."""

    lease_term: int


@dataclass(frozen=True, slots=True)
class StageReady:
    """Stage -> router: loaded, self-tested, connected downstream, for the header's generation."""

    pipeline: int
    slot: int
    lease_term: int
    kv_mark: int = 0
    """The paged memory holds what all steps up to this one have written; 0: it is empty."""
    tier_since: int = 0
    """The session tier holds what steps behind this one have saved, up to the mark: it was empty then."""
    num_tier_slots: int = 0
    """Blocks that it has room for; 0, whatever was asked for, where there is no memory for it."""


@dataclass(frozen=True, slots=True)
class AssignMirror:
    """Router -> spare stage: load a slot's layers and keep a copy of its holder's paged memory. The header's generation
    is the number of this role. Answers: MirrorReady when it may be sent to, and again once the copy is complete; or
    Failed."""

    pipeline: int
    slot: int
    num_slots: int
    first_layer: int
    stop_layer: int
    lease_term: int
    """The lease term of the slot's holder."""
    num_blocks: int
    primary: tuple[str, ...]
    """Data endpoints of the holder, for acknowledgements."""
    primary_ipc_token: str


@dataclass(frozen=True, slots=True)
class MirrorReady:
    """Mirror -> router. The header's generation is the number of the AssignMirror that it answers."""

    pipeline: int
    slot: int
    lease_term: int
    is_complete: bool
    """Every block that was in use has come."""
    broken_stream: int = 0
    """Attempt (`MirrorRows`) of the stream of rows that broke: the holder must begin another. 0: none has."""


@dataclass(frozen=True, slots=True)
class MirrorTo:
    """Router -> stage: send your paged memory, and from then on each row, to this node. Not answered; the header's
    generation is the number of this message, and a higher one to the same node means: from the beginning."""

    lease_term: int
    node_id: str
    endpoints: tuple[str, ...]
    """Empty: to no node any more."""
    ipc_token: str


@dataclass(frozen=True, slots=True)
class AssignShards:
    """Router -> expert node: hold exactly these shards. Answers: ShardsReady, or Failed for what cannot be."""

    version: int
    shards: TensorFrame
    """uint8 [L, E, S]: 1 where the node is to hold the slice of the expert, 2 where no other node can be asked for it:
    those are loaded first."""


@dataclass(frozen=True, slots=True)
class ShardsReady:
    """Expert node -> router: what is loaded and self-tested now."""

    version: int
    """Of the newest AssignShards that it has from this router; 0: it has none. The router passes over a report that is
    older than what it told the node last."""
    complete: bool
    """Nothing of `version` is missing."""
    shards: TensorFrame
    """uint8 [L, E, S]."""
    number: int = 0
    """Counts the reports of this node from 1."""
    digests: TensorFrame = NO_ARRAY
    """int32 [L, E, S]: a digest of the bits of each shard's answer to the probe, above 0; 0 where it is not held. Nodes
    of one numeric class that hold a shard have the same."""
    projections: TensorFrame = NO_ARRAY
    """float32 [L, E, S]: the answer along a fixed direction, over its length; nearly the same on all nodes."""


@dataclass(frozen=True, slots=True)
class PublishPlacement:
    """Router -> stage: which nodes hold which shards, ready to be asked. Advisory. Tuples have an entry per node."""

    version: int
    node_ids: tuple[str, ...]
    incarnations: tuple[int, ...]
    endpoints: tuple[str, ...]
    """Each node's endpoints, as `join_endpoints` joins them."""
    ipc_tokens: tuple[str, ...]
    numeric_classes: tuple[str, ...]
    owners: TensorFrame
    """int32 [C, L, E, S]: by place in a shard's ordered list of copies, 1 + the node's place in `node_ids`; 0: none."""
    first_classes: tuple[str, ...] = ()
    """For each layer the numeric class whose nodes are asked, those of another one only for what it has no copy of that
    answers; empty string: no node has held anything of the layer. None at all where all nodes have one class."""
    links: tuple[str, ...] = ()
    """Each node's endpoints for calls of native code, as `join_endpoints` joins them. Empty: no node has any."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What the heartbeats of all nodes say. Not answered; what a node believes and should not, or should and does not,
    it is told again. Counts are since the start of the node."""

    busy_seconds: float = 0.0
    """Time spent computing."""
    steps: int = 0
    """Steps (stage) or expert calls (expert node) answered."""
    rows: int = 0
    """Token rows (stage) or expert rows (expert node) computed."""
    queued: int = 0
    """Waiting now."""
    dropped: int = 0
    """Messages of an old term, generation or attempt. Expert node: also calls that were not wanted any more."""
    is_leaving: bool = False
    """It has sent Leave and waits."""

    @property
    def work_done(self) -> tuple[int, ...]:
        """Returns counts that stand still where a node does not go on."""
        return self.steps, self.rows


@dataclass(frozen=True, slots=True)
class StageHeartbeat(Heartbeat):
    """Stage -> router: I am here, this is what I have done, and this is what I believe to be."""

    calls: int = 0
    """Expert calls whose whole sum has arrived."""
    call_seconds: float = 0.0
    """The time from each of these calls to its sum."""
    call_bytes: int = 0
    """Bytes sent towards expert nodes."""
    resent: int = 0
    """Expert calls repeated on another copy."""
    hedged: int = 0
    """Expert calls asked of a further copy, because the first one was late."""
    hedge_wins: int = 0
    """Those of them that answered first."""
    late_answers: int = 0
    """Answers of expert nodes that were not used any more."""
    suspicions: int = 0
    """How often an expert node was taken to hang."""
    degraded_rows: int = 0
    """Token rows of a layer that went on without one of their experts."""
    other_class_rows: int = 0
    """Token rows of a layer asked of an expert node of another numeric class than the layer's first one."""
    rank_degree: int = 1
    """Ranks that work together now."""
    reduce_seconds: float = 0.0
    """Spent by its first rank in putting parts together, waits included."""
    reduces: int = 0
    """How often it did so."""
    role_number: int = 0
    """Number (generation) of the AssignStage or AssignMirror that it follows; 0: it is a spare."""
    role_state: str = ""
    """How far it is with that, as `StageState` has it."""
    lease_term: int = 0
    """The lease term of the slot that it holds or mirrors; 0: none."""
    kv_mark: int = 0
    """A holder's mark, as in StageReady."""
    tier_since: int = 0
    """A holder's, as in StageReady."""
    num_tier_slots: int = 0
    """A holder's, as in StageReady."""
    broken_stream: int = 0
    """A mirror's broken stream, as in MirrorReady."""
    feed_number: int = 0
    """Number of the MirrorTo that it follows; 0: it feeds no mirror."""
    placement_version: int = 0
    """Version of the placement that it has from this router; 0: it has none."""

    @property
    def work_done(self) -> tuple[int, ...]:
        """Returns the expert calls, too: a step may have many."""
        return self.steps, self.rows, self.calls


@dataclass(frozen=True, slots=True)
class ExpertHeartbeat(Heartbeat):
    """Expert node -> router: I am here, this is what I have done, and this is what I believe to hold."""

    queue_seconds: float = 0.0
    """The time from the arrival of each call that was answered to the start of its FFN."""
    answer_bytes: int = 0
    """Bytes sent as answers."""
    cancelled: int = 0
    """Calls that were taken back in time."""
    shards_version: int = 0
    """Version of the AssignShards that it has from this router; 0: it has none."""
    shards_reports: int = 0
    """Number of its last ShardsReady."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Node -> router: I am asked to stop; give my work to others. Answer: LeaveAcknowledged when that is done."""

    reason: str


@dataclass(frozen=True, slots=True)
class LeaveAcknowledged:
    """Router -> node: you will not be asked for anything any more."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Either way: what was asked for cannot be done. `code` is that of an error leaf (`common/errors.py`)."""

    code: str
    message: str
    call: int = 0
    """The number of the Dispatch that failed; 0 otherwise."""


Message = (
    Hello
    | Welcome
    | AssignStage
    | Unassign
    | StageReady
    | AssignMirror
    | MirrorReady
    | MirrorTo
    | AssignShards
    | ShardsReady
    | PublishPlacement
    | StageHeartbeat
    | ExpertHeartbeat
    | Leave
    | LeaveAcknowledged
    | Failed
    | Step
    | StepResult
    | MirrorRows
    | MirrorAck
    | Dispatch
    | ExpertRows
    | CancelCall
)
