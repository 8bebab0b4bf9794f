"""How often each token of one request has come up, for penalties. Pure: numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FIRST_CAPACITY = 64


class TokenCounts:
    """Rows of (token id, times generated, 1 if in the prompt), one a token that has come up, in order of appearance.

    Counted once a token, and handed out as one copy of the rows: a step does not go through the whole past again.
    """

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        """`prompt_token_ids`: empty where no penalty looks at the prompt."""
        distinct = tuple(dict.fromkeys(prompt_token_ids))
        self._row_of = {token_id: row for row, token_id in enumerate(distinct)}
        self._rows = np.zeros((max(FIRST_CAPACITY, 2 * len(distinct)), 3), dtype=np.int32)
        self._rows[: len(distinct), 0] = distinct
        self._rows[: len(distinct), 2] = 1
        self._num_counted = 0

    def take(self, generated_token_ids: Sequence[int]) -> bytes:
        """The rows with all generated tokens counted. The sequence only ever grows between calls."""
        for position in range(self._num_counted, len(generated_token_ids)):
            self._count(generated_token_ids[position])
        self._num_counted = len(generated_token_ids)
        return self._rows[: len(self._row_of)].tobytes()

    def _count(self, token_id: int) -> None:
        row = self._row_of.setdefault(token_id, len(self._row_of))
        if row == len(self._rows):
            self._rows = np.concatenate((self._rows, np.zeros_like(self._rows)))
        self._rows[row, 0] = token_id
        self._rows[row, 1] += 1
