"""Which questions training never sees. The split is a hash of the thing itself, so no list has to be kept.

A *key* names what must not be known: a pair of numbers ("adding 47 85"), a word ("word planet"), a phrasing.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from hashlib import blake2b

CONTENT_SHARE_PERCENT = 10


class Split(StrEnum):
    """Training questions consist of nothing that is held out, held-out questions of nothing that training uses."""

    TRAINING = "training"
    HELD_OUT = "held_out"

    def allows_content(self, keys: Iterable[str]) -> bool:
        """Returns whether numbers or words with these keys may occur. Content without keys (a table) is in both
        splits."""
        return all((hash_percent(key) < CONTENT_SHARE_PERCENT) == (self is Split.HELD_OUT) for key in keys)


def hash_percent(key: str) -> int:
    """0 to 99, evenly over keys, the same on every machine."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") % 100
