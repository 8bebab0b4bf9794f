"""What the scheduler decides and what comes of it: plain values between it and the mesh thread."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import MoemeshError
from common.ids import Generation, PipelineId, RequestId, SequenceId, StepId
from services.router.engine import SamplingParameters, Token


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The tokens of one sequence in one step: a decode token, perhaps with drafts behind it, a chunk of its prefill, or
    what of its cache comes back from the session tier."""

    sequence_id: SequenceId
    token_ids: tuple[int, ...]
    """At least one; they stand at positions [start_position, start_position + len(token_ids)). AWAITED_TOKEN: what the
    plan's `awaited_step` samples for this sequence."""
    start_position: int
    block_offset: int
    """Blocks of this sequence that the stages know already; 0 in its first chunk."""
    new_block_ids: tuple[int, ...]
    """Blocks `block_offset` and on; together they cover all positions up to the chunk's end."""
    samples: bool
    """Whether the last stage samples a token after the last one of the chunk (else it only fills the cache), and after
    each one that drafts follow."""
    sampling: SamplingParameters
    choice: int
    num_generated: int
    """Tokens that the request has generated before this step, over all its recomputations, and an awaited one."""
    tells_adjustments: bool = False
    """Whether the last stage is told all of this sequence's penalties, biases and counts, and not only to go on."""
    token_counts: bytes = b""
    """int32 [*, 3]: token id, times generated, 1 if in the prompt; of a chunk that tells them, with a penalty.
    It says all that the last stage must know of the past, so that a recomputed request draws the same token."""
    num_drafts: int = 0
    """How many of `token_ids`, the last ones, are guesses at what the last stage samples after the ones before. It
    answers with as many tokens as were right, and the one after them."""
    tier_slots: tuple[int, ...] = ()
    """Where its blocks lie in the session tier: it is copied from there to `new_block_ids` and not computed, and stages
    hear nothing of the sequence. Empty: it is computed."""

    @property
    def draft_token_ids(self) -> tuple[int, ...]:
        """Returns the tokens that are guesses."""
        return self.token_ids[len(self.token_ids) - self.num_drafts :]

    @property
    def num_sampling_rows(self) -> int:
        """Counts the rows after which a token is sampled."""
        return 1 + self.num_drafts if self.samples else 0

    @property
    def is_decode(self) -> bool:
        """Says whether only its first token was not computed before, but for guesses."""
        return self.samples and len(self.token_ids) - self.num_drafts == 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One micro-batch. Every step is answered once by the last stage, also where nothing is sampled."""

    step: StepId
    pipeline: PipelineId
    generation: Generation
    chunks: tuple[ScheduledChunk, ...]
    """Chunks by arrival; empty only where the step does nothing but release."""
    released: tuple[SequenceId, ...]
    """Sequences whose state the stages can drop; each is told once, and is in no chunk of this or a later step."""
    computing_slots: tuple[int, ...] = ()
    """The slots that compute a replay; empty: all."""
    previous_step: int = 0
    """The step that was planned before it in this generation of the pipeline; 0: it is the first."""
    awaited_step: int = 0
    """The step whose tokens this one goes on with, planned before they were known; 0: all of its tokens are known."""
    saves: tuple[tuple[int, int], ...] = ()
    """Block and tier slot of what is copied to the session tier before anything else is done."""

    @property
    def computed(self) -> tuple[ScheduledChunk, ...]:
        """Returns the chunks that the stages compute, and not those that come back by a copy."""
        return tuple(chunk for chunk in self.chunks if not chunk.tier_slots)

    @property
    def restores(self) -> tuple[tuple[int, int], ...]:
        """Returns tier slot and block of what comes back by a copy."""
        restored = [chunk for chunk in self.chunks if chunk.tier_slots]
        return tuple(pair for chunk in restored for pair in zip(chunk.tier_slots, chunk.new_block_ids, strict=True))

    @property
    def num_tokens(self) -> int:
        """Counts tokens that the stages compute."""
        return sum(len(chunk.token_ids) for chunk in self.chunks if not chunk.tier_slots)

    @property
    def only_decodes(self) -> bool:
        """Says whether it has one token of each sequence, and samples the next one of each: no drafts."""
        return bool(self.chunks) and all(chunk.samples and len(chunk.token_ids) == 1 for chunk in self.chunks)

    @property
    def num_drafts(self) -> int:
        """Counts those of its tokens that are guesses."""
        return sum(chunk.num_drafts for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class ComputedBy:
    """What decides whether the content of a step's rows may be found by others."""

    numeric_class: int = 0
    """Stands for the classes of all processes that computed it; 0: not known, or a row was computed by another class
    than the rest."""
    degraded: frozenset[SequenceId] = frozenset()
    """Sequences with a row that went on without an expert."""


UNKNOWN = ComputedBy()


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One token to journal and deliver; with a finish reason it is the request's last."""

    request_id: RequestId
    token: Token


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """A request that ends here without its last token."""

    request_id: RequestId
    error: MoemeshError
    cause: Exception | None = None
    """What was raised while it was handled: an error in the router itself."""
