"""The seam between the front (HTTP, text) and the mesh (tokens). The front knows no more of the mesh than this."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from common.ids import RequestId, SequenceId
from common.wire.array import Float64Array


@dataclass(frozen=True)  # without slots: what is computed once is kept in the object
class SamplingParameters:
    """Everything that shapes one choice's tokens, besides the prompt.

    `seed` is always set: drawn at the door when the client gave none. `top_k` 0 and `top_p` 1.0 mean "off";
    `temperature` 0 means greedy. `num_top_logprobs` None: no log-probabilities; 0: of the sampled token only.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    num_top_logprobs: int | None
    stop_token_ids: frozenset[int]
    """Token ids that end the choice (end of sequence, unless the client asked to ignore it); not part of the text."""
    min_p: float = 0.0
    """Tokens less likely than this times the likeliest one are left out; 0: none."""
    presence_penalty: float = 0.0
    """It is subtracted from the logit of every token that was generated."""
    frequency_penalty: float = 0.0
    """It is subtracted from a token's logit once for each time that it was generated."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in the prompt or generated, multiplies negative ones; 1: off."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit); each id once."""
    min_tokens: int = 0
    """Stop tokens cannot be drawn, and stop strings do not count, before this many tokens are there."""

    @property
    def counts_tokens(self) -> bool:
        """Says whether a next token depends on how often others came before it."""
        return self.counts_prompt or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def counts_prompt(self) -> bool:
        """Says whether it depends on the prompt's tokens too."""
        return self.repetition_penalty != 1.0

    def is_early(self, num_generated: int) -> bool:
        """Says whether a choice with so many tokens is too short to end: its stop tokens must not be drawn."""
        return num_generated < self.min_tokens and bool(self.stop_token_ids)

    def adjusts(self, num_generated: int) -> bool:
        """Says whether the next token's logits are not the model's own, or some are left out by their number."""
        return self._always_adjusts or self.is_early(num_generated)

    @cached_property  # it is asked for each token
    def _always_adjusts(self) -> bool:
        return bool(self.min_p or self.logit_bias or self.counts_tokens)

    @cached_property
    def bias_table(self) -> Float64Array:
        """Returns float64 [*, 2]: (token id, what is added to its logit)."""
        return _table(dict(self.logit_bias))

    @cached_property
    def early_bias_table(self) -> Float64Array:
        """Returns the same as it is before `min_tokens`: stop tokens stand there with -inf."""
        return _table(dict(self.logit_bias) | dict.fromkeys(self.stop_token_ids, -np.inf))


def _table(biases: dict[int, float]) -> Float64Array:
    return np.array(list(biases.items()), dtype=np.float64).reshape(-1, 2)


class FinishReason(StrEnum):
    """Says why a choice ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One choice of one HTTP request. Choices of one request share everything but `choice` and `request_id`."""

    request_id: RequestId
    """Unique; the front makes it, for example `cmpl-…-0`."""
    prompt_token_ids: tuple[int, ...]
    """There is at least one."""
    sampling: SamplingParameters
    choice: int
    """Index of the choice; part of the sampling key, so that choices with one seed differ."""
    group: str = ""
    """The HTTP request that it is a choice of: those of one share a place in line. Empty if it stands alone."""
    is_restored: bool = False
    """A router before this one has accepted it: nothing refuses it now, and it waits for a mesh that starts."""
    generated_token_ids: tuple[int, ...] = ()
    """What was sampled so far, and never the whole of it: a finished choice needs no mesh. A fresh one has none."""
    sequence_id: SequenceId | None = None
    """Its last number on the wire; stages that live may still hold its KV blocks under it."""
    cache_salt: str = ""
    """It finds only what was computed under the same one, and others its own only so."""
    uses_cache: bool = True
    """Whether it may find what was computed for others, and they what is computed for it."""
    uses_drafts: bool = True
    """Whether tokens of it may be guessed and checked several at a time; they are the same."""

    @property
    def max_num_tokens(self) -> int:
        """Counts its prompt and all the tokens that it may generate: admission reserves as many."""
        return len(self.prompt_token_ids) + self.sampling.max_tokens

    def restored(self, generated_token_ids: Sequence[int], sequence_id: SequenceId | None = None) -> GenerationRequest:
        """Returns the same request as the journal has it, under way when the router ended."""
        return replace(self, is_restored=True, generated_token_ids=tuple(generated_token_ids), sequence_id=sequence_id)


@dataclass(frozen=True, slots=True)
class RecoveryCounts:
    """What it took to finish a choice in spite of losses; told to the client."""

    recoveries: int
    """How many times its cache was moved, rebuilt or computed again."""
    replayed_tokens: int
    """How many positions were computed again for that."""
    retried_calls: int = 0
    """How many expert calls of its steps were repeated on another copy."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a choice: as the last stage sampled it, and once the scheduler has it, with what it knows of it."""

    token_id: int
    logprob: float | None = None
    """Natural log of the model's own probability, before penalties, temperature and filters; None if not asked for."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), best first; empty if not asked for."""
    finish_reason: FinishReason | None = None
    """The last token of a choice has one."""
    degraded: bool = False
    """Its step went on without an expert (EXPERT_LOSS=degrade): the model itself might say something else."""
    recovery: RecoveryCounts | None = None
    """A choice's last token has it at least; a stop string ends it at a token of which the mesh does not know that."""
    num_cached_tokens: int = 0
    """A choice's first token has it: how many tokens of the prompt were found in the cache."""
    is_draft: bool = False
    """It was guessed, and sampled in the same step as the token before it."""
    num_rejected_drafts: int = 0
    """Guesses in its step that were wrong, or came to nothing since one before them was."""


@dataclass(frozen=True, slots=True)
class Readiness:
    """Says whether a token can be made end to end, and if not, what is missing."""

    ready: bool
    detail: str
    missing: tuple[str, ...] = ()
    """Each thing that is missing, as a sentence; empty if ready."""
    warnings: tuple[str, ...] = ()
    """Redundancy that is missing, as sentences: nothing is wrong yet, but the next loss would cost more."""


class TokenStream(AsyncIterable[Token], Protocol):
    """Gives out the tokens of one choice as they are made.

    Raises MoemeshError leaves: OverloadedError at the first token, MeshError leaves at any.
    """

    async def aclose(self) -> None:
        """Cancels the choice in the mesh, unless it has ended: its KV blocks are free within a step. To cancel the task
        that waits for a token does the same."""
        ...


class Engine(Protocol):
    """What the front asks of the mesh."""

    def check_room(self, num_choices: int) -> None:
        """Checks that this many choices would be accepted now, as far as is known without asking the mesh.

        Raises NotReadyError and OverloadedError; `generate` may raise them all the same.
        """
        ...

    def generate(self, request: GenerationRequest) -> TokenStream:
        """Returns the tokens of one choice that are still missing."""
        ...

    def readiness(self) -> Readiness:
        """Says whether a token can be made, from what the mesh thread last published; it is cheap."""
        ...

    def describe_mesh(self) -> dict[str, Any]:
        """Says which node holds what, as plain JSON; as old as `readiness`."""
        ...

    @property
    def max_context_tokens(self) -> int:
        """Returns how many tokens prompt and completion may have together."""
        ...
