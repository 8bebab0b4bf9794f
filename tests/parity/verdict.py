"""Whether an answer of the mesh is the reference's, where neither may be asked for more than arithmetic allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.support.checkpoints.reference import Reference, ReferenceAnswer
from tests.support.served.mesh_client import Answer

MIN_MARGIN = 1e-4
"""Under this lead of the best token over the second, fp32 sums in another order may have another winner."""
MAX_LOGPROB_DIFFERENCE = 1e-4


@dataclass
class ParityCount:
    """Over a whole test session."""

    answers: int = 0
    positions: int = 0
    near_ties: int = 0
    """Positions whose margin in the reference is under MIN_MARGIN."""
    excused: int = 0
    """Those of them where the mesh took the other token."""
    largest_logprob_difference: float = 0.0

    def __str__(self) -> str:
        return (
            f"parity: {self.answers} answers, {self.positions} positions, {self.near_ties} near ties "
            f"(reference margin < {MIN_MARGIN}), {self.excused} of them excused for another token; "
            f"largest difference of a logprob {self.largest_logprob_difference:.1e}"
        )


def assert_parity(answer: Answer, expected: ReferenceAnswer, reference: Reference, count: ParityCount) -> None:
    """The same tokens, with log-probabilities within MAX_LOGPROB_DIFFERENCE.

    Where the mesh leaves the reference's path at a near tie, the reference follows it: every later token must be the
    best, or nearly, after the mesh's own tokens.
    """
    assert answer.prompt_token_ids == expected.prompt_token_ids
    scores = reference.logprobs(answer.prompt_token_ids, answer.token_ids)
    best = scores.topk(2, dim=-1)
    margins = (best.values[:, 0] - best.values[:, 1]).tolist()
    other_tokens = [at for at, token_id in enumerate(answer.token_ids) if token_id != int(best.indices[at, 0])]
    for at in other_tokens:
        assert margins[at] < MIN_MARGIN, (
            f"position {at} of {len(answer.token_ids)} after {len(answer.prompt_token_ids)} prompt tokens: "
            f"{answer.token_ids[at]} in place of {int(best.indices[at, 0])}, which leads by {margins[at]:.2e}"
        )
    if not other_tokens:
        # The whole path is the greedy one: then it must also end where generate() ends.
        assert answer.token_ids == expected.token_ids
    assert (answer.finish_reason == "stop") == (answer.token_ids[-1] in reference.end_token_ids)
    chosen = scores.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    difference = float((chosen - torch.tensor(answer.logprobs, dtype=torch.float64)).abs().max())
    assert difference <= MAX_LOGPROB_DIFFERENCE
    count.answers += 1
    count.positions += len(answer.token_ids)
    count.near_ties += sum(margin < MIN_MARGIN for margin in margins)
    count.excused += len(other_tokens)
    count.largest_logprob_difference = max(count.largest_logprob_difference, difference)
