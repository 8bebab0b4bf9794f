"""From the shards that nodes have to those that they should have, without a moment in which one is served by nobody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.ids import NodeId
from common.topology import ShardId
from services.router.control.placement import Placement


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the nodes are to hold next, and where calls may go now."""

    shards: Mapping[NodeId, frozenset[ShardId]]
    """What each node is to hold: it unloads the rest first, then loads what is new. Every living node is named."""
    owners: Mapping[ShardId, tuple[NodeId, ...]]
    """Who may be asked now, in order: ready copies that stay, as the placement orders them, then those that go."""
    is_complete: bool
    """Everything is where the placement wants it, and ready."""

    def orphans(self) -> tuple[ShardId, ...]:
        """Shards that nobody can serve now."""
        return tuple(sorted(shard for shard, owners in self.owners.items() if not owners))


def next_assignment(
    target: Placement,
    ready: Mapping[NodeId, frozenset[ShardId]],
    current: Mapping[NodeId, frozenset[ShardId]],
    capacity_bytes: Mapping[NodeId, int] | None = None,
    shard_bytes: int | Mapping[ShardId, int] = 1,
) -> Assignment:
    """The next step towards `target`. Call it again with each report; it ends with the target itself.

    `ready` is what nodes have loaded and tested, `current` what they were told last (both of living nodes only).
    A node unloads a shard when all nodes that shall own it are ready, or, where it lacks the room for what it shall
    load (`capacity_bytes`; without it there is always room), when another ready one keeps it. Where not even that makes
    room, the load waits: a placement that is less even serves better than a shard that is gone.
    """
    sizes = shard_bytes
    wanted = target.shards_of()
    living = sorted({*ready, *current})
    held = {node: set(ready.get(node, frozenset())) for node in living}
    goals = {node: set(wanted.get(node, frozenset())) for node in living}
    keepers = _count(held)

    def size_of(shards: set[ShardId]) -> int:
        return sum(sizes if isinstance(sizes, int) else sizes[shard] for shard in shards)

    # Unload what has arrived at all its new owners.
    for node in living:
        for shard in sorted(held[node] - goals[node]):
            owners = target.owners.get(shard, ())
            if all(shard in ready.get(owner, frozenset()) for owner in owners):
                held[node].remove(shard)
                keepers[shard] -= 1

    for node in living:
        # Shards with the fewest ready copies first; then what the node was told before, so that no load is broken off.
        told = current.get(node, frozenset())
        to_load = sorted(goals[node] - held[node], key=lambda shard: (keepers.get(shard, 0), shard not in told, shard))
        room = size_of(set(to_load)) if capacity_bytes is None else capacity_bytes[node] - size_of(held[node])
        going = sorted(held[node] - goals[node], key=lambda shard: (-keepers[shard], shard))
        for shard in to_load:
            while size_of({shard}) > room and going and keepers[going[0]] > 1:
                unloaded = going.pop(0)
                held[node].remove(unloaded)
                keepers[unloaded] -= 1
                room += size_of({unloaded})
            if size_of({shard}) <= room:
                held[node].add(shard)
                room -= size_of({shard})

    return Assignment(
        shards={node: frozenset(held[node]) for node in living},
        owners={shard: _owners_now(shard, target, ready, held) for shard in sorted(target.owners)},
        is_complete=all(ready.get(node, frozenset()) == wanted.get(node, frozenset()) for node in {*living, *wanted}),
    )


def _count(held: Mapping[NodeId, set[ShardId]]) -> dict[ShardId, int]:
    counts: dict[ShardId, int] = {}
    for shards in held.values():
        for shard in shards:
            counts[shard] = counts.get(shard, 0) + 1
    return counts


def _owners_now(
    shard: ShardId,
    target: Placement,
    ready: Mapping[NodeId, frozenset[ShardId]],
    held: Mapping[NodeId, set[ShardId]],
) -> tuple[NodeId, ...]:
    """Ready copies that are not about to be unloaded."""
    usable = [node for node in sorted(ready) if shard in ready[node] and shard in held[node]]
    owners = target.owners[shard]
    return tuple(node for node in owners if node in usable) + tuple(node for node in usable if node not in owners)
