"""The roll-out as it was written first, shard by shard over sets, and today's, over tables, in the same terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from common.ids import NodeId
from common.topology import ShardId
from common.wire.array import BoolArray
from services.router.control.experts import roll_out
from services.router.control.experts.placement import Placement
from services.router.control.experts.shard_bits import NOBODY, pack, unpack


@dataclass(frozen=True, slots=True)
class ShardAssignment:
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


def former_assignment(
    target: Placement,
    ready: Mapping[NodeId, frozenset[ShardId]],
    current: Mapping[NodeId, frozenset[ShardId]],
    capacity_bytes: Mapping[NodeId, int] | None = None,
    shard_bytes: int | Mapping[ShardId, int] = 1,
) -> ShardAssignment:
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

    return ShardAssignment(
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


def next_assignment(
    target: Placement,
    ready: Mapping[NodeId, frozenset[ShardId]],
    current: Mapping[NodeId, frozenset[ShardId]],
    capacity_bytes: Mapping[NodeId, int] | None = None,
    shard_bytes: int = 1,
) -> ShardAssignment:
    """Today's."""
    living = sorted({*ready, *current})
    shards = sorted({*target.owners}.union(*ready.values(), *current.values()))
    numbers = {shard: number for number, shard in enumerate(shards)}

    def table(held: Mapping[NodeId, frozenset[ShardId]]) -> BoolArray:
        rows = np.zeros((len(living), len(shards)), dtype=np.bool_)
        for node, own in enumerate(held.get(name, frozenset()) for name in living):
            rows[node, [numbers[shard] for shard in own]] = True
        return rows

    depth = max((len(owners) for owners in target.owners.values()), default=0)
    places = np.full((depth, len(shards)), NOBODY, dtype=np.int32)
    is_settled = all(name in living for owners in target.owners.values() for name in owners)
    for shard, owners in target.owners.items():
        for place, name in enumerate(owners):
            if name in living:
                places[place, numbers[shard]] = living.index(name)
    is_named = np.array([shard in target.owners for shard in shards], dtype=np.bool_)
    room = None
    if capacity_bytes is not None:
        room = np.array([capacity_bytes[name] // shard_bytes for name in living], dtype=np.int64)
    aimed = roll_out.aim(places, len(living), is_named, is_settled)
    step = roll_out.next_assignment(aimed, pack(table(ready)), pack(table(current)), room)
    held = {
        name: frozenset(shards[number] for number in np.flatnonzero(row).tolist())
        for name, row in zip(living, unpack(step.shards, len(shards)), strict=True)
    }
    owners_now = {
        shard: tuple(living[number - 1] for number in step.owners[:, numbers[shard]].tolist() if number)
        for shard in sorted(target.owners)
    }
    assert {shards[number] for number in np.flatnonzero(step.orphans).tolist()} == {
        shard for shard, owners in owners_now.items() if not owners
    }
    wanted = target.shards_of()
    is_complete = all(ready.get(name, frozenset()) == wanted.get(name, frozenset()) for name in {*living, *wanted})
    return ShardAssignment(held, owners_now, is_complete)
