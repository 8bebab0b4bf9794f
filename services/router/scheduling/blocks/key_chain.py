"""The names of full blocks: equal for equal tokens from the first one on, one salt and one numeric class.

A block's key is SHA-256 over the key of the block before it and its own tokens. Two blocks of different content have
the same key only where somebody has found a collision of SHA-256: whoever can send prompts cannot make wrong hits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

BlockKey = bytes
"""32 bytes."""


def root_key(salt: str, numeric_class: int) -> BlockKey:
    """Returns the parent of a first block. `numeric_class`: the number of the classes that compute, 64 bits."""
    of_class = numeric_class.to_bytes(8, "little", signed=True)
    return hashlib.sha256(of_class + salt.encode("utf-8", "surrogatepass")).digest()


def child_key(parent: BlockKey, token_ids: Sequence[int]) -> BlockKey:
    """Returns the key of a block that has these tokens, behind the block of `parent`."""
    return hashlib.sha256(parent + np.array(token_ids, dtype="<i4").tobytes()).digest()


class KeyChain:
    """The keys of one request's blocks, made as far as somebody has asked. Its tokens only grow."""

    def __init__(self, salt: str, block_tokens: int) -> None:
        self._salt = salt
        self._block_tokens = block_tokens
        self._keys: dict[int, list[BlockKey]] = {}
        """Keys by numeric class: a mesh has few."""

    def key(self, index: int, numeric_class: int, read: Callable[[int, int], Sequence[int]]) -> BlockKey:
        """Returns the key of its block `index`, all of whose tokens must be known. `read(start, stop)`: the request's
        tokens at these positions."""
        keys = self._keys.setdefault(numeric_class, [])
        while len(keys) <= index:
            parent = keys[-1] if keys else root_key(self._salt, numeric_class)
            start = len(keys) * self._block_tokens
            token_ids = read(start, start + self._block_tokens)
            assert len(token_ids) == self._block_tokens, "only full blocks have keys"
            keys.append(child_key(parent, token_ids))
        return keys[index]
