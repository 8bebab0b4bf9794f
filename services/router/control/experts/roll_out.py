"""From the shards that nodes have to those that they should have, without a moment in which one is not served.

N nodes in the order of their ids, P shards in the order of (layer, expert, slice), W words of 64 shards, C copies. All
of it is done on whole tables: with 64 nodes and 15,000 shards a turn of the mesh thread has a millisecond for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.wire.array import BoolArray, Int32Array, Int64Array
from services.router.control.experts.shard_bits import (
    NOBODY,
    ShardBits,
    are_in,
    by_shard,
    count,
    from_pairs,
    pack,
    pairs,
    unpack,
)


@dataclass(frozen=True, slots=True)
class PlacementTarget:
    """Where shards are to be in the end."""

    owners: Int32Array
    """[C, P]: the node at each place among a shard's owners, NOBODY where there is none."""
    goals: ShardBits
    """[N, W]: the same by node."""
    num_owners: Int64Array
    """[P]: how many nodes are to have each."""
    is_named: BoolArray
    """[P]: which shards the model has; others are unloaded."""
    is_settled: bool
    """False: a newer placement is to come, for other nodes than this one. No node unloads anything until then, but to
    make room: it might have to load it again."""


@dataclass(frozen=True, slots=True)
class ShardAssignment:
    """What the nodes are to hold next, and where calls may go now."""

    shards: ShardBits
    """[N, W]: what each node is to hold: it unloads the rest first, then loads what is new."""
    owners: Int32Array
    """[C, P]: 1 + the node that may be asked now, in order, 0 for none: ready copies that stay, as the placement orders
    them, then those that go."""
    num_owners: Int64Array
    """[P]: how many that is."""
    orphans: BoolArray
    """[P]: shards that no node can serve now."""


def aim(owners: Int32Array, num_nodes: int, is_named: BoolArray, is_settled: bool) -> PlacementTarget:
    """Returns the target with these owners [C, P]."""
    is_owner = owners != NOBODY
    shards = np.broadcast_to(np.arange(owners.shape[1], dtype=np.int32), owners.shape)[is_owner]
    goals = from_pairs(owners[is_owner], shards, num_nodes, owners.shape[1])
    return PlacementTarget(owners, goals, np.count_nonzero(is_owner, axis=0), is_named, is_settled)


def next_assignment(
    target: PlacementTarget, ready: ShardBits, told: ShardBits, room_shards: Int64Array | None
) -> ShardAssignment:
    """Returns the next step towards `target`. Call it again with each report; it ends with the target itself.

    `ready` [N, W] is what nodes have loaded and tested, `told` [N, W] what they were told last, `room_shards` [N] how
    many each has room for (None: for all). A node unloads a shard when all nodes that shall own it are ready, or, where
    it lacks the room for what it shall load, when another ready one keeps it. Where not even that makes room, the load
    waits: a placement that is less even serves better than a shard that is gone.
    """
    is_named = pack(target.is_named)
    to_load = target.goals & ~ready
    may_go = ~is_named
    if target.is_settled:
        may_go |= np.bitwise_or.reduce(target.goals, axis=0) & ~np.bitwise_or.reduce(to_load, axis=0)
    held = ready & (target.goals | ~may_go)
    missing = count(to_load)
    room = missing if room_shards is None else room_shards - count(held)
    is_roomy = missing <= np.maximum(room, 0)
    held[is_roomy] |= to_load[is_roomy]
    if not is_roomy.all():
        _exchange(held, target, told, room, ~is_roomy, ready)
    owners = _ask_order(ready & held & is_named, target)
    num_owners = np.count_nonzero(owners, axis=0)
    return ShardAssignment(held, owners, num_owners, target.is_named & (num_owners == 0))


def _exchange(
    held: ShardBits, target: PlacementTarget, told: ShardBits, room: Int64Array, is_tight: BoolArray, ready: ShardBits
) -> None:
    """Nodes that lack room unload what others keep, one node after the other, and load what then fits."""
    num_shards = target.is_named.size
    keepers = unpack(held & ready, num_shards).sum(axis=0, dtype=np.int32)
    for node in np.flatnonzero(is_tight).tolist():
        goals, row = target.goals[node], unpack(held[node], num_shards)
        wanted = np.flatnonzero(unpack(goals & ~held[node], num_shards))
        going = np.flatnonzero(unpack(held[node] & ~goals, num_shards))
        going = going[keepers[going] > 1]
        going = going[np.argsort(-keepers[going], kind="stable")][: max(0, wanted.size - int(room[node]))]
        row[going] = False
        keepers[going] -= 1
        # Shards with the fewest ready copies first; then what the node was told before, so that no load is broken off.
        order = np.lexsort((wanted, ~unpack(told[node], num_shards)[wanted], keepers[wanted]))
        row[wanted[order][: max(0, int(room[node]) + going.size)]] = True
        held[node] = pack(row)


def _ask_order(usable: ShardBits, target: PlacementTarget) -> Int32Array:
    """Returns owners first, in their order; then those that hold a shard that they are not to keep, by their ids."""
    owners = np.where(are_in(usable, target.owners), target.owners, NOBODY)
    others = by_shard(*pairs(usable & ~target.goals), target.owners.shape[1])
    return _without_gaps(np.concatenate([owners, others]) + 1)


def _without_gaps(order: Int32Array) -> Int32Array:
    """Returns each column's entries above its zeros, and no row without entries."""
    is_entry = order != 0
    columns = np.flatnonzero((is_entry[1:] > is_entry[:-1]).any(axis=0))  # few of them, most of the time
    is_entry = is_entry[:, columns]
    depth = np.cumsum(is_entry, axis=0, dtype=np.int32) - 1
    closed = np.zeros(is_entry.shape, dtype=np.int32)
    closed.reshape(-1)[(depth * columns.size + np.arange(columns.size))[is_entry]] = order[:, columns][is_entry]
    order[:, columns] = closed
    return order[: np.count_nonzero(order.any(axis=1))]
