"""Prompt lookup: a text that repeats itself is guessed to go on as it did before. Pure.

The guess is what followed the latest earlier place, in prompt or answer, where the last n tokens stood; of LENGTHS the
longest n that stood anywhere counts. (Saxena, Prompt Lookup Decoding, 2023,
https://github.com/apoorvumang/prompt-lookup-decoding.)

Each length has an index: hash of a run of n tokens -> where it ended. Runs of long ago lie in a sorted array, 8 bytes a
token; the latest ones in a dict, until there are enough of them for the array.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from common.ids import RequestId
from common.wire.array import Int64Array
from services.router.scheduling.drafts.source import Guess

LENGTHS = (16, 8, 4)
"""Longest first."""
SETTLED_TOGETHER = 256
"""So many runs go from the dict, where one takes over 100 bytes, to the array at once, which costs milliseconds where a
text is long."""
READ_ONE_BY_ONE = 64
"""Of more new tokens than these, runs go to the array at once."""
CHECKED_PLACES = 4
"""Of places with one hash so many are compared: by chance there is one, unless somebody has looked for such tokens."""
_MASK = (1 << 64) - 1
_MULTIPLIER, _MIXER = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
"""Odd, with bits all over."""
_POWERS = tuple(pow(_MULTIPLIER, distance, 1 << 64) for distance in range(1, LENGTHS[0] + 1))
_HASH_SHIFT, _END_BITS = 33, 32
"""A hash has 31 bits; above an end of 32 bits it fits a signed number of 64."""


class PromptLookup:
    """See the module. It is a `DraftSource`; the grade of a guess is the higher the longer the run that was found."""

    def __init__(self) -> None:
        self._texts: dict[RequestId, _IndexedText] = {}

    def propose(self, request: RequestId, prompt: Sequence[int], generated: Sequence[int], most: int) -> Guess:
        """Returns what followed the same tokens before; see `DraftSource`."""
        text = self._texts.get(request)
        if text is None:
            text = self._texts[request] = _IndexedText()
        text.read(prompt, generated)
        return text.guess(prompt, generated, most)

    def forget(self, request: RequestId) -> None:
        """Drops the index of its text."""
        self._texts.pop(request, None)


class _IndexedText:
    """Prompt and answer of one request, and where runs of their tokens have ended.

    A run that ends where the text does is entered with the next token: nothing has followed it yet.
    """

    def __init__(self) -> None:
        self._runs = [_Runs(length) for length in LENGTHS]
        self._num_read = 0
        self._num_settled = 0
        """Runs that end here or before are in arrays."""
        self._keys: list[int] = []
        """Of the runs that end with the text, one for each length, longest first; fewer if it is short."""

    def read(self, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """Enters what has come since the last call."""
        stop = len(prompt) + len(generated)
        if stop - self._num_read > READ_ONE_BY_ONE or stop - self._num_settled > SETTLED_TOGETHER:
            self._settle(prompt, generated, stop - 1)
            self._num_read, self._keys = stop - 1, []
        for end in range(self._num_read + 1, stop + 1):
            for runs, key in zip(self._runs[len(self._runs) - len(self._keys) :], self._keys, strict=True):
                runs.latest[key] = end - 1
            self._keys = _keys_of(_tokens(prompt, generated, max(0, end - LENGTHS[0]), end))
        self._num_read = stop

    def guess(self, prompt: Sequence[int], generated: Sequence[int], most: int) -> Guess:
        """Returns what followed the longest run that stood somewhere before."""
        stop = self._num_read
        first = len(self._runs) - len(self._keys)
        for number, key in enumerate(self._keys, first):
            runs = self._runs[number]
            wanted = _tokens(prompt, generated, stop - runs.length, stop)
            for end in runs.ends(key):
                if _tokens(prompt, generated, end - runs.length, end) == wanted:
                    token_ids = _tokens(prompt, generated, end, min(stop, end + most))
                    # A text that has just begun to repeat itself goes on with what is guessed here.
                    repeated = token_ids * -(-most // len(token_ids))
                    return Guess(tuple(repeated[:most]), grade=len(self._runs) - 1 - number)
        return Guess()

    def _settle(self, prompt: Sequence[int], generated: Sequence[int], last_end: int) -> None:
        """Puts all runs that end at `last_end` or before into the arrays."""
        start = max(0, self._num_settled + 1 - LENGTHS[0])
        token_ids = np.array(_tokens(prompt, generated, start, last_end), dtype=np.uint64)
        for runs in self._runs:
            runs.settle(token_ids, start, max(runs.length, self._num_settled + 1))
        self._num_settled = last_end


class _Runs:
    """Where runs of one length have ended, by their hash."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.latest: dict[int, int] = {}
        """The last end of each of the latest runs."""
        self._settled: Int64Array = np.empty(0, dtype=np.int64)
        """Ascending: the hash above _END_BITS bits of the end."""

    def ends(self, key: int) -> Iterator[int]:
        """Yields where runs of this hash have ended, the last one first; not all of them."""
        if (end := self.latest.get(key)) is not None:
            yield end
        index = int(self._settled.searchsorted((key + 1) << _END_BITS))
        for place in range(index - 1, max(-1, index - 1 - CHECKED_PLACES), -1):
            entry = int(self._settled[place])
            if entry >> _END_BITS != key:
                return
            yield entry & ((1 << _END_BITS) - 1)

    def settle(self, token_ids: npt.NDArray[np.uint64], start: int, first_end: int) -> None:
        """Enters the runs from `first_end` on in `token_ids`, uint64 [*], which begin at `start` of the text."""
        self.latest.clear()
        first, stop = first_end - start, len(token_ids)
        if first > stop:
            return
        sums = np.zeros(stop - first + 1, dtype=np.uint64)
        for distance in range(self.length):
            sums += token_ids[first - 1 - distance : stop - distance] * np.uint64(_POWERS[distance])
        hashes = (sums * np.uint64(_MIXER)) >> np.uint64(_HASH_SHIFT)
        ends = np.arange(first_end, first_end + len(hashes), dtype=np.int64)
        entries = (hashes.astype(np.int64) << _END_BITS) | ends
        entries.sort()
        self._settled = np.concatenate((self._settled, entries))
        self._settled.sort(kind="stable")  # a merge: what was there is in order too


def _keys_of(tail: Sequence[int]) -> list[int]:
    """Returns the hash of the last n tokens for each n of LENGTHS, longest first, that are not more than these."""
    keys: list[int] = []
    total = distance = 0
    for length in reversed(LENGTHS):
        if length > len(tail):
            break
        while distance < length:
            total += tail[-1 - distance] * _POWERS[distance]
            distance += 1
        keys.append(((total * _MIXER) & _MASK) >> _HASH_SHIFT)
    return keys[::-1]


def _tokens(prompt: Sequence[int], generated: Sequence[int], start: int, stop: int) -> list[int]:
    """Returns the tokens at positions [start, stop) of the text."""
    num_prompt = len(prompt)
    if start >= num_prompt:
        return list(generated[start - num_prompt : stop - num_prompt])
    return [*prompt[start:stop], *generated[: max(0, stop - num_prompt)]]
