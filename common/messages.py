"""Every message of the mesh, grouped by link. A kind that asks is an imperative, one that tells is not.

The codec (`common/codec.py`) turns these to frames and back; field types are limited to what it checks: int, float,
str, bool, tuples of int or str, and TensorFrame. Terms, generation, attempt, step, time left and trace are in `Header`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorFrame:
    """A dense row-major array beside the header; the bytes are not copied on their way to the socket."""

    dtype: str
    """`float32`, `bfloat16`, `float16`, `int64`, `int32`, `uint8` or `float64`."""
    shape: tuple[int, ...]
    data: memoryview | bytes
    """Contiguous; its length is the product of the shape times the item size."""


NO_ARRAY = TensorFrame("uint8", (0,), b"")
"""Where a message has nothing to say in a tensor field."""


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


# ---- node <-> router, control ---------------------------------------------------------------------------------------


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
    held_slot: tuple[int, ...] = ()
    """What a stage holds from a router before this one: pipeline, slot, slots of the pipeline, first layer, stop layer,
    lease term, KV blocks, last step. Empty: nothing."""
    held_sequences: TensorFrame = NO_ARRAY
    """int64 [N, 3]: sequence id, positions whose K and V are there, blocks."""
    held_blocks: TensorFrame = NO_ARRAY
    """int32 [*]: KV block ids, in order of `held_sequences`."""
    held_shards: TensorFrame = NO_ARRAY
    """uint8 [L, E, S]: what an expert node holds; [0] before it was told how experts are cut."""


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
    """`wait` for an expert shard that nobody can be asked for, or `degrade`: go on without it."""
    degrade_after_ms: int = 500
    """How long `degrade` waits first."""


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


@dataclass(frozen=True, slots=True)
class Unassign:
    """Router -> stage: leave your slot and become a spare. Not answered."""

    lease_term: int


@dataclass(frozen=True, slots=True)
class StageReady:
    """Stage -> router: loaded, self-tested, connected downstream, for the header's generation."""

    pipeline: int
    slot: int
    lease_term: int
    weight_bytes: int
    kv_bytes: int
    kv_mark: int = 0
    """The paged memory holds what all steps up to this one have written; 0: it is empty."""


@dataclass(frozen=True, slots=True)
class AssignMirror:
    """Router -> spare stage: load a slot's layers and keep a copy of its holder's paged memory. Answers: MirrorReady
    when it may be sent to, and again once the copy is complete; or Failed."""

    pipeline: int
    slot: int
    num_slots: int
    first_layer: int
    stop_layer: int
    lease_term: int
    """Of the slot's holder."""
    num_blocks: int
    primary: tuple[str, ...]
    """Data endpoints of the holder, for acknowledgements."""
    primary_ipc_token: str


@dataclass(frozen=True, slots=True)
class MirrorReady:
    """Mirror -> router."""

    pipeline: int
    slot: int
    lease_term: int
    is_complete: bool
    """Every block that was in use has come; false also where the stream of rows broke and must begin anew."""


@dataclass(frozen=True, slots=True)
class MirrorTo:
    """Router -> stage: send your paged memory, and from then on each row, to this node. Not answered."""

    lease_term: int
    node_id: str
    endpoints: tuple[str, ...]
    """Empty: to nobody any more."""
    ipc_token: str


@dataclass(frozen=True, slots=True)
class AssignShards:
    """Router -> expert node: hold exactly these shards. Answers: ShardsReady, or Failed for what cannot be."""

    version: int
    shards: TensorFrame
    """uint8 [L, E, S]: 1 where the node is to hold the slice of the expert, 2 where nobody else can be asked for it:
    those are loaded first."""


@dataclass(frozen=True, slots=True)
class ShardsReady:
    """Expert node -> router: what is loaded and self-tested now."""

    version: int
    complete: bool
    """Nothing of `version` is missing."""
    shards: TensorFrame
    """uint8 [L, E, S]."""
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class PublishPlacement:
    """Router -> stage: who holds which shards, ready to be asked. Advisory. Parallel tuples, one entry a node."""

    version: int
    node_ids: tuple[str, ...]
    incarnations: tuple[int, ...]
    endpoints: tuple[str, ...]
    """Each node's endpoints, as `join_endpoints` joins them."""
    ipc_tokens: tuple[str, ...]
    numeric_classes: tuple[str, ...]
    copies: TensorFrame
    """uint8 [nodes, L, E, S]: 0 not there, else 1 + place in the shard's ordered list of copies."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Node -> router: I am here, and this is what I have done. Not answered."""

    busy_seconds: float
    """Time spent computing since start."""
    steps: int
    """Steps (stage) or expert calls (expert node) answered since start."""
    rows: int
    """Token rows (stage) or expert rows (expert node) computed since start."""
    queued: int
    """Waiting now."""
    dropped: int
    """Messages of an old term, generation or attempt dropped since start. Expert node: also calls that nobody waited
    for any more."""
    bytes_sent: int
    """On all data sockets since start."""
    hop_bytes: int
    """Stage: sent towards expert nodes since start. Expert node: sent as answers."""
    hop_seconds: float
    """Stage: from an expert call to its whole sum, over all calls since start. Expert node: time queued."""
    hops: int
    """Calls in `hop_seconds`."""
    resent: int
    """Stage: expert calls repeated on another copy since start."""
    hedged: int = 0
    """Stage: expert calls asked of a further copy since start, because the first one was late."""
    hedge_wins: int = 0
    """Stage: those of them that answered first."""
    late: int = 0
    """Stage: answers of expert nodes that were not used any more. Expert node: calls that were taken back in time."""
    suspicions: int = 0
    """Stage: how often an expert node was taken to hang."""
    degraded_rows: int = 0
    """Stage: token rows of a layer that went on without one of their experts."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Node -> router: I am asked to stop; give my work to others. Answer: LeaveAcknowledged when that is done."""

    reason: str


