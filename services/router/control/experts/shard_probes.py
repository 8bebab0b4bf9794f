"""Whether nodes that hold the same shard answer the probe alike. Pure.

The fingerprint of a checkpoint has samples of its files, not every byte, and a file may change under a node. So each
shard answers a known question when it is loaded, and reports say what came out: nodes of one numeric class must agree
to the bit, others nearly. A node that does not is asked for nothing.

P shards in the order of (layer, expert, slice).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from common.ids import NodeId
from common.messages import ShardsReady
from common.topology import NodeDescription
from common.wire.array import BoolArray, Float32Array, Int32Array, Int64Array, frame_to_array

TOLERANCE = 0.1
"""How far projections on nodes of different classes may differ. Those of other weights differ by about 1.4; roundings
of bf16 add up to some hundredths."""


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A node that is not to be asked, and the one that it contradicts."""

    node_id: NodeId
    """Which is held to be wrong: the one with fewer others on its side, or the one that came later."""
    other: NodeId
    shard: int
    """The first of them."""
    num_shards: int
    is_same_class: bool

    def describe(self, nodes: Mapping[NodeId, NodeDescription], table_shape: tuple[int, int, int]) -> str:
        """Says it to the node that is not to be asked, and to people."""
        layer, expert, piece = (int(place) for place in np.unravel_index(self.shard, table_shape))
        kind = "the same numeric class" if self.is_same_class else "another numeric class"
        prints = f"{nodes[self.node_id].fingerprint} and {nodes[self.other].fingerprint}"
        return (
            f"{self.node_id} answers the probe of {self.num_shards} expert shards (the first: layer {layer}, expert "
            f"{expert}, slice {piece}) otherwise than {self.other}, of {kind}: their checkpoints differ, though their "
            f"fingerprints are {prints}, or one of them computes wrongly. MODEL must name the same files on every node"
        )


@dataclass(frozen=True, slots=True)
class _Answers:
    numeric_class: str
    digests: Int32Array
    """[P]; 0: none."""
    projections: Float32Array
    """[P]."""
    is_refused: bool = False
    """Found wrong: it contradicts no node."""


class ShardProbes:
    """What nodes have answered last."""

    def __init__(self, table_shape: tuple[int, int, int]) -> None:
        """Layers, experts of a layer, slices of an expert."""
        self._table_shape = table_shape
        self._answers: dict[NodeId, _Answers] = {}

    def forget(self, node_id: NodeId) -> None:
        """It is gone; an unknown node is not an error."""
        self._answers.pop(node_id, None)

    def compare(self, node: NodeDescription, report: ShardsReady) -> list[Disagreement]:
        """Judges a report. Raises ProtocolError that names the field."""
        digests: Int32Array = frame_to_array(report.digests, "int32", self._table_shape, "ShardsReady.digests")
        projections: Float32Array = frame_to_array(
            report.projections, "float32", self._table_shape, "ShardsReady.projections"
        )
        return self.judge(node.node_id, node.numeric_class, digests.reshape(-1), projections.reshape(-1))

    def judge(
        self, node_id: NodeId, numeric_class: str, digests: Int32Array, projections: Float32Array
    ) -> list[Disagreement]:
        """Judges a node's answers, [P] each. Returns all nodes that they show to be wrong. A wrong one stays a
        witness for others that say the same, until it is forgotten: of three nodes that start together the wrong one
        may have been the first."""
        before = self._answers.get(node_id)
        self._answers[node_id] = _Answers(numeric_class, digests, projections)
        # Dozens of nodes report several times a second while they load: what was compared before is left out.
        fresh = np.flatnonzero(digests)
        if before is not None and not before.is_refused:
            fresh = fresh[digests[fresh] != before.digests[fresh]]
        found: list[Disagreement] = []
        # Each of the others at once: what is fresh now is not compared later.
        while fresh.size and not self._answers[node_id].is_refused and (one := self._disagreement(node_id, fresh)):
            self._answers[one.node_id] = replace(self._answers[one.node_id], is_refused=True)
            found.append(one)
        return found

    def _disagreement(self, node_id: NodeId, fresh: Int64Array) -> Disagreement | None:
        """Finds one over some of these shards, with one of those that have not been found wrong."""
        new = self._answers[node_id]
        others = {name: known for name, known in self._answers.items() if name != node_id}
        differing = {
            name: shards
            for name, known in others.items()
            if not known.is_refused and (shards := _differing(new, known, fresh)).size
        }
        if not differing:
            return None
        other, shards = next(iter(differing.items()))
        shard = shards[:1]
        num_against = sum(int(shard[0]) in found for found in differing.values())
        num_for = sum(
            bool(known.digests[shard[0]]) and not _differing(new, known, shard).size for known in others.values()
        )
        is_same_class = others[other].numeric_class == new.numeric_class
        wrong, right = (other, node_id) if num_for >= max(1, num_against) else (node_id, other)
        return Disagreement(wrong, right, int(shard[0]), shards.size, is_same_class)


def _differing(one: _Answers, other: _Answers, shards: Int64Array) -> Int64Array:
    """Returns those of the shards, which the one holds, that the other holds too and answers otherwise, ascending."""
    shards = shards[other.digests[shards] != 0]
    is_other: BoolArray = one.digests[shards] != other.digests[shards]
    if one.numeric_class != other.numeric_class:
        distance = np.abs(one.projections[shards] - other.projections[shards])
        is_other = ~(distance <= TOLERANCE)  # what is not a number is near to nothing
    differing: Int64Array = shards[is_other]
    return differing
