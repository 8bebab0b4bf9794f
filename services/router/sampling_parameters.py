"""How a client wants its tokens chosen, checked and complete: no field is left to a default further on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

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
    """Taken from the logit of every token that was generated."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for each time that it was generated."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in the prompt or generated, multiplies negative ones; 1: off."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit); each id once."""
    min_tokens: int = 0
    """Stop tokens cannot be drawn, and stop strings do not count, before so many tokens are there."""

    @property
    def counts_tokens(self) -> bool:
        """Whether a next token depends on how often others came before it."""
        return self.counts_prompt or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def counts_prompt(self) -> bool:
        """Whether it depends on the prompt's tokens too."""
        return self.repetition_penalty != 1.0

    def is_early(self, num_generated: int) -> bool:
        """Whether a choice with so many tokens is too short to end: its stop tokens must not be drawn."""
        return num_generated < self.min_tokens and bool(self.stop_token_ids)

    def adjusts(self, num_generated: int) -> bool:
        """Whether the next token's logits are not the model's own, or some of them are left out by their number."""
        return bool(self.min_p or self.logit_bias or self.counts_tokens or self.is_early(num_generated))

    @cached_property
    def bias_table(self) -> Float64Array:
        """float64 [*, 2]: (token id, what is added to its logit)."""
        return _table(dict(self.logit_bias))

    @cached_property
    def early_bias_table(self) -> Float64Array:
        """The same before `min_tokens`: stop tokens stand there with -inf."""
        return _table(dict(self.logit_bias) | dict.fromkeys(self.stop_token_ids, -np.inf))


def _table(biases: dict[int, float]) -> Float64Array:
    return np.array(list(biases.items()), dtype=np.float64).reshape(-1, 2)
