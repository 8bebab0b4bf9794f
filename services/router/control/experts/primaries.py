"""Which copy of a shard is asked first: first copies are even over the nodes, for each layer and in all."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import groupby

from common.topology import ShardId


def order_copies(owners: Mapping[ShardId, Sequence[int]], num_nodes: int) -> dict[ShardId, list[int]]:
    """Owners of each shard (node indexes), the primary first, the others by how often they stand at that place."""
    totals = [0] * num_nodes
    ordered: dict[ShardId, list[int]] = {}
    for _, group in groupby(sorted(owners), key=lambda shard: shard.layer):
        layer = list(group)
        primaries = _even_primaries([owners[shard] for shard in layer], totals)
        for shard, primary in zip(layer, primaries, strict=True):
            totals[primary] += 1
            ordered[shard] = [primary]
    for place in range(1, max((len(nodes) for nodes in owners.values()), default=0)):
        counts = [0] * num_nodes
        for shard, chosen in ordered.items():
            left = [node for node in owners[shard] if node not in chosen]
            if len(chosen) == place and left:
                pick = min(left, key=lambda node: (counts[node], node))
                counts[pick] += 1
                chosen.append(pick)
    return ordered


def _even_primaries(owners: Sequence[Sequence[int]], totals: Sequence[int]) -> list[int]:
    """One owner for each shard of a layer. `totals` (of the layers before) decides between equals."""
    counts = [0] * len(totals)
    primaries: list[int] = []
    for nodes in owners:
        pick = min(nodes, key=lambda node: (counts[node], totals[node], node))
        counts[pick] += 1
        primaries.append(pick)
    while _shift_one(owners, primaries, counts, totals):
        pass  # each shift lowers the sum of squares (or, between equals, that of the totals), so this ends
    return primaries


def _shift_one(owners: Sequence[Sequence[int]], primaries: list[int], counts: list[int], totals: Sequence[int]) -> bool:
    """Move one first copy from a fuller to an emptier node, along a chain of shards that both ends of a link own."""
    first_copies: list[list[int]] = [[] for _ in counts]
    for shard, primary in enumerate(primaries):
        first_copies[primary].append(shard)
    for start in sorted(range(len(counts)), key=lambda node: (-counts[node], -totals[node], node)):
        came_from: dict[int, int] = {}  # node -> the shard that moves to it
        queue = deque([start])
        seen = {start}
        while queue:
            node = queue.popleft()
            gain = counts[start] - counts[node]
            if gain > 1 or (gain == 1 and totals[start] > totals[node]):
                counts[start] -= 1
                counts[node] += 1
                while node != start:
                    shard = came_from[node]
                    primaries[shard], node = node, primaries[shard]
                return True
            for shard in first_copies[node]:
                for other in owners[shard]:
                    if other not in seen:
                        seen.add(other)
                        came_from[other] = shard
                        queue.append(other)
    return False