@dataclass(frozen=True, slots=True)
class LeaveAcknowledged:
    """Router -> node: nobody will ask you for anything any more."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Either way: what was asked for cannot be done. `code` is that of an error leaf (`common/errors.py`)."""

    code: str
    message: str
    call: int = 0
    """Of the Dispatch that failed; 0 otherwise."""


# ---- router -> first stage -> ... -> last stage -> router: the pipeline --------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One micro-batch on its way through a pipeline. Q sequences, T tokens in all, S sequences that sample a token."""

    hidden: TensorFrame
    """int32 [T] token ids towards the first stage; model dtype [T, D] hidden states between stages."""
    sequences: TensorFrame
    """int64 [Q, 6]: sequence id, start position, tokens, blocks known before, new blocks, 1 if it samples."""
    new_blocks: TensorFrame
    """int32 [sum of new blocks]: KV block ids, in order of the sequences."""
    released: TensorFrame
    """int64 [*]: sequences whose state can be dropped before this step."""
    sampling: TensorFrame
    """float64 [S, 4]: temperature (0 greedy), top_p, top_k (0 off), number of top logprobs (-1: no logprobs)."""
    seeds: TensorFrame
    """int64 [S, 2]: request seed, choice."""
    computing_slots: tuple[int, ...] = ()
    """Of a replay step, the slots that compute; those before them answer from their activation log, those after them
    do nothing. Empty: an ordinary step, all compute."""
    penalties: TensorFrame = TensorFrame("float64", (0, 5), b"")
    """float64 [*, 5]: row in [0, S), min_p, presence, frequency and repetition penalty; only rows that have any."""
    token_counts: TensorFrame = TensorFrame("int32", (0, 4), b"")
    """int32 [*, 4]: row in [0, S), token id, times generated, 1 if in the prompt: what penalties look at. Sent whole
    with every step, so that stages keep nothing that a replay, a move or a new router would have to restore."""
    biases: TensorFrame = TensorFrame("float64", (0, 3), b"")
    """float64 [*, 3]: row in [0, S), token id, what is added to its logit; -inf: must not be drawn."""
    degraded: TensorFrame = NO_ARRAY
    """uint8 [Q]: 1 where a stage before went on without an expert; [0] where none did."""
    retried_calls: int = 0
    """Expert calls that stages before asked of another copy too, or instead."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Last stage -> router: the sampled tokens of a step. P is the largest number of top logprobs asked for."""

    sequence_ids: TensorFrame
    """int64 [S]."""
    token_ids: TensorFrame
    """int32 [S]."""
    logprobs: TensorFrame
    """float32 [S] of the sampled tokens, before penalties, temperature and filters."""
    top_token_ids: TensorFrame
    """int32 [S, P]."""
    top_logprobs: TensorFrame
    """float32 [S, P]."""
    degraded: TensorFrame = NO_ARRAY
    """uint8 [S]: 1 where a stage went on without an expert in this step; [0] where none did."""
    retried_calls: int = 0
    """Expert calls of all stages that were asked of another copy too, or instead."""


# ---- stage -> its mirror, in order -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MirrorRows:
    """Stage -> mirror: what a step wrote. T positions, L layers, H KV heads, W head width, D model width."""

    lease_term: int
    mark: int
    """All steps up to this one have been sent whole."""
    positions: TensorFrame
    """int64 [T]: block * block size + offset."""
    keys: TensorFrame
    """model dtype [L, T, H, W]."""
    values: TensorFrame
    """model dtype [L, T, H, W]."""
    hidden: TensorFrame
    """model dtype [T, D], for the activation log; [0, D] on the last stage, which has none."""


@dataclass(frozen=True, slots=True)
class MirrorBlocks:
    """Stage -> mirror: whole blocks as they are now, for a mirror that joined late."""

    lease_term: int
    mark: int
    is_last: bool
    """The copy is complete with these."""
    blocks: TensorFrame
    """int32 [B]."""
    keys: TensorFrame
    """model dtype [L, B, *]: a block's keys as they lie in memory."""
    values: TensorFrame
    """model dtype [L, B, *]."""
    hidden: TensorFrame
    """model dtype [B, *]; [0, *] on the last stage."""


@dataclass(frozen=True, slots=True)
class MirrorAck:
    """Mirror -> stage: everything up to the message of this sequence number is applied."""

    lease_term: int
    applied: int


# ---- stage <-> expert ------------------------------------------------------------------------------------------------


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
    compute_seconds: float
    """Time of the grouped FFN that this call was part of."""
    queue_seconds: float
    """Time between the call's arrival and the start of its FFN."""


@dataclass(frozen=True, slots=True)
class CancelCall:
    """Stage -> expert node: nobody waits for these calls any more; what still queues is dropped. Not answered."""

    calls: tuple[int, ...]
    """The stage's numbers; unknown ones are no error."""


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
    | Heartbeat
    | Leave
    | LeaveAcknowledged
    | Failed
    | Step
    | StepResult
    | MirrorRows
    | MirrorBlocks
    | MirrorAck
    | Dispatch
    | ExpertRows
    | CancelCall
)
