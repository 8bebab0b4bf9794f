"""What the mesh's answers are compared with: transformers, greedy, fp32, one prompt at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class ReferenceAnswer:
    """A greedy answer; the three lists are of one length, position by position.

    `margins` are how far the best token's log-probability is ahead of the second best: where that is less than the
    rounding of a sum, either token is right.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]
    ended: bool
    """Whether the last token is one that ends a sequence."""

    def first_near_tie(self, min_margin: float) -> int:
        """Position of the first margin under `min_margin`; the length of the answer if there is none."""
        return next((at for at, margin in enumerate(self.margins) if margin < min_margin), len(self.margins))


class Reference:
    """`generate()` of one checkpoint; answers are kept, so that a test session asks for each only once."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self._model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        ends = self._model.generation_config.eos_token_id
        self.end_token_ids = frozenset([ends] if isinstance(ends, int) else ends)
        self._answers: dict[tuple[tuple[int, ...], int], ReferenceAnswer] = {}

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self._model.config.vocab_size)

    def answer(self, prompt_token_ids: tuple[int, ...], max_tokens: int) -> ReferenceAnswer:
        """Up to `max_tokens` greedy tokens, the end token included if one came."""
        key = (prompt_token_ids, max_tokens)
        if key not in self._answers:
            self._answers[key] = self._generate(prompt_token_ids, max_tokens)
        return self._answers[key]

    def logprobs(self, prompt_token_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> torch.Tensor:
        """[len(token_ids), vocabulary] float32: of every token at each position of the given continuation."""
        with torch.inference_mode():
            logits = self._model(torch.tensor([prompt_token_ids + token_ids])).logits[0].float()
        return torch.log_softmax(logits[len(prompt_token_ids) - 1 : -1], dim=-1)

    def _generate(self, prompt_token_ids: tuple[int, ...], max_tokens: int) -> ReferenceAnswer:
        prompt = torch.tensor([prompt_token_ids])
        with torch.inference_mode():
            sequence = self._model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_tokens, do_sample=False
            )
        token_ids = tuple(sequence[0, len(prompt_token_ids) :].tolist())
        scores = self.logprobs(prompt_token_ids, token_ids)
        best_two = scores.topk(2, dim=-1).values
        return ReferenceAnswer(
            prompt_token_ids=prompt_token_ids,
            token_ids=token_ids,
            logprobs=tuple(scores.gather(1, torch.tensor(token_ids)[:, None])[:, 0].tolist()),
            margins=tuple((best_two[:, 0] - best_two[:, 1]).tolist()),
            ended=token_ids[-1] in self.end_token_ids,
        )
