"""How a client wants its tokens chosen, checked and complete: no field is left to a default further on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
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
