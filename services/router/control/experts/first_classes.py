"""Which numeric class answers the calls of a layer, the same for all stages: bits do not depend on which has time.

Pure: the placement and the choice before are arguments.

C places in the list of copies, L layers, K shards of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.wire.array import Int32Array


class FirstClasses:
    """The choice, and what it was before."""

    def __init__(self) -> None:
        self._before: tuple[str, ...] = ()
        """A class by layer; "" where no node has held anything yet. Empty: nothing was chosen so far."""

    def choose(self, owners: Int32Array, numeric_classes: Sequence[str]) -> tuple[str, ...]:
        """Returns a class by layer, "" where no node holds anything; nothing at all where all nodes have one class.

        `owners` [C, L, K]: 1 + a node's place in `numeric_classes`, 0 for none. A layer keeps its class as long as that
        holds every shard of it that any node holds; else it gets one that does. Where none does it keeps its class too,
        and gets the one that holds the most where that has nothing left.
        """
        num_layers, names = owners.shape[1], sorted(set(numeric_classes))
        before = self._before or ("",) * num_layers
        if len(names) < 2:
            self._before = tuple(names) * num_layers if names else before
            return ()
        numbers = np.array([-1, *(names.index(name) for name in numeric_classes)], dtype=np.int16)[owners]
        held = [np.count_nonzero((numbers == number).any(axis=0), axis=1).tolist() for number in range(len(names))]
        whole = np.count_nonzero((owners > 0).any(axis=0), axis=1).tolist()
        self._before = tuple(
            _best({name: held[number][layer] for number, name in enumerate(names)}, whole[layer], before[layer])
            for layer in range(num_layers)
        )
        return self._before


def _best(held: dict[str, int], whole: int, before: str) -> str:
    if not whole:
        return before
    return min(held, key=lambda name: (held[name] < whole, name != before or not held[name], -held[name], name))
