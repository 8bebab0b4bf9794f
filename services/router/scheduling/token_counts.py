"""How often each token of one request has come up, for penalties. Pure: numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def count_tokens(prompt_token_ids: Sequence[int], generated_token_ids: Sequence[int]) -> bytes:
    """int32 [*, 3]: token id, times generated, 1 if in the prompt; one row a token that has come up, ascending.

    `prompt_token_ids`: empty where no penalty looks at the prompt.
    """
    generated, times = np.unique(np.array(generated_token_ids, dtype=np.int32), return_counts=True)
    prompt = np.unique(np.array(prompt_token_ids, dtype=np.int32))
    token_ids = np.union1d(generated, prompt)
    rows = np.zeros((len(token_ids), 3), dtype=np.int32)
    rows[:, 0] = token_ids
    rows[np.searchsorted(token_ids, generated), 1] = times
    rows[np.searchsorted(token_ids, prompt), 2] = 1
    return rows.tobytes()
